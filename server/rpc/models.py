"""Admin: other versions of a model into service. Messages in, steps of `Shipping`, messages out."""

from __future__ import annotations

import math

import grpc
from liverank.v1 import admin_pb2 as pb

from server.errors import InvalidRequest
from server.recorder import Recorder
from server.rollout.agreement import Agreement
from server.rollout.guard import Viewers
from server.rollout.listing import Listing
from server.rollout.repository import Facts
from server.rollout.shipping import Shipping
from server.rollout.state import MAX_VERSION, Stage
from server.rpc.auth import caller
from server.rpc.decode import check_short
from server.rpc.status import guarded

MAX_WHY_BYTES = 512
MAX_HISTORY = 1_000


class ModelMethods:
    """The methods of Admin about models; `AdminService` has them."""

    recorder: Recorder
    _shipping: Shipping

    @guarded
    def PushModel(self, request: pb.PushModelRequest, context: grpc.ServicerContext) -> pb.PushModelResponse:
        model = self._checked(request.model, request.version, request.why)
        files = {file.name: file.content for file in request.files}
        if len(files) < len(request.files):
            raise InvalidRequest("files", "each name once wanted")
        facts = self._shipping.push(model, request.version, files, caller().name, request.why)
        return pb.PushModelResponse(rollout=self._rollout(model), version=_version(request.version, facts))

    @guarded
    def ShadowModel(self, request: pb.ShadowModelRequest, context: grpc.ServicerContext) -> pb.RolloutResponse:
        model = self._checked(request.model, request.version, request.why)
        self._shipping.shadow(model, request.version, request.percent or 100.0, caller().name, request.why)
        return pb.RolloutResponse(rollout=self._rollout(model))

    @guarded
    def CanaryModel(self, request: pb.CanaryModelRequest, context: grpc.ServicerContext) -> pb.RolloutResponse:
        model = self._checked(request.model, request.version, request.why)
        who = caller().name
        self._shipping.canary(model, request.version, request.percent, request.hold_ms, who, request.why)
        return pb.RolloutResponse(rollout=self._rollout(model))

    @guarded
    def PromoteModel(self, request: pb.PromoteModelRequest, context: grpc.ServicerContext) -> pb.RolloutResponse:
        model = self._checked(request.model, request.version, request.why)
        self._shipping.promote(model, request.version, request.force, caller().name, request.why)
        return pb.RolloutResponse(rollout=self._rollout(model))

    @guarded
    def RollbackModel(self, request: pb.RollbackModelRequest, context: grpc.ServicerContext) -> pb.RolloutResponse:
        model = self._checked(request.model, 1, request.why)
        self._shipping.rollback(model, caller().name, request.why)
        return pb.RolloutResponse(rollout=self._rollout(model))

    @guarded
    def ListModels(self, request: pb.ListModelsRequest, context: grpc.ServicerContext) -> pb.ListModelsResponse:
        if request.history > MAX_HISTORY:
            raise InvalidRequest("history", f"at most {MAX_HISTORY} wanted, got {request.history}")
        names = [request.model] if request.model else self._shipping.models
        return pb.ListModelsResponse(models=[_model(self._shipping.listing(name, request.history)) for name in names])

    @guarded
    def DiffModels(self, request: pb.DiffModelsRequest, context: grpc.ServicerContext) -> pb.DiffModelsResponse:
        model = self._named(request.model)
        found = self._shipping.diff(model, request.first, request.second)
        return pb.DiffModelsResponse(
            first=_version(request.first, found.first),
            second=_version(request.second, found.second),
            agreement=_agreement(found.agreement) if found.agreement else None,
        )

    def _named(self, model: str) -> str:
        """The model meant; without a name, the only one there is."""
        names = self._shipping.models
        if not model and len(names) > 1:
            raise InvalidRequest("model", f"one of {', '.join(names)} wanted, got none")
        return model or names[0]

    def _checked(self, model: str, version: int, why: str) -> str:
        if not 1 <= version <= MAX_VERSION:
            raise InvalidRequest("version", f"1 to {MAX_VERSION} wanted, got {version}")
        if not why.strip():
            raise InvalidRequest("why", "a reason wanted; the audit log keeps it")
        check_short("why", why, MAX_WHY_BYTES)
        return self._named(model)

    def _rollout(self, model: str) -> pb.Rollout:
        return _model(self._shipping.listing(model, 0)).rollout


def _model(listing: Listing) -> pb.Model:
    rollout, trial = listing.rollout, listing.trial
    told = pb.Model(
        rollout=pb.Rollout(
            model=listing.model,
            serving=rollout.serving,
            previous=rollout.previous,
            candidate=rollout.candidate,
            stage=str(rollout.stage),
            percent=rollout.percent,
            hold_ms=rollout.hold_ms,
            since_ms=rollout.since_ms,
            answering=listing.answering,
        ),
        versions=[_version(v.version, v.facts, v.roles, v.problem) for v in listing.versions],
        history=[
            pb.AuditEntry(
                at=entry["at"], who=entry["who"], step=entry["what"], outcome=entry["outcome"],
                version=entry.get("version", 0), why=entry.get("why", ""), detail=entry.get("detail", ""),
            )
            for entry in listing.history
        ],
    )  # fmt: skip
    if rollout.stage in (Stage.SHADOW, Stage.CANARY):
        serving_s, candidate_s = trial.latency_s
        told.trial.CopyFrom(
            pb.Trial(
                refreshes=trial.refreshes,
                failures=trial.failures,
                last_failure=trial.last_failure,
                agreement=_agreement(trial.agreement) if trial.agreement else None,
                drift=trial.drift,
                serving_seconds=serving_s,
                candidate_seconds=candidate_s,
                viewers_served=listing.served,
                faults=listing.faults,
                serving=_seen(listing.serving),
                candidate=_seen(listing.candidate),
            )
        )
    return told


def _version(number: int, facts: Facts, roles: tuple[str, ...] = (), problem: str = "") -> pb.ModelVersion:
    metrics = {name: value for name, value in facts.metrics.items() if math.isfinite(value)}
    return pb.ModelVersion(
        version=number, roles=roles, feature_schema=facts.schema, commit=facts.commit, metrics=metrics, problem=problem
    )


def _agreement(found: Agreement) -> pb.Agreement:
    return pb.Agreement(
        rows=found.rows,
        rank_correlation=found.rank_correlation,
        top10=found.top10,
        top100=found.top100,
        mean_serving=found.mean_serving,
        mean_candidate=found.mean_candidate,
        calibration_gap=found.calibration_gap,
    )


def _seen(viewers: Viewers) -> pb.ViewersSeen:
    return pb.ViewersSeen(impressions=viewers.impressions, dead=viewers.dead)
