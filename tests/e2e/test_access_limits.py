"""Limits per client: rates, open streams, the size of an answer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from liverank.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    ingest_pb2,
    ingest_pb2_grpc,
    liveness_pb2,
    liveness_pb2_grpc,
    ranking_pb2,
    ranking_pb2_grpc,
)

from tests.app import serving_app, status_of
from tests.secured import TOKENS, Publisher, allowed, channel, write_access
from tests.triton_server import eventually


def pushback_ms(error: grpc.RpcError) -> int:
    return int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"])  # type: ignore[attr-defined]


def test_a_client_that_asks_too_often_is_told_when_to_come_back_and_others_are_not_slowed(tmp_path: Path) -> None:
    access = write_access(tmp_path / "access.toml", "reader", "admin", "producer", producer_ids=["*"])
    limits = {"access_file": str(access), "requests_per_second": 0.05, "burst_s": 60.0}  # three at once
    with serving_app(tmp_path, security=limits) as app:
        with channel(app.port, TOKENS["reader"]) as made:
            stub = ranking_pb2_grpc.RankingStub(made)
            stub.Rank(ranking_pb2.RankRequest(), timeout=10.0)
            stub.RankBatch(ranking_pb2.RankBatchRequest(requests=[ranking_pb2.RankRequest()] * 4), timeout=10.0)
            with pytest.raises(grpc.RpcError) as refused:  # the batch has overdrawn the bucket
                stub.Rank(ranking_pb2.RankRequest(), timeout=10.0)
            code, told = status_of(refused.value)
            assert code == "RESOURCE_EXHAUSTED" and "token:reader: more than 0.05 requests per second" in told
            assert 40_000 < pushback_ms(refused.value) <= 60_000
        with channel(app.port, TOKENS["admin"]) as made:
            admin_pb2_grpc.AdminStub(made).Status(admin_pb2.StatusRequest(), timeout=10.0)
        with channel(app.port, TOKENS["producer"]) as made:
            publisher = Publisher(made)
            for _ in range(3):
                publisher.send(producer="p")
            with pytest.raises(grpc.RpcError) as refused:
                publisher.send(producer="p")
            assert status_of(refused.value)[0] == "RESOURCE_EXHAUSTED" and pushback_ms(refused.value) > 0
        with channel(app.port, "reader.guess") as made:  # guessing is limited by address
            codes = []
            for _ in range(4):
                with pytest.raises(grpc.RpcError) as refused:
                    ranking_pb2_grpc.RankingStub(made).Rank(ranking_pb2.RankRequest(), timeout=10.0)
                codes.append(status_of(refused.value)[0])
            assert codes == ["UNAUTHENTICATED"] * 3 + ["RESOURCE_EXHAUSTED"]
            assert health_pb2_grpc.HealthStub(made).Check(health_pb2.HealthCheckRequest(), timeout=10.0).status == 1


def test_an_entry_has_its_own_rate_and_without_access_file_the_address_counts(tmp_path: Path) -> None:
    access = write_access(tmp_path / "access.toml", "reader", requests_per_second=0)
    limits: dict[str, Any] = {"requests_per_second": 0.001, "burst_s": 1.0}
    with serving_app(tmp_path, security={**limits, "access_file": str(access)}) as app:
        assert all(allowed(app, "reader") for _ in range(5))
    with serving_app(tmp_path, security=limits) as app, channel(app.port) as made:
        check = liveness_pb2_grpc.LivenessStub(made).CheckLive
        check(liveness_pb2.CheckLiveRequest(), timeout=10.0)
        with pytest.raises(grpc.RpcError, match=r"peer:127\.0\.0\.1: more than 0\.001"):
            check(liveness_pb2.CheckLiveRequest(), timeout=10.0)


def test_open_streams_are_limited_per_client(tmp_path: Path) -> None:
    access = write_access(tmp_path / "access.toml", "reader", "producer", producer_ids=["*"])
    limits = {"access_file": str(access), "max_open_streams_per_client": 2}
    with contextlib.ExitStack() as stack:
        app = stack.enter_context(serving_app(tmp_path, security=limits))
        made, other = (stack.enter_context(channel(app.port, TOKENS[name])) for name in ("producer", "reader"))
        first, second = Publisher(made), Publisher(made)
        assert first.send(producer="a") and second.send(producer="b")
        third = Publisher(made)
        with pytest.raises(grpc.RpcError, match="token:producer: 2 streaming calls are open already") as refused:
            third.send(producer="c")
        assert status_of(refused.value)[0] == "RESOURCE_EXHAUSTED"
        watch = liveness_pb2_grpc.LivenessStub(other).WatchEnded(liveness_pb2.WatchEndedRequest())
        watch.initial_metadata()
        first.close()
        eventually(lambda: app.gate._open["token:producer"] == 1, what="the first is over")
        fourth = Publisher(made)
        assert fourth.send(producer="d")
        for publisher in (second, third, fourth):
            publisher.close()


def test_a_batch_whose_answer_could_not_be_sent_is_refused_before_it_is_ranked(tmp_path: Path) -> None:
    with serving_app(tmp_path, serve={"max_message_bytes": 4_000}) as app, channel(app.port) as made:
        stub = ranking_pb2_grpc.RankingStub(made)
        one = ranking_pb2.RankRequest(limit=10)
        stub.RankBatch(ranking_pb2.RankBatchRequest(requests=[one] * 10), timeout=10.0)
        with pytest.raises(grpc.RpcError, match="requests: limits of 110 streams in all; at most 100 fit") as refused:
            stub.RankBatch(ranking_pb2.RankBatchRequest(requests=[one] * 11), timeout=10.0)
        assert status_of(refused.value)[0] == "INVALID_ARGUMENT"


def test_a_message_beyond_the_limit_is_refused_unread_on_every_way_in_and_harms_no_other(tmp_path: Path) -> None:
    with serving_app(tmp_path, serve={"max_message_bytes": 4_000}) as app, channel(app.port) as made:
        ranking, liveness = ranking_pb2_grpc.RankingStub(made), liveness_pb2_grpc.LivenessStub(made)
        large = "x" * 5_000
        calls: list[Callable[[], object]] = [
            lambda: ranking.Rank(ranking_pb2.RankRequest(request_id=large), timeout=10.0),
            lambda: liveness.CheckLive(liveness_pb2.CheckLiveRequest(streams=[{"stream_id": large}]), timeout=10.0),
            lambda: list(
                ingest_pb2_grpc.IngestStub(made).Publish(iter([ingest_pb2.EventBatch(producer_id=large)]), timeout=10.0)
            ),
        ]
        for call in calls:
            with pytest.raises(grpc.RpcError) as refused:
                call()
            code, told = status_of(refused.value)
            assert code == "RESOURCE_EXHAUSTED" and "larger than max" in told
        ranking.Rank(ranking_pb2.RankRequest(), timeout=10.0)
