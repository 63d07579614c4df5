"""Rollouts of a server process that is killed in the middle."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from liverank.v1 import admin_pb2 as pb
from liverank.v1 import admin_pb2_grpc, ingest_pb2, ingest_pb2_grpc, ranking_pb2, ranking_pb2_grpc

from loadtest.processes import Server, start_server
from server.clock import SystemClock
from tests.app import SMALL
from tests.events import event, started
from tests.rollout import AT_ONCE_S, WHY, checked, files_of, lattice_net, settings
from tests.triton_server import eventually


def server_settings(folder: Path) -> dict[str, dict[str, Any]]:
    sections = settings(folder)
    return {
        "table": {**SMALL, "lease_ms": 600_000},
        "scoring": {"mode": "local", "model_repository": str(folder / "models"), "refresh_ms": 100},
        "rank": sections["rank"],
        "rollout": sections["rollout"],
    }


def publish_streams(channel: grpc.Channel) -> None:
    now_ms = SystemClock().now_ms()
    events = []
    for i in range(40):
        events += [started(f"s{i}", 2 * i + 1, now_ms), event(f"s{i}", 2 * i + 2, now_ms, 1, viewer_count={"count": i})]
    list(ingest_pb2_grpc.IngestStub(channel).Publish(iter([ingest_pb2.EventBatch(producer_id="p", events=events)])))


def serves(channel: grpc.Channel, version: str) -> bool:
    reply = ranking_pb2_grpc.RankingStub(channel).Rank(ranking_pb2.RankRequest(viewer_id="v"), timeout=10.0)
    scored = len(reply.streams) > 0 and all(round(s.score * 10_000) != 5_005 for s in reply.streams)
    return scored and reply.model_version == version and checked(reply) == version


def push(version: int) -> pb.PushModelRequest:
    return pb.PushModelRequest(version=version, files=files_of(lattice_net(version)), why=WHY)


def stop(server: Server) -> None:
    if server.process.poll() is None:
        server.process.kill()
        server.process.wait()


def test_a_server_killed_in_a_push_serves_what_it_served_and_can_be_pushed_to_again(tmp_path: Path) -> None:
    wanted, models = server_settings(tmp_path), tmp_path / "models" / "trendiness"
    server = start_server(tmp_path / "server", wanted)
    try:
        with grpc.insecure_channel(server.address) as channel:
            publish_streams(channel)
            eventually(lambda: serves(channel, "trendiness/1"), what="version 1 serves")
            pushing = admin_pb2_grpc.AdminStub(channel).PushModel.future(push(2), timeout=60.0)
            ends_at_s = time.monotonic() + 20.0
            while len(list(models.iterdir())) == 2:  # version 1 and the configuration
                assert time.monotonic() < ends_at_s and not pushing.done(), pushing  # dropped, it would be cancelled
            server.process.kill()
            server.process.wait()
        assert any(path.name.startswith(".push-2") for path in models.iterdir())
        server = start_server(tmp_path / "server", wanted)
        with grpc.insecure_channel(server.address) as channel:
            admin = admin_pb2_grpc.AdminStub(channel)
            eventually(lambda: serves(channel, "trendiness/1"), what="version 1 serves")
            (model,) = admin.ListModels(pb.ListModelsRequest(), timeout=10.0).models
            assert (model.rollout.serving, model.rollout.candidate) == (1, 0)
            assert sorted(path.name for path in models.iterdir()) == ["1", "config.pbtxt"]
            assert admin.PushModel(push(2), timeout=60.0).rollout.candidate == 2
            for percent in (1, 10, 100):
                admin.CanaryModel(pb.CanaryModelRequest(version=2, percent=percent, why=WHY), timeout=10.0)
            eventually(lambda: serves(channel, "trendiness/2"), what="the canary serves")
        server.process.kill()  # without a word to anybody
        server.process.wait()
        server = start_server(tmp_path / "server", wanted)
        with grpc.insecure_channel(server.address) as channel:
            eventually(lambda: serves(channel, "trendiness/2"), what="the canary goes on")
            admin = admin_pb2_grpc.AdminStub(channel)
            rollout = admin.RollbackModel(pb.RollbackModelRequest(why=WHY), timeout=AT_ONCE_S).rollout
            assert rollout.serving == 1 and serves(channel, "trendiness/1")
            with pytest.raises(grpc.RpcError, match="no version before"):
                admin.RollbackModel(pb.RollbackModelRequest(why=WHY), timeout=10.0)
    finally:
        stop(server)
