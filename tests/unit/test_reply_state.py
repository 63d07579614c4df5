"""What a reply says about itself arrives as it was meant, whatever was said before."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from liverank.v1 import ranking_pb2 as pb

from server.ranking.slates import ReplyState, SlateBatch, StageTimes
from server.ranking.tally import tally_of
from server.retrieval.query import build_batch
from server.rpc.encode import SOURCE_NAMES, encode_replies
from server.scoring.ladder import Level
from tests.assessed import World, query

WORLD = World()
STATES = st.builds(
    ReplyState,
    applied_offset=st.integers(0, 2**63 - 1),
    model_version=st.sampled_from(["", "trendiness/1", "trendiness/2+ranker/1", "formula"]),
    level=st.sampled_from(Level),
    reasons=st.sampled_from([(), ("timeout",), ("timeout", "ranker: busy")]),
    score_age_ms=st.integers(0, 2**40),
    quality=st.sampled_from([1.0, 0.5, 0.251]),
)
TIMES = st.builds(StageTimes, *(st.integers(0, 2**31) for _ in range(5)))


def nothing_shown(as_of_ms: int, times: StageTimes) -> SlateBatch:
    batch = build_batch([query(request_id="r", received_s=2.0)], WORLD.table, WORLD.book)
    slots, none = np.full((1, 1), -1, np.int32), np.zeros((1, 1), np.float32)
    sources, drops = np.zeros((1, 1), np.uint32), np.zeros((1, 1), np.uint8)
    return SlateBatch(
        batch=batch, slots=slots, counts=np.zeros(1, np.int32), scores=none, sources=sources, exploration=none,
        as_of_ms=as_of_ms, times=times, picks=slots, drops=drops, tally=tally_of(slots, sources, none, slots, drops),
    )  # fmt: skip


@given(STATES, st.integers(0, 2**60), TIMES)
def test_a_reply_tells_its_state(state: ReplyState, as_of_ms: int, times: StageTimes) -> None:
    reply = pb.RankResponse.FromString(encode_replies(nothing_shown(as_of_ms, times), state, WORLD.table, 2.5)[0])
    told = reply.degradation
    overload = [] if state.quality == 1.0 else [f"overload: {state.quality:.0%} of the candidates were scored"]
    assert (reply.request_id, reply.as_of_ms, reply.applied_offset) == ("r", as_of_ms, state.applied_offset)
    assert (reply.model_version, reply.score_age_ms) == (state.model_version, state.score_age_ms)
    assert (told.level, list(told.reasons)) == (int(state.level), [*state.reasons, *overload])
    assert told.HasField("quality") == (state.quality < 1.0)
    assert told.quality == (np.float32(state.quality) if state.quality < 1.0 else 0.0)
    assert tuple(reply.source_names) == SOURCE_NAMES
    spent = reply.timings
    assert (spent.queue_us, spent.batch_rows, spent.score_us) == (500_000, 1, times.score_us)
    assert (spent.retrieve_us, spent.blend_us, spent.select_us, spent.verify_us) == (
        times.retrieve_us, times.blend_us, times.select_us, times.verify_us,
    )  # fmt: skip
