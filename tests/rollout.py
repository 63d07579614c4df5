"""Two models whose every score tells which of them gave it, and a server that shows scores as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from liverank.v1 import admin_pb2, ranking_pb2
from liverank.v1 import admin_pb2 as pb

from loadtest.faults.nets import is_odd, on_lattice, put_model, small_net
from server.rollout.shipping import PUSH_WAIT_S
from tests.app import FEATURES, Client
from tests.events import event, started
from tests.triton_server import eventually

RULES = """
[surface.default]
trend_weight = 1.0
similarity_weight = 0.0
followed_bonus = 0.0
fresh_bonus = 0.0
boost_weight = 0.0
cold_start_trend = 0.5005
diversity = 0.0
creator_cap = 0
category_share = 1.0
exploration_share = 0.0
"""
METRICS = {"auc": 0.8}
WHY = "it is better"
MODEL = "trendiness"
AT_ONCE_S = PUSH_WAIT_S - 1.0
"""Of a rollback: whoever waits for a push, a load or the rest of a start takes longer, even on a busy machine."""


def lattice_net(version: int, seed: int = 1) -> onnx.ModelProto:
    """Odd versions score on the odd lattice. Weights are small, so that real features do not saturate it."""
    model = small_net(seed, len(FEATURES))
    for tensor in model.graph.initializer:
        if tensor.name == "w1":
            weights = onnx.numpy_helper.to_array(tensor) * np.float32(0.02)
            tensor.CopyFrom(onnx.numpy_helper.from_array(weights, "w1"))
    on_lattice(model, version % 2 == 1, FEATURES.schema, METRICS)
    return model


def put_lattice(repository: Path, version: int = 1, seed: int = 1) -> None:
    put_model(
        repository, MODEL, lattice_net(version, seed), version, FEATURES.schema, len(FEATURES)
    )  # fmt: skip


def files_of(model: onnx.ModelProto | bytes, facts: bytes = b"") -> list[admin_pb2.ModelFile]:
    """What a push sends."""
    content = model if isinstance(model, bytes) else model.SerializeToString()
    files = [admin_pb2.ModelFile(name="model.onnx", content=content)]
    return [*files, admin_pb2.ModelFile(name="metrics.json", content=facts)] if facts else files


def settings(folder: Path, **rollout: Any) -> dict[str, dict[str, Any]]:
    """Sections for `serving_app`; makes repository and rules in ``folder``."""
    if not (folder / "models").exists():
        put_lattice(folder / "models")
    (folder / "rules.toml").write_text(RULES)
    unhurried = {"latency_floor_ms": 60_000}  # a busy machine ends no canary of a test about something else
    return {"rank": {"rules_file": str(folder / "rules.toml")}, "rollout": {**unhurried, **rollout}}


def some_streams(client: Client, count: int = 60) -> None:
    """Live, each with another crowd, and scored."""
    now_ms = client.clock.now_ms()
    for i in range(count):
        client.publish(started(f"s{i}", 0, now_ms), event(f"s{i}", 0, now_ms, 1, viewer_count={"count": 10 + 37 * i}))
    client.tick()
    assert client.app.engine.answerer.scores.model_version


def versions_of(reply: ranking_pb2.RankResponse) -> set[str]:
    """Which models gave the scores of a reply."""
    return {{True: "odd", False: "even", None: "neither"}[is_odd(stream.score)] for stream in reply.streams}


def checked(reply: ranking_pb2.RankResponse) -> str:
    """The version that a reply names, after making sure that it alone scored every stream in it."""
    version = reply.model_version
    parity = "odd" if int(version.partition("/")[2]) % 2 else "even"
    assert len(reply.streams) > 0 and versions_of(reply) == {parity}, (version, [s.score for s in reply.streams])
    return version


def refreshed(client: Client, times: int = 1) -> None:
    """So many refreshes that a candidate, too, has scored."""
    path = client.app.shipping._paths[MODEL]
    trial = path.trial

    def is_idle() -> bool:
        return path._work_left is None

    for _ in range(times):
        eventually(is_idle, what="the candidate can take rows")  # or it passes these over
        before = trial.refreshes + trial.failures
        client.tick()
        eventually(is_idle, what="the candidate has scored")
        assert trial.refreshes + trial.failures == before + 1 and path.trial is trial


def push(client: Client, version: int = 2, **given: object) -> pb.PushModelResponse:
    wanted = {"files": files_of(lattice_net(version)), "why": WHY, **given}
    return client.admin.PushModel(pb.PushModelRequest(version=version, **wanted), timeout=60.0)


def served(client: Client, viewers: int = 200) -> dict[str, str]:
    """The version of each viewer's reply; every reply is checked for mixed versions."""
    requests = [ranking_pb2.RankRequest(viewer_id=f"v{i}", limit=30) for i in range(viewers)]
    replies = client.ranking.RankBatch(ranking_pb2.RankBatchRequest(requests=requests), timeout=10.0).responses
    return {request.viewer_id: checked(reply) for request, reply in zip(requests, replies, strict=True)}


def listed(client: Client, history: int = 50) -> pb.Model:
    return client.admin.ListModels(pb.ListModelsRequest(history=history), timeout=10.0).models[0]


def ended(client: Client) -> pb.AuditEntry:
    """Waits until the canary was rolled back; the entry that says so."""
    eventually(lambda: listed(client).history[-1].step == "rollback", what="the canary ended")
    assert listed(client).rollout.candidate == 0
    return listed(client).history[-1]


def canary(client: Client, percent: float, version: int = 2, **given: object) -> pb.Rollout:
    request = pb.CanaryModelRequest(version=version, percent=percent, why=WHY, **given)
    return client.admin.CanaryModel(request, timeout=10.0).rollout
