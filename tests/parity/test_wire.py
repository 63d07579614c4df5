"""The wire encoder gives the bytes of the generated classes' messages, whatever the content."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from liverank.v1 import ranking_pb2

from kernels.wire import (
    encode_streams,
    encode_streams_reference,
    frame_messages,
    reply_head,
    text_fields,
    uint_fields,
    varint,
)

FLOATS = st.one_of(
    st.floats(width=32, allow_nan=False),
    st.sampled_from([0.0, -0.0, float("nan"), float("inf"), float("-inf"), 1e-45]),
)
IDS = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=16),
    st.sampled_from(["", "a", "x" * 64, "é" * 32]),
).map(lambda text: text.encode())


@st.composite
def replies(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(IDS, min_size=1, max_size=6))
    rows = len(names)
    ids = np.zeros((rows, 64), np.uint8)
    for row, name in enumerate(names):
        ids[row, : len(name)] = np.frombuffer(name, np.uint8)
    batch, width = draw(st.integers(0, 3)), draw(st.integers(0, 5))

    def column(values: st.SearchStrategy[Any], dtype: Any) -> Any:
        return np.array(draw(st.lists(values, min_size=rows, max_size=rows)), dtype)

    def cells(values: st.SearchStrategy[Any], dtype: Any) -> Any:
        size = batch * width
        return np.array(draw(st.lists(values, min_size=size, max_size=size)), dtype).reshape(batch, width)

    counts = draw(st.lists(st.integers(0, width), min_size=batch, max_size=batch))
    return {
        "slots": cells(st.integers(0, rows - 1), np.int32),
        "counts": np.array(counts, np.int32),
        "scores": cells(FLOATS, np.float32),
        "epochs": column(st.integers(0, 2**63 - 1), np.int64),
        "verify_by_ms": column(st.integers(-(2**63), 2**63 - 1), np.int64),
        "sources": cells(st.integers(0, 2**32 - 1), np.uint32),
        "exploration": cells(FLOATS, np.float32),
        "ids": ids,
        "id_lengths": np.array([len(name) for name in names], np.uint8),
    }


def expected(reply: dict[str, Any], b: int) -> ranking_pb2.RankResponse:
    message = ranking_pb2.RankResponse(request_id=f"request-{b}", as_of_ms=7, notices=["limit_clamped"])
    for place in range(reply["counts"][b]):
        slot = reply["slots"][b, place]
        message.streams.add(
            stream_id=reply["ids"][slot, : reply["id_lengths"][slot]].tobytes().decode(),
            score=float(reply["scores"][b, place]),
            epoch=int(reply["epochs"][slot]),
            verify_by_ms=int(reply["verify_by_ms"][slot]),
            sources=int(reply["sources"][b, place]),
            exploration=float(reply["exploration"][b, place]),
        )
    return message


def header_of(message: ranking_pb2.RankResponse) -> bytes:
    header = ranking_pb2.RankResponse()
    header.CopyFrom(message)
    header.ClearField("streams")
    return header.SerializeToString()


@settings(max_examples=150, deadline=None)
@given(replies())
def test_header_and_row_bytes_parse_as_the_message_built_field_by_field(reply: dict[str, Any]) -> None:
    buffer, offsets = encode_streams(**reply)
    for b in range(len(reply["counts"])):
        message = expected(reply, b)
        row = buffer[offsets[b] : offsets[b + 1]].tobytes()
        parsed = ranking_pb2.RankResponse.FromString(header_of(message) + row)
        # Serialised again, because NaN does not equal NaN.
        assert parsed.SerializeToString(deterministic=True) == message.SerializeToString(deterministic=True)
        if not np.isnan(reply["scores"]).any() and not np.isnan(reply["exploration"]).any():
            assert parsed == message


@settings(max_examples=100, deadline=None)
@given(replies())
def test_encoder_and_reference_write_the_same_bytes(reply: dict[str, Any]) -> None:
    buffer, offsets = encode_streams(**reply)
    reference_buffer, reference_offsets = encode_streams_reference(**reply)
    np.testing.assert_array_equal(buffer, reference_buffer)
    np.testing.assert_array_equal(offsets, reference_offsets)


@settings(max_examples=60, deadline=None)
@given(replies())
def test_framed_rows_parse_as_the_batch_response(reply: dict[str, Any]) -> None:
    buffer, offsets = encode_streams(**reply)
    messages = [expected(reply, b) for b in range(len(reply["counts"]))]
    rows = [buffer[i:j].tobytes() for i, j in itertools.pairwise(offsets)]
    framed = frame_messages((header_of(m), row) for m, row in zip(messages, rows, strict=True))
    batch = ranking_pb2.RankBatchResponse(responses=messages)
    parsed = ranking_pb2.RankBatchResponse.FromString(framed)
    assert parsed.SerializeToString(deterministic=True) == batch.SerializeToString(deterministic=True)


def plain_reply() -> dict[str, Any]:
    return {
        "slots": np.array([[0, 1]], np.int32),
        "counts": np.array([2], np.int32),
        "scores": np.zeros((1, 2), np.float32),
        "epochs": np.array([1, 2], np.int64),
        "verify_by_ms": np.zeros(2, np.int64),
        "sources": np.zeros((1, 2), np.uint32),
        "exploration": np.zeros((1, 2), np.float32),
        "ids": np.full((2, 64), ord("a"), np.uint8),
        "id_lengths": np.array([64, 3], np.uint8),
    }


@pytest.mark.parametrize("encode", [encode_streams, encode_streams_reference])
@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("slots", np.array([[0, 2]], np.int32)),
        ("slots", np.array([[0, -1]], np.int32)),
        ("slots", np.array([[0, 1]], np.int64)),
        ("counts", np.array([3], np.int32)),
        ("counts", np.array([-1], np.int32)),
        ("scores", np.zeros((1, 3), np.float32)),
        ("epochs", np.array([1, -2], np.int64)),
        ("verify_by_ms", np.zeros(3, np.int64)),
        ("sources", np.zeros((1, 2), np.int32)),
        ("exploration", np.zeros((2, 1), np.float32)),
        ("ids", np.zeros((2, 63), np.uint8)),
        ("id_lengths", np.array([64, 65], np.uint8)),
    ],
)
def test_bad_argument_is_refused_by_name(encode: Any, name: str, bad: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}:"):
        encode(**{**plain_reply(), name: bad})


def test_entries_beyond_the_count_are_ignored_even_when_they_are_padding() -> None:
    reply = plain_reply()
    reply["slots"] = np.array([[1, -1]], np.int32)
    reply["counts"] = np.array([1], np.int32)
    buffer, _ = encode_streams(**reply)
    assert [s.stream_id for s in ranking_pb2.RankResponse.FromString(buffer.tobytes()).streams] == ["aaa"]


def test_a_response_longer_than_one_varint_byte_is_framed() -> None:
    reply = plain_reply()
    reply["slots"] = np.zeros((1, 300), np.int32)
    for name, dtype in [("scores", np.float32), ("sources", np.uint32), ("exploration", np.float32)]:
        reply[name] = np.zeros((1, 300), dtype)
    reply["counts"] = np.array([300], np.int32)
    buffer, _ = encode_streams(**reply)
    framed = frame_messages([[buffer.tobytes()]])
    assert len(ranking_pb2.RankBatchResponse.FromString(framed).responses[0].streams) == 300


UINTS = st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0, 127, 128, 16_383, 16_384, 2**32 - 1]))


@settings(max_examples=200, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=16),
    st.lists(UINTS, min_size=6, max_size=6),
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=200), max_size=3),
)
def test_the_head_of_a_reply_is_what_the_generated_classes_write(
    request_id: str, times: list[int], notices: list[str]
) -> None:
    names = ("queue_us", "retrieve_us", "blend_us", "select_us", "verify_us", "batch_rows")
    message = ranking_pb2.RankResponse(
        request_id=request_id,
        timings=ranking_pb2.Timings(**dict(zip(names, times, strict=True))),
        notices=notices,
    )
    timings = uint_fields(times[:1]) + uint_fields(times[1:], first=2)
    assert reply_head(request_id.encode(), timings, text_fields(9, notices)) == message.SerializeToString()


@pytest.mark.parametrize("too_long", [(b"x" * 128, b""), (b"", b"x" * 128)])
def test_a_head_that_would_need_a_longer_length_is_refused(too_long: tuple[bytes, bytes]) -> None:
    with pytest.raises(ValueError, match=r"^request_id, timings"):
        reply_head(*too_long, b"")


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 16_383, 16_384, 2**35])
def test_a_varint_is_seven_bits_a_byte_lowest_first(value: int) -> None:
    groups = varint(value)
    assert sum((byte & 0x7F) << 7 * i for i, byte in enumerate(groups)) == value
    assert (
        all(byte & 0x80 for byte in groups[:-1])
        and groups[-1] < 0x80
        and len(groups) == max(1, -(-value.bit_length() // 7))
    )
