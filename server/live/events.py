"""One decoded batch of events as columns, and the way from the wire to it.

What producers send is read by compiled code (kernels/event_messages.py, kernels/event_arrow.py). It hands starts and
refused events on to `check_event`, which alone knows codes and words, and leaves batches that it does not understand to
`decode_by_message`, which says what every batch means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from liverank.v1 import ingest_pb2 as pb
from numpy.typing import NDArray

from kernels import fence
from kernels.event_messages import Outline, decode_messages, outline
from kernels.event_rows import (
    ENDS,
    IMPRESSIONS,
    KEPT,
    MAX_I63,
    REFUSED,
    STARTS,
    Names,
    Rows,
    pack_names,
)
from kernels.idmap import ID_BYTES, hash_ids, pack_ids
from server.config import TableSettings
from server.errors import InvalidRequest
from server.live.event_checks import Reject, StartedRow, check_event


@dataclass(frozen=True)
class Rejection:
    """One event that was not applied: its place in the batch, and why."""

    index: int
    sequence: int
    code: int
    message: str


@dataclass(frozen=True)
class EventColumns:
    """n events that passed every check that needs no table.

    index int32[n] (place in the batch), sequence uint64[n], ids uint8[n, 64], id_lengths uint8[n],
    kind uint8[n], epoch int64[n], time_ms int64[n], value float64[n] (count, seconds, amount in the
    reference currency, moderation action, or time that makes an end conditional), media_sequence int64[n],
    viewer_hash uint64[n] (0 none). started and ended_reason are keyed by row. impressions int32[m]: rows that are one,
    ascending, and the times of the reply that served each, Unix ms: served_ms, verify_by_ms int64[m].
    own_streams_only and max_streams (0: no limit): see EventBatch.
    """

    producer_id: str
    index: NDArray[np.int32]
    sequence: NDArray[np.uint64]
    ids: NDArray[np.uint8]
    id_lengths: NDArray[np.uint8]
    kind: NDArray[np.uint8]
    epoch: NDArray[np.int64]
    time_ms: NDArray[np.int64]
    value: NDArray[np.float64]
    media_sequence: NDArray[np.int64]
    viewer_hash: NDArray[np.uint64]
    started: dict[int, StartedRow] = field(default_factory=dict)
    ended_reason: dict[int, str] = field(default_factory=dict)
    impressions: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    served_ms: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    verify_by_ms: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    own_streams_only: bool = False
    max_streams: int = 0

    def __len__(self) -> int:
        return int(self.index.shape[0])


@dataclass(frozen=True)
class Marks:
    """What an EventBatch says of all its events."""

    producer_id: str
    own_streams_only: bool = False
    max_streams: int = 0


@dataclass(frozen=True)
class DecodedBatch:
    """The columns of the well-formed events, and the others with their reasons."""

    events: EventColumns
    rejected: list[Rejection]


def decode_batch(payload: bytes, settings: TableSettings) -> DecodedBatch:
    """Decodes a serialised EventBatch, in either form; the log keeps these bytes, so recovery runs the same code.

    Raises:
        InvalidRequest: the batch itself is malformed; nothing of it may be applied.
    """
    data = np.frombuffer(payload, np.uint8)
    found = outline(data)
    decoded = None if found is None else _decode_outlined(payload, data, found, settings)
    return decode_by_message(payload, settings) if decoded is None else decoded


def decode_by_message(payload: bytes, settings: TableSettings) -> DecodedBatch:
    """`decode_batch` by the generated classes alone, with an object per event: what it is measured by, and what reads
    batches that the compiled code does not understand.
    """
    batch = pb.EventBatch()
    try:
        batch.ParseFromString(payload)
    except Exception as error:
        raise InvalidRequest("EventBatch", f"not a valid message: {error}") from error
    marks = Marks(batch.producer_id, batch.own_streams_only, batch.max_streams)
    _check_batch(marks, len(batch.events), bool(batch.arrow), settings)
    if batch.arrow:
        # Imported here: pyarrow takes a while to load, and a server that only gets messages never needs it.
        from server.live.arrow_events import decode_arrow

        return decode_arrow(marks, batch.arrow, settings)
    return columns_of(marks, batch.events, settings)


def _check_batch(marks: Marks, events: int, has_arrow: bool, settings: TableSettings) -> None:
    name_bytes = len(marks.producer_id.encode())
    if not 1 <= name_bytes <= ID_BYTES:
        raise InvalidRequest("producer_id", f"1 to {ID_BYTES} bytes wanted, got {name_bytes}")
    if events > settings.max_events_per_batch:
        raise InvalidRequest("events", f"at most {settings.max_events_per_batch} per batch allowed, got {events}")
    if has_arrow and events:
        raise InvalidRequest("arrow", f"events or arrow wanted, got both ({events} events)")


def _decode_outlined(
    payload: bytes, data: NDArray[np.uint8], found: Outline, settings: TableSettings
) -> DecodedBatch | None:
    """None when the generated classes must look at the batch."""
    (at, length), (arrow_at, arrow_length) = found.producer, found.arrow
    marks = Marks(payload[at : at + length].decode(), found.own_streams_only, found.max_streams)
    try:
        _check_batch(marks, len(found.at), arrow_length > 0, settings)
    except InvalidRequest:
        return None  # what is told first does not depend on how the batch is read
    if arrow_length:
        from server.live.arrow_events import decode_arrow

        return decode_arrow(marks, memoryview(payload)[arrow_at : arrow_at + arrow_length], settings)
    rows = decode_messages(data, found.at, found.lengths, packed_currencies(settings.currencies))
    if rows is None:
        return None

    def message(place: int) -> Any:
        first = int(found.at[place])
        return pb.Event.FromString(payload[first : first + int(found.lengths[place])])

    try:
        return finished(marks, rows, data, message, settings)
    except DecodeError:  # of a start, whose payload nobody has read before
        return None


_packed: tuple[Mapping[str, float], Names] = ({}, pack_names({}))


def packed_currencies(currencies: Mapping[str, float]) -> Names:
    """The currency table as the kernels take it; made once per table, which is never changed."""
    global _packed
    known, packed = _packed
    if known is not currencies:
        packed = pack_names(currencies)
        _packed = (currencies, packed)
    return packed


def finished(
    marks: Marks, rows: Rows, data: NDArray[np.uint8], message: Callable[[int], Any], settings: TableSettings
) -> DecodedBatch:
    """The columns that a kernel has made of a batch, with what is looked at one by one: starts, and refused events.

    Args:
        rows: see `kernels.event_rows`. data: what the texts of ``rows`` lie in. message: the Event at a place.

    Raises:
        RuntimeError: the kernel refused what `check_event` accepts. Whatever ``message`` raises.
    """
    rejected: list[Rejection] = []
    for place in rows.refused[: rows.counts[REFUSED]].tolist():
        event = message(place)
        try:
            check_event(event, settings)
        except Reject as reject:
            rejected.append(Rejection(place, event.sequence, reject.code, str(reject)))
        else:
            raise RuntimeError(f"event {place}: the kernel refuses what the message checks accept")
    started: dict[int, StartedRow] = {}
    refused_starts: list[int] = []
    if rows.counts[STARTS]:
        for row in np.flatnonzero(rows.kind[: rows.counts[KEPT]] == fence.STARTED).tolist():
            event = message(int(rows.place[row]))
            try:
                start = check_event(event, settings)[2]
            except Reject as reject:
                refused_starts.append(row)
                rejected.append(Rejection(int(rows.place[row]), event.sequence, reject.code, str(reject)))
            else:
                assert start is not None
                started[row - len(refused_starts)] = start
    rejected.sort(key=lambda r: r.index)
    return DecodedBatch(_columns(marks, rows, refused_starts, data, started), rejected)


def _columns(
    marks: Marks, rows: Rows, without: list[int], data: NDArray[np.uint8], started: dict[int, StartedRow]
) -> EventColumns:
    """The filled rows as columns, but for those in ``without``."""
    kept, filled = int(rows.counts[KEPT]), Rows._fields.index("refused")
    parts: list[Any] = [c[:kept] for c in rows[:filled]]
    if without:
        parts = [np.delete(part, without, 0) for part in parts]
    columns = Rows(*parts, *rows[filled:])
    ended_reason: dict[int, str] = {}
    if rows.counts[ENDS]:
        for row in np.flatnonzero(columns.kind == fence.END).tolist():
            at = int(columns.reason_at[row])
            ended_reason[row] = data[at : at + int(columns.reason_length[row])].tobytes().decode()
    impressions = np.zeros(0, np.int32)
    if rows.counts[IMPRESSIONS]:
        impressions = np.flatnonzero(columns.kind == fence.IMPRESSION).astype(np.int32)
    return EventColumns(
        producer_id=marks.producer_id,
        index=columns.place,
        sequence=columns.sequence,
        ids=columns.ids,
        id_lengths=columns.id_lengths,
        kind=columns.kind,
        epoch=columns.epoch,
        time_ms=columns.time_ms,
        value=columns.value,
        media_sequence=columns.media_sequence,
        viewer_hash=columns.viewer_hash,
        started=started,
        ended_reason=ended_reason,
        impressions=impressions,
        served_ms=columns.served_ms[impressions],
        verify_by_ms=columns.verify_by_ms[impressions],
        own_streams_only=marks.own_streams_only,
        max_streams=marks.max_streams,
    )


def columns_of(marks: Marks, messages: Iterable[Any], settings: TableSettings) -> DecodedBatch:
    """The columns of Event messages, made one by one."""
    index: list[int] = []
    rows: list[tuple[int, int, int, int, float, int]] = []
    ids: list[bytes] = []
    viewers: list[bytes] = []
    started: dict[int, StartedRow] = {}
    ended_reason: dict[int, str] = {}
    impressions: list[tuple[int, int, int]] = []
    rejected: list[Rejection] = []
    for i, event in enumerate(messages):
        try:
            kind, value, start = check_event(event, settings)
        except Reject as reject:
            rejected.append(Rejection(i, event.sequence, reject.code, str(reject)))
            continue
        if start is not None:
            started[len(index)] = start
        elif kind == fence.IMPRESSION:
            impressions.append((len(index), event.impression.served_ms, event.impression.verify_by_ms))
        elif kind == fence.END:
            ended_reason[len(index)] = event.ended.reason
        media_sequence = min(event.heartbeat.media_sequence, MAX_I63) if kind == fence.HEARTBEAT else 0
        index.append(i)
        rows.append((event.sequence, kind, event.epoch, event.event_time_ms, value, media_sequence))
        ids.append(event.stream_id.encode())
        viewers.append(event.viewer_id.encode())
    sequence, kinds, epoch, time_ms, values, media = zip(*rows) if rows else ((), (), (), (), (), ())
    seen, served_ms, verify_by_ms = zip(*impressions) if impressions else ((), (), ())
    packed, lengths = pack_ids(ids)
    events = EventColumns(
        producer_id=marks.producer_id,
        index=np.array(index, dtype=np.int32),
        sequence=np.array(sequence, dtype=np.uint64),
        ids=packed,
        id_lengths=lengths,
        kind=np.array(kinds, dtype=np.uint8),
        epoch=np.array(epoch, dtype=np.int64),
        time_ms=np.array(time_ms, dtype=np.int64),
        value=np.array(values, dtype=np.float64),
        media_sequence=np.array(media, dtype=np.int64),
        viewer_hash=hash_ids(*pack_ids(viewers)),
        started=started,
        ended_reason=ended_reason,
        impressions=np.array(seen, dtype=np.int32),
        served_ms=np.array(served_ms, dtype=np.int64),
        verify_by_ms=np.array(verify_by_ms, dtype=np.int64),
        own_streams_only=marks.own_streams_only,
        max_streams=marks.max_streams,
    )
    return DecodedBatch(events, rejected)
