"""Columnar batches: the same events give the same columns and the same refusals as messages."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from liverank.v1 import ingest_pb2 as pb

from server.errors import InvalidRequest
from server.live import arrow_schema
from server.live.arrow_events import decode_by_row
from server.live.event_checks import MAX_TIME_MS
from server.live.events import DecodedBatch, EventColumns, Marks, decode_batch
from tests.arrow_events import payload, to_batch, to_ipc, to_rows
from tests.events import T0, apply, batch, event, new_table, small_settings, started

SETTINGS = small_settings(max_events_per_batch=100)
LARGE: dict[str, Any] = {name: pa.large_utf8() for name in ("stream_id", "viewer_id", "title", "model_version")}
LARGE |= {"kind": pa.utf8(), "tags": pa.large_list(pa.utf8())}
PACKED = {
    name: pa.dictionary(pa.int32(), pa.utf8())
    for name in ("stream_id", "viewer_id", "currency", "reason", "model_version")
}


def assert_same(ours: DecodedBatch, theirs: DecodedBatch) -> None:
    """Columns, starts, reasons and refusals, bit for bit."""
    assert ours.rejected == theirs.rejected
    for field in dataclasses.fields(EventColumns):
        a, b = getattr(ours.events, field.name), getattr(theirs.events, field.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype and a.shape == b.shape, field.name
            np.testing.assert_array_equal(a, b, err_msg=field.name)
        elif field.name != "started":
            assert a == b, field.name
    assert ours.events.started.keys() == theirs.events.started.keys()
    for row, a_start in ours.events.started.items():
        b_start = theirs.events.started[row]
        assert dataclasses.replace(a_start, embedding=None) == dataclasses.replace(b_start, embedding=None)
        np.testing.assert_array_equal(a_start.embedding, b_start.embedding)


def both(events: list[pb.Event], **how: Any) -> tuple[DecodedBatch, DecodedBatch]:
    """(from Arrow, from messages)."""
    return (
        decode_batch(payload(to_ipc(to_batch(to_rows(events), **how))), SETTINGS),
        decode_batch(batch(*events), SETTINGS),
    )


ONE_OF_EACH = [
    started("s", 1, title="Hello", language="en", tags=["a", "b"], embedding=[1.0, 0.0, 0.5, -2.0]),
    event("s", 2, epoch=1, heartbeat={"media_sequence": (1 << 64) - 1}),
    event("s", 3, viewer_count={"count": 12}),
    event("s", 4, viewer="v1", joined={}),
    event("s", 5, viewer="v1", watched={"seconds": 2.5}),
    event("s", 6, viewer="v2", chatted={"count": 7}),
    event("é" * 32, 7, bid={"amount_minor": 10**12, "currency": "EUR"}),
    event("s", 8, viewer="v2", purchased={"amount_minor": 250, "currency": "USD"}),
    event("s", 9, reported={"reason": "spam"}),
    event("s", 10, moderated={"action": 3}),
    event("s", 11, epoch=1, ended={"reason": "creator"}),
    event("a\0", 12, liked={}),
    started("t", 13, epoch=2),
    event("t", 14, epoch=2, ended={"only_if_not_renewed_since_ms": T0}),
    event("t", 15, epoch=2, impression={"request_id": "r", "served_ms": T0, "verify_by_ms": T0 + 9, "position": 3}),
    event(
        "t",
        16,
        epoch=2,
        viewer="v",
        impression={
            "request_id": "r",
            "served_ms": T0,
            "verify_by_ms": T0 + 9,
            "position": 3,
            "propensity": 0.125,
            "model_version": "trendiness/1",
            "applied_offset": (1 << 64) - 1,
        },
    ),
]
ALL_BAD = [
    pb.Event(sequence=1, stream_id="s", event_time_ms=T0),
    event("", 2, liked={}),
    event("x" * 65, 3, liked={}),
    event("s", 0, liked={}),
    event("s", 4, 0, liked={}),
    event("s", 5, MAX_TIME_MS, liked={}),
    event("s", 6, viewer="v" * 65, liked={}),
    started("s", 7, title="t" * 257),
    started("s", 8, embedding=[1.0] * 3),
    started("s", 9, embedding=[1.0, 2.0, 3.0, math.nan]),
    event("s", 10, epoch=1, started={"title": "x"}),
    event("s", 11, heartbeat={"media_sequence": 1}),
    event("s", 12, epoch=1 << 63, liked={}),
    event("s", 13, epoch=1, ended={"reason": "r" * 65}),
    event("s", 14, viewer_count={"count": 2_000_000_000}),
    event("s", 15, watched={"seconds": math.nan}),
    event("s", 16, watched={"seconds": 86_401.0}),
    event("s", 17, bid={"amount_minor": -1, "currency": "USD"}),
    event("s", 18, purchased={"amount_minor": 1, "currency": "ZZZ"}),
    event("s", 19, reported={"reason": "r" * 65}),
    event("s", 20, moderated={"action": 0}),
    event("s", 21, chatted={"count": 4_000_000_000}),
    started("s", 22, tags=["t" * 65]),
    event("s", 23, epoch=1, ended={"only_if_not_renewed_since_ms": -1}),
    event("s", 24, epoch=1, impression={"served_ms": 0, "verify_by_ms": 1}),
    event("s", 25, epoch=1, impression={"served_ms": 1, "verify_by_ms": MAX_TIME_MS}),
    event("s", 26, epoch=1, impression={"request_id": "r" * 65, "served_ms": 1, "verify_by_ms": 1}),
    event("s", 27, epoch=1, impression={"model_version": "m" * 65, "served_ms": 1, "verify_by_ms": 1}),
    event("s", 28, epoch=1, impression={"propensity": 1.5, "served_ms": 1, "verify_by_ms": 1}),
    event("s", 29, epoch=1, impression={"propensity": float("nan"), "served_ms": 1, "verify_by_ms": 1}),
    event("s", 30, epoch=1, impression={"propensity": -1e-45, "served_ms": 1, "verify_by_ms": 1}),
]


@pytest.mark.parametrize("types", [None, LARGE, PACKED])
@pytest.mark.parametrize("sparse", [True, False])
def test_one_of_each_kind_decodes_as_its_message_does(types: dict[str, Any] | None, sparse: bool) -> None:
    ours, theirs = both(ONE_OF_EACH, types=types, sparse=sparse)
    assert not ours.rejected and len(ours.events) == len(ONE_OF_EACH)
    assert_same(ours, theirs)


def test_every_malformed_row_is_refused_with_the_code_and_words_of_its_message() -> None:
    mixed = [e for pair in zip(ALL_BAD, [event("good", 100 + i, liked={}) for i in range(len(ALL_BAD))]) for e in pair]
    ours, theirs = both(mixed)
    assert [r.index for r in ours.rejected] == list(range(0, len(mixed), 2))
    assert len({r.code for r in ours.rejected}) == 11
    assert_same(ours, theirs)


def test_kinds_may_be_numbers_and_embeddings_of_fixed_size() -> None:
    rows = to_rows(ONE_OF_EACH)
    names = [row["kind"] for row in rows]
    for row in rows:
        row["kind"] = pb.Event.DESCRIPTOR.fields_by_name[row["kind"]].number
    types = {"kind": pa.int8(), "embedding": pa.list_(pa.float32(), 4)}
    ours = decode_batch(payload(to_ipc(to_batch(rows, types))), SETTINGS)
    assert names[0] == "started"
    assert_same(ours, decode_batch(batch(*ONE_OF_EACH), SETTINGS))


def test_a_slice_of_a_larger_batch_decodes_alone() -> None:
    whole = to_batch(to_rows([event("before", 99, liked={}), *ONE_OF_EACH, event("after", 98, liked={})]))
    ours = decode_batch(payload(to_ipc(whole.slice(1, len(ONE_OF_EACH)))), SETTINGS)
    assert_same(ours, decode_batch(batch(*ONE_OF_EACH), SETTINGS))


@pytest.mark.parametrize("types", [None, LARGE, PACKED])
def test_a_window_into_larger_columns_decodes_as_if_it_were_alone(types: dict[str, Any] | None) -> None:
    # IPC never brings such a batch, but the decoder must not rest on that.
    around = [event("around", 99, liked={"count": 9}), event("around", 98, watched={"seconds": 3.0})]
    whole = to_batch(to_rows([*around, *ONE_OF_EACH, *around]), types)
    window = whole.slice(2, len(ONE_OF_EACH))
    assert window.column("count").offset == 2
    assert_same(decode_by_row(Marks("p"), window, SETTINGS), decode_batch(batch(*ONE_OF_EACH), SETTINGS))


def test_null_is_the_default_of_its_field() -> None:
    row = {"sequence": 1, "stream_id": "s", "event_time_ms": T0, "kind": "liked"}
    nulls = {name: None for name in ("epoch", "viewer_id", "count", "seconds", "reason", "embedding", "tags")}
    ours = decode_batch(payload(to_ipc(to_batch([row | nulls], sparse=False))), SETTINGS)
    assert_same(ours, decode_batch(batch(event("s", 1, liked={})), SETTINGS))
    gone = decode_batch(payload(to_ipc(to_batch([row | {"kind": None}, row | {"kind": "danced"}]))), SETTINGS)
    assert [r.code for r in gone.rejected] == [pb.MISSING_PAYLOAD] * 2


NUMBERS = st.one_of(st.integers(0, 70), st.sampled_from([(1 << 63) - 1, 1 << 63, (1 << 64) - 1]))
TIMES = st.one_of(st.just(T0), st.integers(-(1 << 63), (1 << 63) - 1))
TEXT = st.one_of(st.text(max_size=8), st.text(st.characters(codec="utf-8"), min_size=30, max_size=70))


@st.composite
def any_event(draw: st.DrawFn) -> pb.Event:
    made = pb.Event(
        sequence=draw(NUMBERS), stream_id=draw(TEXT), epoch=draw(NUMBERS), viewer_id=draw(TEXT),
        event_time_ms=draw(TIMES),
    )  # fmt: skip
    case = draw(st.sampled_from(["", *[f.name for f in pb.Event.DESCRIPTOR.oneofs_by_name["payload"].fields]]))
    if not case:
        return made
    part = getattr(made, case)
    part.SetInParent()
    values: dict[str, st.SearchStrategy[Any]] = {
        "count": st.integers(0, (1 << 32) - 1), "seconds": st.floats(width=32),
        "amount_minor": st.one_of(st.integers(0, 5000), st.integers(-(1 << 63), (1 << 63) - 1)),
        "currency": st.sampled_from(["USD", "JPY", "", "XXX"]), "action": st.integers(0, 5),
        "age_rating": st.integers(0, 25), "media_sequence": NUMBERS,
        "position": st.integers(0, 50), "applied_offset": NUMBERS,
        "propensity": st.one_of(st.floats(0, 1, width=32), st.floats(width=32)),
        **dict.fromkeys(("only_if_not_renewed_since_ms", "served_ms", "verify_by_ms"), TIMES),
    }  # fmt: skip
    for field in part.DESCRIPTOR.fields:
        if field.name == "embedding":
            part.embedding.extend(draw(st.lists(st.floats(width=32), max_size=5)))
        elif field.name == "tags":
            part.tags.extend(draw(st.lists(TEXT, max_size=3)))
        else:
            setattr(part, field.name, draw(values.get(field.name, TEXT)))
    return made


@settings(max_examples=250, deadline=None)
@given(st.lists(any_event(), max_size=6), st.sampled_from([None, LARGE, PACKED]), st.booleans())
def test_any_events_give_the_same_columns_and_refusals_in_both_forms(
    events: list[pb.Event], types: dict[str, Any] | None, sparse: bool
) -> None:
    assert_same(*both(events, types=types, sparse=sparse))


# --- hostile and mistaken batches -----------------------------------------------------------------


def good() -> Any:
    return to_batch(to_rows(ONE_OF_EACH))


@pytest.mark.parametrize(
    ("ipc", "field", "told"),
    [
        (b"rubbish", "arrow", "not an Arrow IPC stream"),
        (to_ipc(good())[:-200], "arrow", "not an Arrow IPC stream"),
        (to_ipc(good(), compression="zstd"), "arrow", "compressed"),
        (to_ipc(good(), compression="lz4"), "arrow", "compressed"),
        (to_ipc(good(), good()), "arrow", "one record batch wanted, got more"),
        (to_ipc(good().drop_columns(["kind"])), "arrow.kind", "missing"),
        (to_ipc(good().append_column("colour", pa.nulls(len(good()), pa.int8()))), "arrow.colour", "unknown column"),
        (to_ipc(good().append_column("count", good()["count"])), "arrow.count", "more than once"),
        (to_ipc(to_batch(to_rows([]), {"sequence": pa.int64()})), "arrow.sequence", "uint64 wanted, got int64"),
        (to_ipc(to_batch(to_rows([]), {"stream_id": pa.string_view()})), "arrow.stream_id", "dictionary of utf8 want"),
        (to_ipc(to_batch(to_rows([event("s", i + 1, liked={}) for i in range(101)]))), "arrow", "at most 100 rows"),
    ],
)
def test_a_batch_that_is_no_event_batch_is_refused_as_a_whole_and_says_why(ipc: bytes, field: str, told: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field}: .*{told}"):
        decode_batch(payload(ipc), SETTINGS)


def test_both_forms_in_one_batch_are_refused() -> None:
    mixed = pb.EventBatch(producer_id="p", arrow=to_ipc(good()), events=ONE_OF_EACH).SerializeToString()
    with pytest.raises(InvalidRequest, match=r"^arrow: events or arrow wanted, got both"):
        decode_batch(mixed, SETTINGS)


def test_few_bytes_cannot_stand_for_much_text() -> None:
    rows = [{"sequence": i + 1, "stream_id": "s", "event_time_ms": T0, "kind": "liked"} for i in range(100)]
    titles = pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int8()), pa.array(["t" * 200_000]))
    with pytest.raises(InvalidRequest, match=r"^arrow\.title: at most 16777216 bytes of text allowed, got 20000000"):
        decode_batch(payload(to_ipc(to_batch(rows).append_column("title", titles))), SETTINGS)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 255))
def test_any_flipped_byte_decodes_or_is_refused(at: int, change: int) -> None:
    ipc = bytearray(to_ipc(good()))
    ipc[at % len(ipc)] ^= change
    try:
        decoded = decode_batch(payload(bytes(ipc)), SETTINGS)
    except InvalidRequest:
        return
    assert len(decoded.events) + len(decoded.rejected) <= SETTINGS.max_events_per_batch


def test_both_forms_leave_the_same_table() -> None:
    events = [started("s", 1), event("s", 2, epoch=1, heartbeat={"media_sequence": 5}), event("s", 3, liked={})]
    one, other = new_table(SETTINGS), new_table(SETTINGS)
    apply(one, *events)
    other.apply(decode_batch(payload(to_ipc(to_batch(to_rows(events)))), SETTINGS).events, T0)
    for name, column in vars(one.columns).items():
        np.testing.assert_array_equal(column, getattr(other.columns, name), err_msg=name)


def outcome(sent: bytes) -> Any:
    """What is read from a stream: its columns, or what the caller is told."""
    try:
        found = arrow_schema.read_batch(sent, 100)
    except InvalidRequest as refused:
        return str(refused)
    return found.to_pydict()


def streams() -> list[bytes]:
    """As producers send them, and as they should not."""
    made = to_batch(to_rows(ONE_OF_EACH))
    usual = to_ipc(made)
    legacy = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(use_legacy_format=True)
    with pa.ipc.new_stream(legacy, made.schema, options=options) as writer:
        writer.write_batch(made)
    return [
        usual, usual[:-8], usual[:-4], usual + usual, to_ipc(made, made), to_ipc(made, compression="zstd"),
        bytes(legacy.getvalue()), b"", usual[: usual.index(b"sequence")],
        to_ipc(to_batch(to_rows(ONE_OF_EACH), types={"kind": pa.utf8()})),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(10))
def test_a_stream_that_is_walked_means_what_the_library_says_it_means(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = streams()[number]
    walked = outcome(sent)
    monkeypatch.setattr(arrow_schema, "_walk", lambda stream: None)
    assert walked == outcome(sent)


def test_only_the_usual_stream_is_not_read_twice() -> None:
    assert [arrow_schema._walk(memoryview(sent)) is not None for sent in (*streams()[:2], streams()[3])] == [True] * 3
    for number in (2, 4, 6, 7, 8):
        assert arrow_schema._walk(memoryview(streams()[number])) is None
    with pytest.raises(InvalidRequest, match="compressed"):
        arrow_schema._walk(memoryview(streams()[5]))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damage_is_read_alike_with_and_without_the_walk(data: st.DataObject) -> None:
    sent = bytearray(streams()[data.draw(st.sampled_from([0, 4, 5]))])
    for _ in range(data.draw(st.integers(1, 3))):
        sent[data.draw(st.integers(0, len(sent) - 1))] = data.draw(st.integers(0, 255))
    sent = sent[: data.draw(st.sampled_from([len(sent), data.draw(st.integers(0, len(sent)))]))]
    arrow_schema._layouts.clear()
    walked = outcome(bytes(sent))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(arrow_schema, "_walk", lambda stream: None)
        arrow_schema._layouts.clear()
        plain = outcome(bytes(sent))
    assert isinstance(walked, str) == isinstance(plain, str)
    if not isinstance(walked, str):
        assert repr(walked) == repr(plain)
