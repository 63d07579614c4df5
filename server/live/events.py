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
    MAX_AMOUNT_MINOR,
    MAX_COUNT,
    MAX_I63,
    REFUSED,
    STARTS,
    Names,
    Rows,
    pack_names,
)
from kernels.event_rows import MAX_TIME_MS as MAX_TIME_MS  # for whoever builds events, too
from kernels.event_rows import MAX_WATCH_SECONDS as MAX_WATCH_SECONDS
from kernels.idmap import ID_BYTES, hash_ids, pack_ids
from server.config import TableSettings
from server.errors import InvalidRequest

MAX_TITLE_BYTES = 256
MAX_TAGS = 16
LEAST_NORM, MOST_NORM = 1e-6, 1e6
"""Length of an embedding that is not zero: beyond it, something overflowed or was never filled."""


@dataclass(frozen=True)
class StartedRow:
    """Attributes of one started event. ``embedding`` float32[D], or None when not given."""

    creator_id: str
    title: str
    language: str
    category: str
    region: str
    age_rating: int
    embedding: NDArray[np.float32] | None
    tags: tuple[str, ...]


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


class Reject(Exception):
    """Why one event is refused. Control flow of decoding; never seen outside of it."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def _too_long(name: str, value: str, limit: int) -> bytes:
    encoded = value.encode()
    if len(encoded) > limit:
        raise Reject(pb.FIELD_TOO_LONG, f"{name}: at most {limit} bytes allowed, got {len(encoded)}")
    return encoded


def _count(name: str, count: int) -> float:
    if count > MAX_COUNT:
        raise Reject(pb.VALUE_OUT_OF_RANGE, f"{name}: 0 to {MAX_COUNT} allowed, got {count}")
    return float(count)


def norm_problem(embedding: NDArray[np.float32]) -> str:
    """What is wrong with the length of a finite vector float32[D]; "" when nothing is. All zero is allowed."""
    norm = float(np.linalg.norm(embedding.astype(np.float64)))
    if norm == 0.0 or LEAST_NORM <= norm <= MOST_NORM:
        return ""
    return f"a length of 0, or from {LEAST_NORM:g} to {MOST_NORM:g}, wanted, got {norm:g}"


def _started(event: Any, settings: TableSettings) -> StartedRow:
    started = event.started
    if not started.creator_id:
        raise Reject(pb.CREATOR_MISSING, "started.creator_id: 1 to 64 bytes wanted, got none")
    for name in ("creator_id", "language", "category", "region"):
        _too_long(f"started.{name}", getattr(started, name), ID_BYTES)
    _too_long("started.title", started.title, MAX_TITLE_BYTES)
    tags = tuple(started.tags)
    if len(tags) > MAX_TAGS:
        raise Reject(pb.VALUE_OUT_OF_RANGE, f"started.tags: at most {MAX_TAGS} allowed, got {len(tags)}")
    for tag in tags:
        _too_long("started.tags", tag, ID_BYTES)
    if started.age_rating > 21:
        raise Reject(pb.VALUE_OUT_OF_RANGE, f"started.age_rating: 0 to 21 allowed, got {started.age_rating}")
    embedding: NDArray[np.float32] | None = None
    if len(started.embedding):
        if len(started.embedding) != settings.embedding_dim:
            raise Reject(
                pb.EMBEDDING_SIZE,
                f"started.embedding: 0 or {settings.embedding_dim} floats wanted, got {len(started.embedding)}",
            )
        embedding = np.array(started.embedding, dtype=np.float32)
        if not np.isfinite(embedding).all():
            raise Reject(pb.EMBEDDING_NOT_FINITE, "started.embedding: finite floats wanted, got NaN or infinity")
        if problem := norm_problem(embedding):
            raise Reject(pb.VALUE_OUT_OF_RANGE, f"started.embedding: {problem}")
    return StartedRow(
        started.creator_id, started.title, started.language, started.category, started.region,
        started.age_rating, embedding, tags,
    )  # fmt: skip


def _check_impression(event: Any) -> None:
    impression = event.impression
    _too_long("impression.request_id", impression.request_id, ID_BYTES)
    for name in ("served_ms", "verify_by_ms"):
        if not 0 < getattr(impression, name) < MAX_TIME_MS:
            raise Reject(
                pb.VALUE_OUT_OF_RANGE,
                f"impression.{name}: 1 to {MAX_TIME_MS - 1} allowed, got {getattr(impression, name)}",
            )


def _value(event: Any, kind: int, settings: TableSettings) -> float:
    """The number an event carries, checked; its meaning depends on the kind."""
    if kind == fence.VIEWER_COUNT:
        return _count("viewer_count.count", event.viewer_count.count)
    if kind == fence.WATCHED:
        seconds = event.watched.seconds
        if not (0.0 <= seconds <= MAX_WATCH_SECONDS):  # also false for NaN
            raise Reject(pb.VALUE_OUT_OF_RANGE, f"watched.seconds: 0 to {MAX_WATCH_SECONDS:.0f} allowed, got {seconds}")
        return float(seconds)
    if kind in (fence.BID, fence.PURCHASED):
        name = "bid" if kind == fence.BID else "purchased"
        money = event.bid if kind == fence.BID else event.purchased
        if not (0 <= money.amount_minor <= MAX_AMOUNT_MINOR):
            raise Reject(
                pb.VALUE_OUT_OF_RANGE,
                f"{name}.amount_minor: 0 to {MAX_AMOUNT_MINOR} allowed, got {money.amount_minor}",
            )
        rate = settings.currencies.get(money.currency)
        if rate is None:
            raise Reject(
                pb.CURRENCY_UNKNOWN,
                f"{name}.currency: one of {', '.join(sorted(settings.currencies))} wanted, got {money.currency[:16]!r}",
            )
        return float(money.amount_minor * rate)
    if kind == fence.REPORTED:
        _too_long("reported.reason", event.reported.reason, ID_BYTES)
        return 1.0
    if kind == fence.MODERATED:
        if event.moderated.action not in (fence.BLOCK, fence.UNBLOCK, fence.MARK_SPAM, fence.CLEAR_SPAM):
            raise Reject(
                pb.VALUE_OUT_OF_RANGE,
                f"moderated.action: BLOCK, UNBLOCK, MARK_SPAM or CLEAR_SPAM wanted, got {event.moderated.action}",
            )
        return float(event.moderated.action)
    if kind == fence.END:
        _too_long("ended.reason", event.ended.reason, ID_BYTES)
        since_ms = event.ended.only_if_not_renewed_since_ms
        if not 0 <= since_ms < MAX_TIME_MS:
            raise Reject(
                pb.VALUE_OUT_OF_RANGE,
                f"ended.only_if_not_renewed_since_ms: 0 to {MAX_TIME_MS - 1} allowed, got {since_ms}",
            )
        return float(since_ms)
    if kind in INTERACTIONS:
        return max(1.0, _count("count", getattr(event, INTERACTIONS[kind]).count))
    return 0.0


INTERACTIONS = {
    fence.JOINED: "joined", fence.LEFT: "left", fence.CHATTED: "chatted", fence.LIKED: "liked",
    fence.FOLLOWED: "followed", fence.SHARED: "shared",
}  # fmt: skip
KINDS = {
    "started": fence.STARTED, "heartbeat": fence.HEARTBEAT, "ended": fence.END,
    "viewer_count": fence.VIEWER_COUNT, "joined": fence.JOINED, "left": fence.LEFT,
    "watched": fence.WATCHED, "chatted": fence.CHATTED, "liked": fence.LIKED,
    "followed": fence.FOLLOWED, "shared": fence.SHARED, "bid": fence.BID,
    "purchased": fence.PURCHASED, "reported": fence.REPORTED, "moderated": fence.MODERATED,
    "impression": fence.IMPRESSION,
}  # fmt: skip
KIND_NAMES = {number: name for name, number in KINDS.items()}
NEEDS_EPOCH = (fence.STARTED, fence.HEARTBEAT, fence.END, fence.IMPRESSION)


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


def check_event(event: Any, settings: TableSettings) -> tuple[int, float, StartedRow | None]:
    """(kind, value, attributes of a start) of one Event message.

    Raises:
        Reject: it is malformed; says how.
    """
    kind = _check_header(event, event.stream_id.encode())
    _too_long("viewer_id", event.viewer_id, ID_BYTES)
    value = _value(event, kind, settings)
    if kind == fence.STARTED:
        return kind, value, _started(event, settings)
    if kind == fence.IMPRESSION:
        _check_impression(event)
    return kind, value, None


def _check_header(event: Any, stream_id: bytes) -> int:
    """Kind of a well-formed event; raises Reject otherwise."""
    case = event.WhichOneof("payload")
    if case is None:
        raise Reject(pb.MISSING_PAYLOAD, "payload: one of the oneof cases must be set")
    kind = KINDS[case]
    if not 1 <= len(stream_id) <= ID_BYTES:
        raise Reject(pb.STREAM_ID_INVALID, f"stream_id: 1 to {ID_BYTES} bytes wanted, got {len(stream_id)}")
    if event.sequence == 0:
        raise Reject(pb.SEQUENCE_INVALID, "sequence: 1 or more wanted, got 0")
    if not 0 < event.event_time_ms < MAX_TIME_MS:
        raise Reject(pb.TIME_INVALID, f"event_time_ms: 1 to {MAX_TIME_MS - 1} allowed, got {event.event_time_ms}")
    if kind in NEEDS_EPOCH and event.epoch == 0:
        raise Reject(pb.EPOCH_MISSING, f"epoch: 1 or more wanted for {case}, got 0")
    if event.epoch > MAX_I63:
        raise Reject(pb.VALUE_OUT_OF_RANGE, f"epoch: at most {MAX_I63} allowed, got {event.epoch}")
    return kind
