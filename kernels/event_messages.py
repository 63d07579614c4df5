"""Events off the wire: a serialised EventBatch to columns, without an object per event.

Reads what every producer sends: known fields with their wire types, and unknown fields of the simple wire types
(skipped). Whatever else protobuf allows or refuses (groups, two payloads in one event, another wire type, bytes cut
off, text that is not UTF-8, …) is left to the generated classes, which then decide about the whole batch: `outline`
and `decode_messages` say "not sure" instead of guessing. So what is accepted never depends on this file.

The wire format is described in https://protobuf.dev/programming-guides/encoding/; the fields in ingest.proto.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kernels import event_rows as fields
from kernels import fence
from kernels.event_rows import Names, Rows, check_rows
from kernels.utf8 import valid_utf8

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_TEXT = _BYTES + 8
"""Bytes that must be UTF-8."""
_NONE = -1

_HEADER, _BATCH = 0, 1
_WIRE = np.full((32, 32), _NONE, np.int8)
"""How field f of a message is encoded. Rows: of Event itself (_HEADER), of EventBatch (_BATCH), of the payload of kind
k (k; a start's is not looked at here)."""
_INTO = np.full((32, 32), _NONE, np.int8)
"""Where its number goes, or its place and in the column after that its length."""
_EVENTS, _PAYLOAD = 100, 101
"""Or that it is one of the events, or an event's payload."""
_PRODUCER, _ARROW, _OWN_ONLY, _MAX_STREAMS, _N_BATCH = 0, 2, 4, 5, 6
"""Columns that a batch fills."""

for _message, _fields in {
    _HEADER: {
        1: (_VARINT, fields.SEQUENCE), 2: (_TEXT, fields.STREAM_AT), 3: (_VARINT, fields.EPOCH),
        4: (_VARINT, fields.TIME_MS), 5: (_TEXT, fields.VIEWER_AT),
        **dict.fromkeys(range(fence.STARTED, fence.IMPRESSION + 1), (_BYTES, _PAYLOAD)),
    },
    _BATCH: {
        1: (_TEXT, _PRODUCER), 2: (_BYTES, _EVENTS), 3: (_BYTES, _ARROW), 4: (_VARINT, _OWN_ONLY),
        5: (_VARINT, _MAX_STREAMS),
    },
    **{kind: {1: (_VARINT, fields.FIRST)} for kind in (fence.HEARTBEAT, fence.VIEWER_COUNT, fence.MODERATED)},
    **{kind: {1: (_VARINT, fields.FIRST)} for kind in fence.INTERACTIONS},
    fence.END: {1: (_TEXT, fields.TEXT_AT), 2: (_VARINT, fields.SINCE_MS)},
    fence.WATCHED: {1: (_FIXED32, fields.FRACTION)},
    **{kind: {1: (_VARINT, fields.FIRST), 2: (_TEXT, fields.TEXT_AT)} for kind in (fence.BID, fence.PURCHASED)},
    fence.REPORTED: {1: (_TEXT, fields.TEXT_AT)},
    # Position and applied_offset are not used, but to be read as they are written.
    fence.IMPRESSION: {
        1: (_TEXT, fields.TEXT_AT), 2: (_VARINT, fields.SINCE_MS), 3: (_VARINT, fields.VERIFY_BY_MS),
        4: (_VARINT, fields.FIRST), 5: (_FIXED32, fields.FRACTION), 6: (_TEXT, fields.VERSION_AT),
        7: (_VARINT, fields.FIRST),
    },
}.items():  # fmt: skip
    for _field, (_wire, _into) in _fields.items():
        _WIRE[_message, _field], _INTO[_message, _field] = _wire, _into


class Outline(NamedTuple):
    """Where the parts of a serialised EventBatch lie: (at, length) of producer_id and arrow, (0, 0) when not set; at
    int64[n] and lengths int64[n] of its events."""

    producer: tuple[int, int]
    arrow: tuple[int, int]
    own_streams_only: bool
    max_streams: int
    at: NDArray[np.int64]
    lengths: NDArray[np.int64]


@njit(cache=True, nogil=True)
def _walk(
    data: NDArray[np.uint8],
    at_in: NDArray[np.int64],
    lengths_in: NDArray[np.int64],
    outer: int,
    read: NDArray[np.int64],
    events_at: NDArray[np.int64],
    events_lengths: NDArray[np.int64],
) -> int:
    """Reads messages of kind ``outer``, one per row of ``read``; the number of events seen, or -1: not sure.

    One function on purpose: a call that takes an array costs more than the few bytes that it would read.
    """
    events = 0
    for i in range(at_in.shape[0]):
        at, end = at_in[i], at_in[i] + lengths_in[i]
        message, payload_at, payload_end = outer, at, at
        while True:
            if at >= end:
                if message != _HEADER or read[i, fields.KIND] == 0 or read[i, fields.KIND] == fence.STARTED:
                    break
                message, at, end = read[i, fields.KIND], payload_at, payload_end
                continue
            tag, shift, byte = np.int64(0), 0, np.int64(128)
            while byte >= 128:
                if at >= end or shift > 28:
                    return _NONE
                byte = np.int64(data[at])
                tag |= (byte & 127) << shift
                at += 1
                shift += 7
            field, wire = tag >> 3, tag & 7
            if field == 0 or tag > 0xFFFFFFFF:
                return _NONE
            number, start = np.int64(0), at
            if wire == _VARINT or wire == _BYTES:  # noqa: SIM109 - compiled, and not to a list
                most, shift, byte = (63 if wire == _VARINT else 28), 0, np.int64(128)
                while byte >= 128:
                    if at >= end or shift > most:
                        return _NONE
                    byte = np.int64(data[at])
                    if shift == 63 and byte > 1:
                        return _NONE  # more than 64 bits
                    number |= (byte & 127) << shift
                    at += 1
                    shift += 7
                if wire == _BYTES:
                    start = at
                    if number > end - at:
                        return _NONE
                    at += number
            elif wire == _FIXED32:
                if end - at < 4:
                    return _NONE
                for k in range(4):
                    number |= np.int64(data[at + k]) << (8 * k)
                at += 4
            elif wire == _FIXED64:
                at += 8
                if at > end:
                    return _NONE
            else:
                return _NONE
            known = _WIRE[message, field] if field < 32 else _NONE
            if known == _NONE:
                continue
            if wire != known & 7:
                return _NONE
            if known == _TEXT:
                high = np.uint8(0)
                for k in range(start, at):
                    high |= data[k]
                if high >= 128 and not valid_utf8(data, start, at):
                    return _NONE
            into = _INTO[message, field]
            if into == _EVENTS:
                if events < events_at.shape[0]:
                    events_at[events], events_lengths[events] = start, number
                events += 1
                continue
            # Of a field that comes twice the last counts; payloads would have to be merged.
            if into == _PAYLOAD:
                if read[i, fields.KIND] != 0:
                    return _NONE
                read[i, fields.KIND], payload_at, payload_end = field, start, at
            elif wire == _BYTES:
                read[i, into], read[i, into + 1] = start, number
            else:
                read[i, into] = number
        # A varint is cut to the width of its field, as the generated classes do.
        if message == fence.MODERATED:
            read[i, fields.FIRST] = np.int64(np.int32(read[i, fields.FIRST] & 0xFFFFFFFF))
        elif (
            message > fence.STARTED
            and message != fence.HEARTBEAT
            and message != fence.BID
            and message != fence.PURCHASED
        ):
            read[i, fields.FIRST] &= 0xFFFFFFFF
    return events


def outline(data: NDArray[np.uint8]) -> Outline | None:
    """The parts of a serialised EventBatch uint8[m]; None when the generated classes must look at it.

    Cost: two passes over the batch's own fields; its events are stepped over.
    """
    begin, length, none = np.zeros(1, np.int64), np.array([len(data)]), np.zeros(0, np.int64)
    found = np.zeros((1, _N_BATCH), np.int64)
    n = _walk(data, begin, length, _BATCH, found, none, none)
    if n < 0:
        return None
    at, lengths = none, none
    if n:
        at, lengths = np.zeros(n, np.int64), np.zeros(n, np.int64)
        _walk(data, begin, length, _BATCH, found, at, lengths)
    producer_at, producer_length, arrow_at, arrow_length, own, most = found[0].tolist()
    return Outline((producer_at, producer_length), (arrow_at, arrow_length), own != 0, most & 0xFFFFFFFF, at, lengths)


def decode_messages(
    data: NDArray[np.uint8], at: NDArray[np.int64], lengths: NDArray[np.int64], currencies: Names
) -> Rows | None:
    """Checked rows of the n Event messages at ``data[at[i] : at[i] + lengths[i]]``, as `outline` found them.

    The payload of a start is not looked at: its row is kept when its header is sound. None when the generated classes
    must look at the batch.

    Args:
        data: uint8[m]. at, lengths: int64[n], inside of ``data``.

    Raises:
        ValueError: a message lies outside of ``data``.

    Cost: one pass over the bytes; about 280 bytes written per event.
    """
    if len(at) and not (int(at.min()) >= 0 and int(lengths.min()) >= 0 and int((at + lengths).max()) <= len(data)):
        raise ValueError(f"at, lengths: messages inside of {len(data)} bytes wanted")
    read, none = np.zeros((len(at), fields.N_READ), np.int64), np.zeros(0, np.int64)
    return check_rows(data, read, currencies) if _walk(data, at, lengths, _HEADER, read, none, none) >= 0 else None
