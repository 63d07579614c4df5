"""Replies straight from columns to protobuf wire bytes.

Every field of RankedStream but its id has a fixed width, so an entry is ``35 + id length`` bytes of which
only the id's length varies. All fields are always written, zeros too: decoders must accept explicit zeros,
and a decoded message equals one that was built field by field. An entry is under 128 bytes, so its length is
one byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kernels.checks import require_array

ID_BYTES = 64  # the longest stream id
_OK, _BAD_COUNT, _BAD_SLOT, _BAD_EPOCH, _BAD_LENGTH = range(5)


def encode_streams(
    slots: NDArray[np.int32],
    counts: NDArray[np.int32],
    scores: NDArray[np.float32],
    epochs: NDArray[np.int64],
    verify_by_ms: NDArray[np.int64],
    sources: NDArray[np.uint32],
    exploration: NDArray[np.float32],
    ids: NDArray[np.uint8],
    id_lengths: NDArray[np.uint8],
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The ``streams`` entries of one RankResponse per row, as wire bytes.

    ``header.SerializeToString() + row bytes`` parses as the complete RankResponse, where the header is a
    RankResponse without streams.

    Args:
        slots: int32[B, L], rows of the table; entries from counts[b] on are ignored.
        counts: int32[B] in [0, L], how many streams row b replies with.
        scores: float32[B, L], any bit pattern.
        epochs: int64[C], not negative.
        verify_by_ms: int64[C], Unix epoch.
        sources: uint32[B, L], bit set.
        exploration: float32[B, L].
        ids: uint8[C, 64], zero-padded UTF-8 (validated when the stream entered the table).
        id_lengths: uint8[C], at most 64.

    Returns:
        ``buffer`` uint8[total] and ``offsets`` int64[B + 1]: row b is buffer[offsets[b]:offsets[b + 1]].

    Raises:
        ValueError: an argument has the wrong dtype, shape or range; the message names it.

    Cost: reads about 100 bytes of table and writes 37 + id length bytes per stream; no flops.
    """
    _check(slots, counts, scores, epochs, verify_by_ms, sources, exploration, ids, id_lengths)
    offsets = np.zeros(counts.shape[0] + 1, np.int64)
    _raise_for(_measure(slots, counts, epochs, id_lengths, offsets), slots.shape[1], epochs.shape[0])
    buffer = np.empty(offsets[-1], np.uint8)
    _write(
        slots, counts, scores.view(np.uint32), epochs, verify_by_ms, sources, exploration.view(np.uint32),
        ids, id_lengths, offsets, buffer,
    )  # fmt: skip
    return buffer, offsets


def encode_streams_reference(
    slots: NDArray[np.int32],
    counts: NDArray[np.int32],
    scores: NDArray[np.float32],
    epochs: NDArray[np.int64],
    verify_by_ms: NDArray[np.int64],
    sources: NDArray[np.uint32],
    exploration: NDArray[np.float32],
    ids: NDArray[np.uint8],
    id_lengths: NDArray[np.uint8],
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """What :func:`encode_streams` returns, one field after the other."""
    _check(slots, counts, scores, epochs, verify_by_ms, sources, exploration, ids, id_lengths)
    offsets = [0]
    wire = bytearray()
    for b, count in enumerate(counts):
        if not 0 <= count <= slots.shape[1]:
            _raise_for(_BAD_COUNT, slots.shape[1], epochs.shape[0])
        for place, slot in enumerate(slots[b, :count]):
            if not 0 <= slot < epochs.shape[0]:
                _raise_for(_BAD_SLOT, slots.shape[1], epochs.shape[0])
            if epochs[slot] < 0:
                _raise_for(_BAD_EPOCH, slots.shape[1], epochs.shape[0])
            if id_lengths[slot] > ID_BYTES:
                _raise_for(_BAD_LENGTH, slots.shape[1], epochs.shape[0])
            stream_id = ids[slot, : id_lengths[slot]].tobytes()
            entry = b"\x0a" + bytes([len(stream_id)]) + stream_id
            entry += b"\x15" + scores[b, place].astype("<f4").tobytes()
            entry += b"\x19" + epochs[slot].astype("<i8").tobytes()
            entry += b"\x21" + verify_by_ms[slot].astype("<i8").tobytes()
            entry += b"\x2d" + sources[b, place].astype("<u4").tobytes()
            entry += b"\x35" + exploration[b, place].astype("<f4").tobytes()
            wire += b"\x12" + bytes([len(entry)]) + entry
        offsets.append(len(wire))
    return np.frombuffer(bytes(wire), np.uint8), np.array(offsets, np.int64)


def frame_messages(messages: Iterable[Sequence[bytes | memoryview]]) -> bytes:
    """Wire bytes of a message whose field 1 is repeated and holds ``messages``, such as RankBatchResponse.

    Args:
        messages: each in parts.

    Cost: copies each message once.
    """
    parts: list[bytes | memoryview] = []
    for message in messages:
        parts += (b"\x0a", varint(sum(map(len, message))), *message)
    return b"".join(parts)


def reply_head(request_id: bytes, timings: bytes, notices: bytes) -> bytes:
    """Wire bytes of what a RankResponse says about its own request: as protobuf writes them.

    Args:
        request_id: UTF-8, below 128 bytes. timings: serialised Timings, below 128 bytes.
        notices: what `text_fields` gives for field 9.

    Raises:
        ValueError: one of the first two is too long.
    """
    if len(request_id) > 127 or len(timings) > 127:
        raise ValueError("request_id, timings: at most 127 bytes allowed")
    own = b"\x0a%c%b" % (len(request_id), request_id) if request_id else b""
    return b"%b\x3a%c%b%b" % (own, len(timings), timings, notices)


def text_fields(number: int, texts: Sequence[str]) -> bytes:
    """Wire bytes of a repeated string field; ``number`` below 16."""
    parts = []
    for text in texts:
        encoded = text.encode()
        parts.append(bytes([number << 3 | 2]) + varint(len(encoded)) + encoded)
    return b"".join(parts)


def uint_fields(values: Sequence[int], first: int = 1) -> bytes:
    """Wire bytes of unsigned fields numbered from ``first``, all below 16; zeros are left out."""
    return b"".join(bytes([(first + i) << 3]) + varint(value) for i, value in enumerate(values) if value)


def varint(value: int) -> bytes:
    """A number >= 0 as protobuf writes it."""
    if value < 0x80:
        return b"%c" % value
    if value < 0x4000:
        return b"%c%c" % (value & 0x7F | 0x80, value >> 7)
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def _check(
    slots: NDArray[np.int32],
    counts: NDArray[np.int32],
    scores: NDArray[np.float32],
    epochs: NDArray[np.int64],
    verify_by_ms: NDArray[np.int64],
    sources: NDArray[np.uint32],
    exploration: NDArray[np.float32],
    ids: NDArray[np.uint8],
    id_lengths: NDArray[np.uint8],
) -> None:
    require_array("slots", slots, np.int32, (None, None))
    require_array("counts", counts, np.int32, (slots.shape[0],))
    require_array("scores", scores, np.float32, slots.shape)
    require_array("epochs", epochs, np.int64, (None,))
    require_array("verify_by_ms", verify_by_ms, np.int64, epochs.shape)
    require_array("sources", sources, np.uint32, slots.shape)
    require_array("exploration", exploration, np.float32, slots.shape)
    require_array("ids", ids, np.uint8, (epochs.shape[0], ID_BYTES))
    require_array("id_lengths", id_lengths, np.uint8, epochs.shape)


def _raise_for(problem: int, width: int, rows: int) -> None:
    if problem == _BAD_COUNT:
        raise ValueError(f"counts: must lie in [0, {width}]")
    if problem == _BAD_SLOT:
        raise ValueError(f"slots: the first counts[b] entries must lie in [0, {rows})")
    if problem == _BAD_EPOCH:
        raise ValueError("epochs: must not be negative")
    if problem == _BAD_LENGTH:
        raise ValueError(f"id_lengths: must be at most {ID_BYTES}")


@njit(cache=True, nogil=True)
def _measure(
    slots: NDArray[np.int32],
    counts: NDArray[np.int32],
    epochs: NDArray[np.int64],
    id_lengths: NDArray[np.uint8],
    offsets: NDArray[np.int64],
) -> int:
    """Fills ``offsets``; returns the first problem, or _OK. Nothing is written before this passes."""
    at = np.int64(0)
    for b in range(counts.shape[0]):
        if counts[b] < 0 or counts[b] > slots.shape[1]:
            return _BAD_COUNT
        for place in range(counts[b]):
            slot = slots[b, place]
            if slot < 0 or slot >= epochs.shape[0]:
                return _BAD_SLOT
            if epochs[slot] < 0:
                return _BAD_EPOCH
            if id_lengths[slot] > ID_BYTES:
                return _BAD_LENGTH
            at += 37 + np.int64(id_lengths[slot])
        offsets[b + 1] = at
    return _OK


@njit(cache=True, nogil=True)
def _put4(entry: NDArray[np.uint8], tag: int, value: np.uint32) -> None:
    """Writes a tag and a little-endian value of four bytes."""
    entry[0] = np.uint8(tag)
    entry[1] = np.uint8(value)
    entry[2] = np.uint8(value >> np.uint32(8))
    entry[3] = np.uint8(value >> np.uint32(16))
    entry[4] = np.uint8(value >> np.uint32(24))


@njit(cache=True, nogil=True)
def _put8(entry: NDArray[np.uint8], tag: int, value: np.uint64) -> None:
    """Writes a tag and a little-endian value of eight bytes."""
    entry[0] = np.uint8(tag)
    for i in range(8):
        entry[1 + i] = np.uint8(value >> np.uint64(8 * i))


@njit(cache=True, nogil=True)
def _write(
    slots: NDArray[np.int32],
    counts: NDArray[np.int32],
    score_bits: NDArray[np.uint32],
    epochs: NDArray[np.int64],
    verify_by_ms: NDArray[np.int64],
    sources: NDArray[np.uint32],
    exploration_bits: NDArray[np.uint32],
    ids: NDArray[np.uint8],
    id_lengths: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    buffer: NDArray[np.uint8],
) -> None:
    # Into slices, at places that the compiler knows: with an offset added to each it would be several times slower.
    for b in range(counts.shape[0]):
        at = offsets[b]
        for place in range(counts[b]):
            slot = slots[b, place]
            length = np.int64(id_lengths[slot])
            head = buffer[at : at + 4]
            head[0], head[1], head[2], head[3] = 0x12, np.uint8(35 + length), 0x0A, np.uint8(length)
            name, stream_id = buffer[at + 4 : at + 4 + length], ids[slot]
            for i in range(length):
                name[i] = stream_id[i]
            at += 4 + length
            rest = buffer[at : at + 33]
            _put4(rest, 0x15, score_bits[b, place])
            _put8(rest[5:], 0x19, np.uint64(epochs[slot]))
            _put8(rest[14:], 0x21, np.uint64(verify_by_ms[slot]))
            _put4(rest[23:], 0x2D, sources[b, place])
            _put4(rest[28:], 0x35, exploration_bits[b, place])
            at += 33
