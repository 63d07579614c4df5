"""A whole server whose table, features, rules and slates are worked out by the GPU's kernels.

On a machine without a GPU the kernels run in Triton's interpreter, everything else is as it is on one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from liverank.v1 import admin_pb2, ranking_pb2

from server.ranking.pipeline_gpu import GpuPipeline
from server.scoring.order import rank_rows
from tests.app import SMALL, Client, running_app
from tests.device import INTERPRETED
from tests.events import event, started
from tests.triton_server import eventually

SECTIONS = {
    "table": {**SMALL, "capacity": 64},
    "serve": {"port": 0, "metrics_port": 0, "max_batch_rows": 1},
    "retrieval": {
        "engine": "exact_gpu",
        "personal": 8,
        "trending": 8,
        "trending_per_group": 1,
        "followed": 2,
        "fresh": 2,
    },
    "rank": {"max_limit": 8, "default_limit": 5, "reserve": 2},
    "device": {"kind": "cpu" if INTERPRETED else "cuda"},
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with running_app(tmp_path_factory.mktemp("gpu"), **SECTIONS) as client:
        assert isinstance(client.app.engine.pipeline, GpuPipeline)
        client.publish(
            *(started(f"s{i}", 0, embedding=[1.0, 0.1 * i, 0.0, 0.0]) for i in range(6)),
            *(event(f"s{i}", 0, viewer_count={"count": 10 * i}) for i in range(6)),
        )
        yield client


def on_host(client: Client) -> dict[str, float]:
    """Requests ranked on the host so far, by reason."""
    family = next(iter(client.app.metrics.host_ranked.collect()))
    return {s.labels["reason"]: s.value for s in family.samples if s.name.endswith("_total") and s.value}


def test_streams_are_ranked_on_the_device_and_the_reply_says_all_it_says_on_the_host(client: Client) -> None:
    client.tick()
    reply = client.rank(request_id="r", viewer_embedding=[1.0, 0.0, 0.0, 0.0], limit=4)
    assert len(reply.streams) == 4 and {s.epoch for s in reply.streams} == {1}
    assert all(s.verify_by_ms > reply.as_of_ms and s.sources for s in reply.streams)
    assert reply.applied_offset >= 1 and reply.model_version == "trendiness/1"
    assert on_host(client) == {}


def test_an_acknowledged_end_is_not_in_the_next_reply(client: Client) -> None:
    before = {s.stream_id for s in client.rank(limit=8).streams}
    assert "s3" in before
    client.publish(event("s3", 0, epoch=1, ended={}))
    assert {s.stream_id for s in client.rank(limit=8).streams} == before - {"s3"}


def test_a_block_hides_a_stream_at_once_and_explain_says_why(client: Client) -> None:
    client.admin.BlockStream(admin_pb2.BlockStreamRequest(stream_id="s1", reason="test"), timeout=10.0)
    assert "s1" not in {s.stream_id for s in client.rank(limit=8).streams}
    request = ranking_pb2.ExplainRequest(request=ranking_pb2.RankRequest(limit=8), stream_id="s1")
    assert client.ranking.Explain(request, timeout=10.0).not_shown_reason == "rule:blocked"


def test_a_restart_recovers_what_the_device_had_counted(tmp_path: Path) -> None:
    with running_app(tmp_path, **SECTIONS) as first:
        first.publish(started("s", 0), event("s", 0, viewer="v", chatted={"count": 3}))
        first.tick()
        table = first.app.engine.table
        counters = first.app.engine.call(lambda: table.accumulators.column("counters")[0].copy()).result(10.0)
    with running_app(tmp_path, first.clock, **SECTIONS) as second:
        table = second.app.engine.table
        again = second.app.engine.call(lambda: table.accumulators.column("counters")[0].copy()).result(10.0)
        assert counters.any() and (counters == again).all()


def test_a_batch_is_finished_after_the_next_was_started_and_none_is_left_behind(client: Client) -> None:
    engine, pipeline = client.app.engine, client.app.engine.pipeline
    steps: list[str] = []
    held, release = threading.Event(), threading.Event()

    def noted(name: str, step: Any) -> Any:
        def call(*arguments: Any) -> Any:
            steps.append(name)
            return step(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "start", noted("start", pipeline.start))
        patch.setattr(pipeline, "finish", noted("finish", pipeline.finish))
        engine.call(lambda: (held.set(), release.wait(10.0)))
        assert held.wait(10.0)
        calls = [client.ranking.Rank.future(ranking_pb2.RankRequest(limit=2), timeout=10.0) for _ in range(3)]
        eventually(lambda: engine.queued_rows == 3)
        release.set()
        assert all(len(call.result().streams) == 2 for call in calls)
    assert steps == ["start", "start", "finish", "start", "finish", "finish"]


def test_a_canary_is_ranked_on_the_host_and_a_promotion_reaches_the_device(client: Client) -> None:
    engine = client.app.engine
    client.tick()
    client.app._refresher.close()  # the model that it asks is still the first one
    used = engine.answerer.scores
    assert used.scores is not None
    scores = np.float32(1.0) - used.scores
    other = replace(used, scores=scores, order=rank_rows(scores, used.slots, None), model_version="trendiness/2")

    def begin() -> None:
        engine.answerer.try_candidate("trendiness/2")
        assert engine.answerer.candidate.take(other)
        engine.answerer.candidate.share = 1.0

    assert client.rank(limit=3).model_version == "trendiness/1"
    engine.call(begin).result(10.0)
    before = on_host(client).get("canary", 0)
    assert client.rank(limit=3).model_version == "trendiness/2"
    assert on_host(client)["canary"] == before + 1
    engine.call(lambda: engine.answerer.replace_scores(other, used.turn)).result(10.0)
    assert client.rank(limit=3).model_version == "trendiness/2"
    assert on_host(client)["canary"] == before + 1, "the device ranks by it now"
    pipeline = engine.pipeline
    assert isinstance(pipeline, GpuPipeline)
    on_device = engine.call(lambda: pipeline._queue.device.to_host(pipeline._queue.device.tensors["trend"])).result(
        10.0
    )
    np.testing.assert_array_equal(on_device[used.slots], scores)
