"""Every malformed event gets its own code and message, and never harms its batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from liverank.v1 import ingest_pb2 as pb

from server.errors import InvalidRequest
from server.live.event_checks import MAX_TIME_MS
from server.live.events import decode_batch
from tests.events import T0, batch, event, small_settings, started

SETTINGS = small_settings(max_events_per_batch=100)


@pytest.mark.parametrize(
    ("bad", "code", "field"),
    [
        (pb.Event(sequence=1, stream_id="s", event_time_ms=T0), pb.MISSING_PAYLOAD, "payload"),
        (event("", 1, liked={}), pb.STREAM_ID_INVALID, "stream_id"),
        (event("x" * 65, 1, liked={}), pb.STREAM_ID_INVALID, "stream_id"),
        (event("é" * 33, 1, liked={}), pb.STREAM_ID_INVALID, "stream_id"),
        (event("s", 0, liked={}), pb.SEQUENCE_INVALID, "sequence"),
        (event("s", 1, -5, liked={}), pb.TIME_INVALID, "event_time_ms"),
        (event("s", 1, 0, liked={}), pb.TIME_INVALID, "event_time_ms"),
        (event("s", 1, MAX_TIME_MS, liked={}), pb.TIME_INVALID, "event_time_ms"),
        (event("s", 1, viewer="v" * 65, liked={}), pb.FIELD_TOO_LONG, "viewer_id"),
        (started("s", 1, title="t" * 257), pb.FIELD_TOO_LONG, "started.title"),
        (started("s", 1, category="c" * 65), pb.FIELD_TOO_LONG, "started.category"),
        (started("s", 1, tags=["t"] * 17), pb.VALUE_OUT_OF_RANGE, "started.tags"),
        (started("s", 1, age_rating=22), pb.VALUE_OUT_OF_RANGE, "started.age_rating"),
        (started("s", 1, embedding=[1.0] * 3), pb.EMBEDDING_SIZE, "started.embedding"),
        (started("s", 1, embedding=[1.0, 2.0, 3.0, math.nan]), pb.EMBEDDING_NOT_FINITE, "started.embedding"),
        (started("s", 1, embedding=[1.0, 2.0, 3.0, math.inf]), pb.EMBEDDING_NOT_FINITE, "started.embedding"),
        (started("s", 1, embedding=[1e7, 0.0, 0.0, 0.0]), pb.VALUE_OUT_OF_RANGE, "started.embedding"),
        (started("s", 1, embedding=[1e-7, 0.0, 0.0, 0.0]), pb.VALUE_OUT_OF_RANGE, "started.embedding"),
        (event("s", 1, epoch=1, started={"title": "x"}), pb.CREATOR_MISSING, "creator_id"),
        (started("s", 1, epoch=0), pb.EPOCH_MISSING, "epoch"),
        (event("s", 1, heartbeat={"media_sequence": 1}), pb.EPOCH_MISSING, "epoch"),
        (event("s", 1, ended={}), pb.EPOCH_MISSING, "epoch"),
        (event("s", 1, epoch=1 << 63, liked={}), pb.VALUE_OUT_OF_RANGE, "epoch"),
        (event("s", 1, epoch=1, ended={"reason": "r" * 65}), pb.FIELD_TOO_LONG, "ended.reason"),
        (event("s", 1, viewer_count={"count": 2_000_000_000}), pb.VALUE_OUT_OF_RANGE, "viewer_count.count"),
        (event("s", 1, watched={"seconds": math.nan}), pb.VALUE_OUT_OF_RANGE, "watched.seconds"),
        (event("s", 1, watched={"seconds": -1.0}), pb.VALUE_OUT_OF_RANGE, "watched.seconds"),
        (event("s", 1, bid={"amount_minor": -1, "currency": "USD"}), pb.VALUE_OUT_OF_RANGE, "bid.amount_minor"),
        (event("s", 1, purchased={"amount_minor": 1, "currency": "ZZZ"}), pb.CURRENCY_UNKNOWN, "purchased.currency"),
        (event("s", 1, reported={"reason": "r" * 65}), pb.FIELD_TOO_LONG, "reported.reason"),
        (event("s", 1, moderated={"action": 0}), pb.VALUE_OUT_OF_RANGE, "moderated.action"),
        (event("s", 1, chatted={"count": 4_000_000_000}), pb.VALUE_OUT_OF_RANGE, "count"),
    ],
)  # fmt: skip
def test_a_bad_event_is_refused_alone_with_its_code_and_field(bad: pb.Event, code: int, field: str) -> None:
    decoded = decode_batch(batch(event("good", 7, liked={}), bad, event("good", 8, liked={})), SETTINGS)
    assert [(r.index, r.code) for r in decoded.rejected] == [(1, code)]
    assert field in decoded.rejected[0].message
    assert decoded.events.index.tolist() == [0, 2] and decoded.events.sequence.tolist() == [7, 8]


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        (b"\xff\xff\xff", "EventBatch"),
        (batch(producer=""), "producer_id"),
        (batch(producer="p" * 65), "producer_id"),
        (batch(*[event("s", i + 1, liked={}) for i in range(101)]), "events"),
    ],
)
def test_a_malformed_batch_is_refused_as_a_whole_naming_the_field(payload: bytes, field: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field}: "):
        decode_batch(payload, SETTINGS)


def test_values_reach_their_columns() -> None:
    decoded = decode_batch(
        batch(
            event("s", 1, T0, viewer="v", purchased={"amount_minor": 250, "currency": "USD"}),
            event("s", 2, T0 + 1, epoch=9, heartbeat={"media_sequence": (1 << 64) - 1}),
            event("s", 3, chatted={}),
            event("s", 4, chatted={"count": 12}),
        ),
        SETTINGS,
    ).events
    assert decoded.value.tolist() == [2.5, 0.0, 1.0, 12.0]
    assert decoded.epoch.tolist() == [0, 9, 0, 0] and decoded.media_sequence[1] == (1 << 63) - 1
    assert decoded.viewer_hash[0] != 0 and decoded.viewer_hash[2] == 0


def test_an_empty_batch_is_fine() -> None:
    assert len(decode_batch(batch(), SETTINGS).events) == 0


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_refused(payload: bytes) -> None:
    try:
        decoded = decode_batch(payload, SETTINGS)
    except InvalidRequest:
        return
    assert len(decoded.events) + len(decoded.rejected) <= SETTINGS.max_events_per_batch


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_message_decodes_with_every_event_accounted_for(data: st.DataObject) -> None:
    def value(kind: Any) -> Any:
        return data.draw(kind)

    events = []
    for _ in range(value(st.integers(0, 4))):
        made = pb.Event(
            sequence=value(st.integers(0, (1 << 64) - 1)),
            stream_id=value(st.text(max_size=70)),
            epoch=value(st.integers(0, (1 << 64) - 1)),
            event_time_ms=value(st.integers(-(1 << 63), (1 << 63) - 1)),
        )
        case = value(st.sampled_from(["", "watched", "bid", "heartbeat", "moderated", "started"]))
        if case == "watched":
            made.watched.seconds = value(st.floats(width=32))
        elif case == "bid":
            made.bid.amount_minor = value(st.integers(-(1 << 63), (1 << 63) - 1))
            made.bid.currency = value(st.sampled_from(["USD", "", "x"]))
        elif case == "started":
            made.started.embedding.extend(value(st.lists(st.floats(width=32), max_size=5)))
        elif case:
            getattr(made, case).SetInParent()
        events.append(made)
    decoded = decode_batch(pb.EventBatch(producer_id="p", events=events).SerializeToString(), SETTINGS)
    places = sorted([*decoded.events.index.tolist(), *(r.index for r in decoded.rejected)])
    assert places == list(range(len(events)))
