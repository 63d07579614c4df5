"""Messages read by compiled code: whatever the bytes, accepted, decoded and refused as by the generated classes."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from liverank.v1 import ingest_pb2 as pb

from kernels.event_messages import decode_messages, outline
from kernels.event_rows import KEPT, pack_names
from kernels.utf8 import valid_utf8, valid_utf8_reference
from server.errors import InvalidRequest
from server.live import events as events_module
from server.live.events import DecodedBatch, decode_batch, decode_by_message
from tests.events import T0, batch, event, small_settings, started
from tests.unit.test_arrow_events import ALL_BAD, ONE_OF_EACH, any_event, assert_same

SETTINGS = small_settings(max_events_per_batch=100)


def outcome(decode: object, payload: bytes) -> DecodedBatch | str:
    try:
        return decode(payload, SETTINGS)  # type: ignore[operator]
    except InvalidRequest as error:
        return str(error)


def assert_same_outcome(payload: bytes) -> None:
    ours, theirs = outcome(decode_batch, payload), outcome(decode_by_message, payload)
    if isinstance(ours, str) or isinstance(theirs, str):
        assert ours == theirs
    else:
        assert_same(ours, theirs)


# --- bytes of all sorts ---------------------------------------------------------------------------


def varint(number: int) -> bytes:
    out = bytearray()
    number &= (1 << 64) - 1
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def field(number: int, wire: int, content: bytes) -> bytes:
    return varint(number << 3 | wire) + (varint(len(content)) if wire == 2 else b"") + content


NUMBERS = st.one_of(
    st.integers(0, 300), st.sampled_from([T0, (1 << 31) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
)
TEXTS = st.one_of(
    st.sampled_from([b"s", b"USD", b"x" * 64, b"x" * 65, "é".encode(), "日本".encode()[:5], b"\xff", b"\xed\xa0\x80"]),
    st.binary(max_size=8),
)
VARINTS = st.one_of(
    NUMBERS.map(varint),
    st.sampled_from([b"\x81\x00", b"\xff" * 9 + b"\x01", b"\xff" * 9 + b"\x02", b"\x80" * 10 + b"\x01", b"\x80"]),
)


def fields(numbers: st.SearchStrategy[int], inner: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """A few fields of any number and wire type, many of them as they should be."""
    one = st.one_of(
        st.builds(field, numbers, st.just(2), st.one_of(TEXTS, inner)),
        st.builds(field, numbers, st.just(0), VARINTS),
        st.builds(field, numbers, st.just(5), st.sampled_from([struct.pack("<f", x) for x in (0.5, 1.5, -1.0, 1e9)])),
        st.builds(field, numbers, st.sampled_from([1, 3, 4, 5, 6, 7]), st.binary(max_size=9)),
    )
    return st.lists(one, max_size=6).map(b"".join)


PAYLOADS = fields(st.integers(0, 9), st.just(b""))
HEADER = st.one_of(st.integers(1, 5), st.integers(10, 25), st.sampled_from([0, 6, 9, 26, 31, 32, 33, 1 << 20]))
WILD_EVENTS = fields(HEADER, PAYLOADS)
BATCHES = st.builds(
    lambda events, more: field(1, 2, b"p") + b"".join(field(2, 2, e) for e in events) + more,
    st.lists(st.one_of(WILD_EVENTS, any_event().map(pb.Event.SerializeToString)), max_size=4),
    st.one_of(st.just(b""), fields(st.sampled_from([0, 1, 2, 4, 5, 6, 40]), WILD_EVENTS)),
)


@settings(max_examples=200, deadline=None)
@given(BATCHES)
def test_any_fields_in_any_order_mean_what_the_generated_classes_say(payload: bytes) -> None:
    assert_same_outcome(payload)


SOUND = field(1, 0, b"\x07") + field(2, 2, b"s") + field(3, 0, b"\x01") + field(4, 0, varint(T0))
CONTENTS = {
    0: [b"\x00", b"\x02", b"\x04", varint(T0), varint(-5), varint(1 << 31), varint((1 << 32) + 2), varint(1 << 63),
        varint((1 << 63) + (1 << 32) + 3), b"\x82\x00", b"\x82" + b"\x80" * 8 + b"\x00",
        b"\x82" + b"\x80" * 8 + b"\x02", b"\x80" * 10 + b"\x00", b"\x80"],
    1: [b"8 bytes.", b"7 bytes"],
    2: [b"", b"USD", b"x" * 65, "é".encode(), b"\xff", b"\x08\x05", b"\x00\x00\x80\x3f"],
    3: [b"", b"\x08\x01"], 4: [b""],
    5: [*(struct.pack("<f", x) for x in (2.5, -1.0, -0.0, 1.0, 1.0000001)), b"\x00\x00\xc0\x7f", b"3by"],
    6: [b""], 7: [b""],
}  # fmt: skip
FIELDS = [(number, wire, content) for number in range(9) for wire, some in CONTENTS.items() for content in some]
PLAIN = {event.WhichOneof("payload"): event for event in reversed(ONE_OF_EACH)}
KIND_NUMBERS = range(10, 26)


@pytest.mark.parametrize("kind", KIND_NUMBERS)
def test_every_sort_of_field_in_every_payload_means_what_the_generated_classes_say(kind: int) -> None:
    name = pb.Event.DESCRIPTOR.fields_by_number[kind].name
    plain = getattr(PLAIN[name], name).SerializeToString() if name in PLAIN else b""
    for odd in (field(*one) for one in FIELDS):
        for payload in (odd, plain + odd, odd + plain):
            assert_same_outcome(field(1, 2, b"p") + field(2, 2, SOUND + field(kind, 2, payload)))


def test_every_sort_of_field_in_an_event_means_what_the_generated_classes_say() -> None:
    liked = field(18, 2, b"\x08\x02")
    numbers = (0, 1, 2, 3, 4, 5, 6, 9, 18, 26, 31, 32, 33, 1 << 20, 1 << 29, 1 << 30)
    for number, wire, content in ((n, w, c) for n in numbers for _, w, c in FIELDS[: len(FIELDS) // 9]):
        odd = field(number, wire, content)
        for one in (odd + SOUND + liked, SOUND + odd + liked, SOUND + liked + odd):
            assert_same_outcome(field(1, 2, b"p") + field(2, 2, one))
        for whole in (odd + field(1, 2, b"p"), field(1, 2, b"p") + field(2, 2, SOUND + liked) + odd):
            assert_same_outcome(whole)


def test_two_payloads_in_one_event_mean_what_the_generated_classes_say() -> None:
    some = [b"", b"\x08\x02", b"\x10\x03", b"\x0a\x01x", b"\x12\x03USD", b"\x0a\x01\xff"]
    for first, second in ((a, b) for a in KIND_NUMBERS for b in KIND_NUMBERS):
        for one, other in zip(some, [*some[1:], some[0]]):
            both = field(first, 2, one) + field(second, 2, other)
            assert_same_outcome(field(1, 2, b"p") + field(2, 2, SOUND + both))


@settings(max_examples=150, deadline=None)
@given(st.lists(any_event(), max_size=5), st.data())
def test_damaged_batches_mean_what_the_generated_classes_say(events: list[pb.Event], data: st.DataObject) -> None:
    payload = bytearray(batch(*events))
    assert_same_outcome(bytes(payload))
    cut = data.draw(st.integers(0, len(payload)))
    assert_same_outcome(bytes(payload[:cut]))
    payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    assert_same_outcome(bytes(payload))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        batch(*ONE_OF_EACH),
        batch(*ALL_BAD),
        batch(*ALL_BAD, *ONE_OF_EACH, started("s", 5, tags=["t"] * 17), producer="é"),
        batch(*ONE_OF_EACH) + field(5, 0, varint((1 << 32) + 7)) + field(4, 0, b"\x02") + field(1, 2, b"q"),
        batch(event("s", 1, liked={})) + b"\x1a\x00",  # arrow, and empty: not there
        field(1, 2, b"p") + field(2, 2, batch(started("s", 1))),
    ],
)
def test_batches_of_every_kind_mean_what_the_generated_classes_say(payload: bytes) -> None:
    assert_same_outcome(payload)


# --- and mostly without them ----------------------------------------------------------------------


def test_ordinary_batches_and_fields_from_the_future_need_no_object_per_event(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> DecodedBatch:
        raise AssertionError("left to the generated classes")

    newer = field(6, 0, b"\x01") + field(27, 2, b"new") + field(31, 1, b"8 bytes.") + field(40, 5, b"four")
    made = b"".join(field(2, 2, one.SerializeToString() + newer) for one in ONE_OF_EACH)
    theirs = decode_by_message(field(1, 2, b"p") + made + newer, SETTINGS)
    monkeypatch.setattr(events_module, "decode_by_message", never)
    assert_same(decode_batch(field(1, 2, b"p") + made + newer, SETTINGS), theirs)
    decoded = decode_batch(batch(*ALL_BAD), SETTINGS)
    assert len(decoded.rejected) == len(ALL_BAD)


def test_a_start_whose_payload_is_no_message_refuses_the_batch() -> None:
    broken = field(1, 0, b"\x01") + field(2, 2, b"s") + field(3, 0, b"\x01") + field(4, 0, varint(T0))
    broken += field(10, 2, field(1, 2, b"\xff"))
    with pytest.raises(InvalidRequest, match=r"^EventBatch: not a valid message"):
        decode_batch(field(1, 2, b"p") + field(2, 2, broken), SETTINGS)


def test_messages_outside_of_the_data_are_refused_by_name() -> None:
    data = np.frombuffer(batch(event("s", 1, liked={})), np.uint8)
    found = outline(data)
    assert found is not None
    rows = decode_messages(data, found.at, found.lengths, pack_names({}))
    assert rows is not None and rows.counts[KEPT] == 1
    with pytest.raises(ValueError, match="at, lengths: messages inside of"):
        decode_messages(data, found.at + 1, found.lengths, pack_names({}))


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.binary(max_size=12), st.text(max_size=6).map(lambda t: t.encode("utf-8", "surrogatepass"))))
def test_utf8_is_what_the_library_says_it_is(text: bytes) -> None:
    data = np.frombuffer(b"\x80" + text + b"\x80", np.uint8)
    assert valid_utf8(data, 1, 1 + len(text)) == valid_utf8_reference(data, 1, 1 + len(text))


def test_every_lead_and_second_byte_is_judged_as_the_library_does() -> None:
    for first in range(256):
        for second in range(256):
            for tail in (b"", b"\x80", b"\x80\x80", b"\xbf\x7f"):
                data = np.frombuffer(bytes([first, second]) + tail, np.uint8)
                assert valid_utf8(data, 0, len(data)) == valid_utf8_reference(data, 0, len(data)), data
