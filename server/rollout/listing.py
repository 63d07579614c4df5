"""What is known of a model: whole for whoever asks, the gist as gauges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from server.errors import ModelRefused
from server.rollout.base import ServingPath
from server.rollout.guard import Trial, Viewers
from server.rollout.repository import Facts, Repository
from server.rollout.state import Rollout, Stage
from server.telemetry.metrics import Metrics


@dataclass(frozen=True)
class Version:
    """One on disk. roles: of "serving", "previous", "candidate". problem: why nothing else is known."""

    version: int
    roles: tuple[str, ...]
    facts: Facts
    problem: str = ""


@dataclass(frozen=True)
class Listing:
    """What is known of a model now. history: audit entries, oldest first."""

    model: str
    rollout: Rollout
    answering: int
    versions: list[Version]
    trial: Trial
    serving: Viewers
    candidate: Viewers
    faults: int
    served: int
    history: list[dict[str, Any]]


def listing_of(path: ServingPath, repository: Repository, rollout: Rollout, history: list[dict[str, Any]]) -> Listing:
    """Everything about one model. history: audit entries, oldest first."""
    answering = path.answering()
    at = {"serving": rollout.serving or answering, "previous": rollout.previous, "candidate": rollout.candidate}
    versions = []
    for number in repository.versions():
        facts, problem = Facts(), ""
        try:
            facts = repository.facts(repository.path(number))
        except ModelRefused as refusal:
            problem = str(refusal)
        roles = tuple(role for role, version in at.items() if version == number)
        versions.append(Version(number, roles, facts, problem))
    serving, candidate, faults, served = path.viewers()
    return Listing(
        path.model, rollout, answering, versions, path.trial, serving, candidate, faults, served, history
    )  # fmt: skip


class Gauges:
    """What metrics say of rollouts. Thread-safe."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def stands(self, path: ServingPath, rollout: Rollout) -> None:
        """What serves; roles that nobody has are 0."""
        m, model = self._metrics, path.model
        m.model_versions.labels(model, "serving").set(rollout.serving or path.answering())
        m.model_versions.labels(model, "previous").set(rollout.previous)
        m.model_versions.labels(model, "candidate").set(rollout.candidate)
        m.canary_share.labels(model).set(rollout.percent / 100 if rollout.stage is Stage.CANARY else 0.0)

    def shows(self, path: ServingPath, rollout: Rollout) -> None:
        """How the candidate compares."""
        m, model, found = self._metrics, path.model, path.trial.agreement
        if not rollout.serving:
            m.model_versions.labels(model, "serving").set(path.answering())
        if not rollout.candidate or found is None:
            return
        ours_s, theirs_s = path.trial.latency_s
        for name, value in (
            ("rank_correlation", found.rank_correlation), ("top10", found.top10), ("top100", found.top100),
            ("calibration_gap", found.calibration_gap), ("drift", path.trial.drift),
            ("serving_seconds", ours_s), ("candidate_seconds", theirs_s),
        ):  # fmt: skip
            m.rollout_agreement.labels(model, name).set(value)
