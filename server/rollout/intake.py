"""Whether a version may come in: what it says about itself, what it does on real rows, how good it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from server.config import RolloutSettings
from server.errors import ModelRefused, NotFound
from server.rollout.agreement import Agreement, compare
from server.rollout.base import Rows, ServingPath
from server.rollout.probe import Tried, try_model
from server.rollout.repository import GRAPH, Facts, Repository


@dataclass(frozen=True)
class Diff:
    """Two versions on the same sampled rows; agreement None: one is no ONNX file, so it was not run."""

    first: Facts
    second: Facts
    agreement: Agreement | None


def examine(settings: RolloutSettings, path: ServingPath, repository: Repository, folder: Path, version: int) -> Facts:
    """Everything that can be known before it is loaded.

    Raises:
        ModelRefused: unreadable, another feature schema, other tensors, not finite on the sample, below the gate.
    """
    label = f"{path.model}/{version}"
    facts, _ = _look(path, repository, folder, label, path.samples())
    if facts.schema != path.contract.schema:
        raise ModelRefused(
            f"{label} was built for feature schema {facts.schema or '(none)'!r}, this server has "
            f"{path.contract.schema!r}"
        )
    if problem := gate_problem(settings, facts.metrics):
        raise ModelRefused(f"{label}: {problem}")
    return facts


def diff(path: ServingPath, repository: Repository, first: int, second: int) -> Diff:
    """Metrics of two versions, and their scores of the same sampled rows. Raises NotFound, ModelRefused."""
    looked, rows = [], path.samples()
    for number in (first, second):
        label, folder = f"{path.model}/{number}", repository.path(number)
        if not folder.is_dir():
            raise NotFound(f"{label} is not in the repository")
        looked.append(_look(path, repository, folder, label, rows))
    (facts, one), (others, other) = looked
    return Diff(facts, others, None if one is None or other is None else compare(one.scores, other.scores))


def gate_problem(settings: RolloutSettings, metrics: Mapping[str, float]) -> str:
    """Why these metrics are not good enough; "" when they are."""
    for setting, limits, words in (
        ("min_metrics", settings.min_metrics, "at least"),
        ("max_metrics", settings.max_metrics, "at most"),
    ):
        for name, limit in limits.items():
            wanted = f"metrics: {name} of {words} {limit:g} wanted (rollout.{setting})"
            if name not in metrics:
                return f"{wanted}, neither metrics.json nor the model tells it"
            # NaN is neither.
            if not (metrics[name] >= limit if setting == "min_metrics" else metrics[name] <= limit):
                return f"{wanted}, it has {metrics[name]:.4g}"
    return ""


def _look(
    path: ServingPath, repository: Repository, folder: Path, label: str, rows: Rows
) -> tuple[Facts, Tried | None]:
    """What metrics.json and the model say; for schema and commit the model's word comes first."""
    try:
        known = repository.facts(folder)
        if not (folder / GRAPH).is_file():
            return known, None
        tried = try_model(folder / GRAPH, path.contract, rows)
    except ModelRefused as refusal:
        raise ModelRefused(f"{label}: {refusal}") from None
    told = tried.facts
    return Facts(told.schema or known.schema, told.commit or known.commit, {**told.metrics, **known.metrics}), tried
