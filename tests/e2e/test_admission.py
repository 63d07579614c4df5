"""Admission over real gRPC: refusals without work, priorities, quality in replies, and what must get through."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from liverank.v1 import liveness_pb2, ranking_pb2

from tests.app import Client, running_app, status_of
from tests.events import event, started
from tests.triton_server import eventually

HINT = "grpc-retry-pushback-ms"
HELD = {"min_limit": 4, "hold_ms": 600_000}
BATCH = (("liverank-priority", "batch"),)


def overload(client: Client) -> None:
    """As after a while of overload: quality at its floor, the limit at its least."""
    admission = client.app.engine.admission
    admission._quality.answered(0, 1_000)
    admission._quality.hold()
    admission._limit.value = 4.0
    admission._limit._most = 4


@contextmanager
def busy_engine(client: Client) -> Iterator[None]:
    """The engine thread is held up."""
    held, release = threading.Event(), threading.Event()
    client.app.engine.call(lambda: (held.set(), release.wait(20.0)))
    assert held.wait(10.0)
    try:
        yield
    finally:
        release.set()


def metric(client: Client, name: str, **labels: str) -> float:
    return client.app.metrics.registry.get_sample_value(name, labels) or 0.0


def test_over_the_limit_calls_are_refused_with_a_hint_and_those_let_in_are_answered(tmp_path: Path) -> None:
    with running_app(tmp_path, admission=HELD) as client:
        client.publish(started("s", 0))
        client.tick()
        overload(client)
        with busy_engine(client):
            waiting = [client.ranking.Rank.future(ranking_pb2.RankRequest(), timeout=20.0) for _ in range(4)]
            eventually(lambda: client.app.engine.queued_rows == 4, what="the limit is reached")
            for _ in range(40):
                with pytest.raises(grpc.RpcError) as refused:
                    client.rank()
                assert status_of(refused.value)[0] == "RESOURCE_EXHAUSTED"
                assert int(dict(refused.value.trailing_metadata())[HINT]) > 0
            assert client.app.engine.queued_rows == 4
        assert all([s.stream_id for s in call.result().streams] == ["s"] for call in waiting)
        assert metric(client, "liverank_shed_total", reason="limit", priority="interactive") == 40
        assert metric(client, "liverank_rpc_errors_total", method="Rank", code="RESOURCE_EXHAUSTED") == 40
        assert client.rank().streams


def test_a_client_that_floods_does_not_take_the_place_of_another(tmp_path: Path) -> None:
    with running_app(tmp_path, admission=HELD) as client:
        client.publish(started("s", 0))
        client.tick()
        overload(client)
        own = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(f"127.0.0.1:{client.app.port}", options=own) as other:
            with busy_engine(client):
                flood = [client.ranking.Rank.future(ranking_pb2.RankRequest(), timeout=20.0) for _ in range(100)]
                eventually(lambda: sum(call.done() for call in flood) >= 90, what="most of the flood is refused")
                ask = other.unary_unary("/liverank.v1.Ranking/Rank")
                quiet = ask.future(b"", timeout=20.0)
                eventually(lambda: quiet.done() or client.app.engine.queued_rows > 4, what="judged")
                assert not quiet.done(), "it got a place although the limit is reached"
            assert ranking_pb2.RankResponse.FromString(quiet.result()).streams
        assert metric(client, "liverank_shed_total", reason="limit", priority="interactive") >= 90


@pytest.mark.parametrize("how", ["metadata", "method"])
def test_batch_calls_are_shed_while_interactive_ones_are_still_let_in(tmp_path: Path, how: str) -> None:
    with running_app(tmp_path, admission=HELD) as client:
        overload(client)

        def ask_batch() -> Any:
            if how == "metadata":
                return client.ranking.Rank(ranking_pb2.RankRequest(), timeout=10.0, metadata=BATCH)
            requests = [ranking_pb2.RankRequest()]
            return client.ranking.RankBatch(ranking_pb2.RankBatchRequest(requests=requests), timeout=10.0)

        ask_batch()
        with busy_engine(client):
            waiting = [client.ranking.Rank.future(ranking_pb2.RankRequest(), timeout=20.0) for _ in range(2)]
            eventually(lambda: client.app.engine.queued_rows == 2, what="half the limit is taken")
            with pytest.raises(grpc.RpcError) as refused:
                ask_batch()
            assert status_of(refused.value)[0] == "RESOURCE_EXHAUSTED"
            assert int(dict(refused.value.trailing_metadata())[HINT]) > 0
            waiting.append(client.ranking.Rank.future(ranking_pb2.RankRequest(), timeout=20.0))
            eventually(lambda: client.app.engine.queued_rows == 3, what="an interactive call is let in")
        assert all(call.result() for call in waiting)
        assert metric(client, "liverank_shed_total", reason="batch_first", priority="batch") == 1


def test_health_liveness_ends_and_ingest_get_through_while_every_place_of_rank_is_taken(tmp_path: Path) -> None:
    with running_app(tmp_path, serve={"port": 0, "metrics_port": 0, "max_rank_calls": 4}) as client:
        client.publish(started("s", 0), started("t", 0))
        client.tick()
        health = health_pb2_grpc.HealthStub(client.channel)
        ended = client.liveness.WatchEnded(liveness_pb2.WatchEndedRequest(), timeout=20.0)
        with busy_engine(client):
            ranks = [client.ranking.Rank.future(ranking_pb2.RankRequest(), timeout=20.0) for _ in range(60)]
            eventually(lambda: client.app.engine.queued_rows >= 4, what="all places of Rank are taken")
            reply = health.Check(health_pb2.HealthCheckRequest(service="liverank.v1.Ranking"), timeout=5.0)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
            asked = liveness_pb2.CheckLiveRequest(streams=[{"stream_id": "s"}])
            live = client.liveness.CheckLive.future(asked, timeout=20.0)
        assert live.result().streams[0].showable
        assert client.publish(event("t", 0, epoch=1, ended={})).accepted == 1
        assert next(ended).stream_id == "t"
        codes = {call.code() if call.exception() else grpc.StatusCode.OK for call in ranks}
        assert codes <= {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}


def test_under_pressure_fewer_candidates_are_scored_the_slate_stays_full_and_the_reply_says_so(tmp_path: Path) -> None:
    with running_app(tmp_path, admission=HELD) as client:
        client.publish(*(started(f"s{i}", 0, embedding=[1.0, float(i), 0.5, 0.25], language="en") for i in range(200)))
        client.tick()
        request = {"viewer_embedding": [1.0, 2.0, 3.0, 4.0], "limit": 20}
        whole = client.rank(**request)
        assert not whole.degradation.HasField("quality") and not whole.degradation.reasons
        proposed = {n: metric(client, "liverank_source_candidates_total", source=n) for n in whole.source_names}
        overload(client)
        reply = client.rank(**request)
        assert reply.degradation.quality == 0.25 and reply.degradation.level == ranking_pb2.Degradation.NONE
        assert any("overload: 25%" in reason for reason in reply.degradation.reasons)
        assert len(reply.streams) == 20
        for name in ("personal", "trending"):
            now = metric(client, "liverank_source_candidates_total", source=name) - proposed[name]
            assert 0 < now <= 0.6 * proposed[name], name
        client.tick()
        client.app.engine.call(client.app.engine._tick).result(10.0)
        assert metric(client, "liverank_quality_factor") == 0.25 and metric(client, "liverank_admission_limit") == 4


def test_waits_are_measured_from_arrival_by_priority(tmp_path: Path) -> None:
    with running_app(tmp_path) as client:
        with busy_engine(client):
            waiting = client.ranking.Rank.future(ranking_pb2.RankRequest(), timeout=10.0)
            eventually(lambda: client.app.engine.queued_rows == 1, what="it waits")
        waiting.result()
        client.ranking.Rank(ranking_pb2.RankRequest(), timeout=10.0, metadata=BATCH)
        for priority in ("interactive", "batch"):
            assert metric(client, "liverank_queue_wait_seconds_count", priority=priority) == 1
        assert metric(client, "liverank_queue_wait_seconds_sum", priority="interactive") > 0


def test_a_request_with_a_far_deadline_does_not_hold_up_one_with_a_near_one(tmp_path: Path) -> None:
    with running_app(tmp_path, serve={"port": 0, "metrics_port": 0, "max_batch_rows": 1}) as client:
        order: list[str] = []
        original = client.app.engine.pipeline.start

        def watched(batch: Any, quality: float = 1.0) -> Any:
            order.extend(request.request_id for request in batch.requests)
            return original(batch, quality)

        client.app.engine.pipeline.start = watched  # type: ignore[method-assign]
        own = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(f"127.0.0.1:{client.app.port}", options=own) as other:
            hurried = other.unary_unary("/liverank.v1.Ranking/Rank")
            with busy_engine(client):
                far = [
                    client.ranking.Rank.future(ranking_pb2.RankRequest(request_id=f"far{i}"), timeout=20.0)
                    for i in range(3)
                ]
                eventually(lambda: client.app.engine.queued_rows == 3, what="three wait")
                near = hurried.future(ranking_pb2.RankRequest(request_id="near").SerializeToString(), timeout=15.0)
                eventually(lambda: client.app.engine.queued_rows == 4, what="four wait")
            assert near.result() and all(call.result() for call in far)
        assert order[0] == "near"


def test_while_quality_is_low_views_are_built_for_fewer_ticks_and_what_ended_since_is_not_shown(tmp_path: Path) -> None:
    with running_app(tmp_path, admission=HELD) as client:
        client.publish(started("ends", 0), started("stays", 0))
        client.tick()
        engine = client.app.engine

        def new_views_in_eight_ticks() -> int:
            views = [engine.pipeline.snapshot, *(engine._tick() or engine.pipeline.snapshot for _ in range(8))]
            return sum(before is not view for before, view in pairwise(views))

        assert engine.call(new_views_in_eight_ticks).result(20.0) == 8
        overload(client)
        assert engine.call(new_views_in_eight_ticks).result(20.0) == 2
        client.publish(event("ends", 1, epoch=1, ended={}))
        assert [stream.stream_id for stream in client.rank().streams] == ["stays"]
