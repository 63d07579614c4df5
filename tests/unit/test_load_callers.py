"""What a load's callers send, and that a dead stream in a reply is noticed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from liverank.v1 import liveness_pb2, ranking_pb2

from loadtest.load.callers import CHECK_LIVE, CHECKED_STREAMS, RANK, RANK_BATCH, Callers
from loadtest.load.fleet import Fleet
from loadtest.load.scenario import parse_scenario


@pytest.fixture
def callers() -> Iterator[Callers]:
    phases: list[dict[str, Any]] = [
        {"name": "one", "duration_s": 10, "calls_per_s": 100, "rank_batch_share": 0.2, "batch_viewers": 150,
         "check_live_share": 0.3, "regions": {"DE": 3, "": 1}},
        {"name": "two", "duration_s": 10, "calls_per_s": 100, "check_live_share": 0.0, "regions": {"US": 1}},
    ]  # fmt: skip
    viewers = {"count": 100, "limit": 7, "filtered_share": 0.5, "zipf": 1.2}
    scenario = parse_scenario({"name": "t", "phase": phases, "viewers": viewers}, "t")
    fleet = Fleet("f", 1_000, 4, 1.0, np.random.default_rng(0))
    fleet.starts(30, 1_000)
    ended_at = {"f-1": 100.0}
    with grpc.insecure_channel("127.0.0.1:1") as channel:
        yield Callers(channel, scenario, scenario.calls.due_s(), fleet, ended_at, np.random.default_rng(0))


def test_kinds_and_regions_are_those_of_the_phase_in_which_a_call_is_due(callers: Callers) -> None:
    first, second = callers.kind[:1_000], callers.kind[1_000:]
    for kind, share in ((RANK, 0.5), (RANK_BATCH, 0.2), (CHECK_LIVE, 0.3)):
        assert np.mean(first == kind) == pytest.approx(share, abs=0.05)
    assert np.all(second == RANK)
    asked = [ranking_pb2.RankRequest.FromString(callers._rank_request(i, callers._viewer[i])) for i in range(2_000)]
    assert {r.region for r in asked[1_000:]} == {"US"}
    assert np.mean([r.region == "DE" for r in asked[:1_000]]) == pytest.approx(0.75, abs=0.05)
    assert {r.limit for r in asked} == {7} and {len(r.viewer_embedding) for r in asked} == {64}
    counts = np.bincount([int(r.viewer_id.removeprefix("viewer-")) for r in asked], minlength=100)
    assert counts[0] > 5 * counts[20:].mean(), "some ask more often than others"


def test_a_batch_is_a_valid_request_of_as_many_viewers_as_the_phase_wants(callers: Callers) -> None:
    number = int(np.flatnonzero(callers.kind == RANK_BATCH)[0])
    batch = ranking_pb2.RankBatchRequest.FromString(callers._batch_request(number))
    assert len(batch.requests) == 150 and len({r.viewer_id for r in batch.requests}) == 100
    check = liveness_pb2.CheckLiveRequest.FromString(callers._check_request(number))
    assert len(check.streams) == CHECKED_STREAMS and all(ref.stream_id.startswith("f-") for ref in check.streams)


def test_a_stream_in_a_reply_to_a_request_sent_after_its_acknowledged_end_is_noticed(callers: Callers) -> None:
    rank = int(np.flatnonzero(callers.kind == RANK)[0])
    streams = [ranking_pb2.RankedStream(stream_id=name) for name in ("f-0", "f-1", "f-2")]
    reply = ranking_pb2.RankResponse(streams=streams, model_version="m/1").SerializeToString()
    callers.look(rank, (99.9, reply))
    assert not callers.shown_after_end, "it was sent before the acknowledgement"
    callers.look(rank, (100.1, reply))
    assert callers.shown_after_end == ["f-1"]
    assert callers.models == {"m/1": 2} and callers.levels == {"NONE": 2}
