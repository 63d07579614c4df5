"""One decoded batch of events as columns, and the way from the wire to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from liverank.v1 import ingest_pb2 as pb
from numpy.typing import NDArray

from kernels import fence
from kernels.idmap import ID_BYTES, hash_ids, pack_ids
from server.config import TableSettings
from server.errors import InvalidRequest

MAX_TITLE_BYTES = 256
MAX_TAGS = 16
MAX_AMOUNT_MINOR = 1_000_000_000_000
MAX_COUNT = 1_000_000_000
MAX_WATCH_SECONDS = 86_400.0
MAX_TIME_MS = 4_102_444_800_000  # 2100-01-01
MAX_I63 = (1 << 63) - 1
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
    reference currency, or moderation action), media_sequence int64[n], viewer_hash uint64[n] (0 none).
    started and ended_reason are keyed by row. own_streams_only and max_streams (0: no limit): see EventBatch.
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
    own_streams_only: bool = False
    max_streams: int = 0

    def __len__(self) -> int:
        return int(self.index.shape[0])


@dataclass(frozen=True)
class DecodedBatch:
    """The columns of the well-formed events, and the others with their reasons."""

    events: EventColumns
    rejected: list[Rejection]


class _Reject(Exception):
    """Control flow inside this file; never seen outside."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def _too_long(name: str, value: str, limit: int) -> bytes:
    encoded = value.encode()
    if len(encoded) > limit:
        raise _Reject(pb.FIELD_TOO_LONG, f"{name}: at most {limit} bytes allowed, got {len(encoded)}")
    return encoded


def _count(name: str, count: int) -> float:
    if count > MAX_COUNT:
        raise _Reject(pb.VALUE_OUT_OF_RANGE, f"{name}: 0 to {MAX_COUNT} allowed, got {count}")
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
        raise _Reject(pb.CREATOR_MISSING, "started.creator_id: 1 to 64 bytes wanted, got none")
    for name in ("creator_id", "language", "category", "region"):
        _too_long(f"started.{name}", getattr(started, name), ID_BYTES)
    _too_long("started.title", started.title, MAX_TITLE_BYTES)
    tags = tuple(started.tags)
    if len(tags) > MAX_TAGS:
        raise _Reject(pb.VALUE_OUT_OF_RANGE, f"started.tags: at most {MAX_TAGS} allowed, got {len(tags)}")
    for tag in tags:
        _too_long("started.tags", tag, ID_BYTES)
    if started.age_rating > 21:
        raise _Reject(pb.VALUE_OUT_OF_RANGE, f"started.age_rating: 0 to 21 allowed, got {started.age_rating}")
    embedding: NDArray[np.float32] | None = None
    if len(started.embedding):
        if len(started.embedding) != settings.embedding_dim:
            raise _Reject(
                pb.EMBEDDING_SIZE,
                f"started.embedding: 0 or {settings.embedding_dim} floats wanted, got {len(started.embedding)}",
            )
        embedding = np.array(started.embedding, dtype=np.float32)
        if not np.isfinite(embedding).all():
            raise _Reject(pb.EMBEDDING_NOT_FINITE, "started.embedding: finite floats wanted, got NaN or infinity")
        if problem := norm_problem(embedding):
            raise _Reject(pb.VALUE_OUT_OF_RANGE, f"started.embedding: {problem}")
    return StartedRow(
        started.creator_id, started.title, started.language, started.category, started.region,
        started.age_rating, embedding, tags,
    )  # fmt: skip


def _value(event: Any, kind: int, settings: TableSettings) -> float:
    """The number an event carries, checked; its meaning depends on the kind."""
    if kind == fence.VIEWER_COUNT:
        return _count("viewer_count.count", event.viewer_count.count)
    if kind == fence.WATCHED:
        seconds = event.watched.seconds
        if not (0.0 <= seconds <= MAX_WATCH_SECONDS):  # also false for NaN
            raise _Reject(
                pb.VALUE_OUT_OF_RANGE, f"watched.seconds: 0 to {MAX_WATCH_SECONDS:.0f} allowed, got {seconds}"
            )
        return float(seconds)
    if kind in (fence.BID, fence.PURCHASED):
        name = "bid" if kind == fence.BID else "purchased"
        money = event.bid if kind == fence.BID else event.purchased
        if not (0 <= money.amount_minor <= MAX_AMOUNT_MINOR):
            raise _Reject(
                pb.VALUE_OUT_OF_RANGE,
                f"{name}.amount_minor: 0 to {MAX_AMOUNT_MINOR} allowed, got {money.amount_minor}",
            )
        rate = settings.currencies.get(money.currency)
        if rate is None:
            raise _Reject(
                pb.CURRENCY_UNKNOWN,
                f"{name}.currency: one of {', '.join(sorted(settings.currencies))} wanted, got {money.currency[:16]!r}",
            )
        return float(money.amount_minor * rate)
    if kind == fence.REPORTED:
        _too_long("reported.reason", event.reported.reason, ID_BYTES)
        return 1.0
    if kind == fence.MODERATED:
        if event.moderated.action not in (fence.BLOCK, fence.UNBLOCK, fence.MARK_SPAM, fence.CLEAR_SPAM):
            raise _Reject(
                pb.VALUE_OUT_OF_RANGE,
                f"moderated.action: BLOCK, UNBLOCK, MARK_SPAM or CLEAR_SPAM wanted, got {event.moderated.action}",
            )
        return float(event.moderated.action)
    if kind == fence.END:
        _too_long("ended.reason", event.ended.reason, ID_BYTES)
    if kind in _INTERACTIONS:
        return max(1.0, _count("count", getattr(event, _INTERACTIONS[kind]).count))
    return 0.0


_INTERACTIONS = {
    fence.JOINED: "joined", fence.LEFT: "left", fence.CHATTED: "chatted", fence.LIKED: "liked",
    fence.FOLLOWED: "followed", fence.SHARED: "shared",
}  # fmt: skip
_KINDS = {
    "started": fence.STARTED, "heartbeat": fence.HEARTBEAT, "ended": fence.END,
    "viewer_count": fence.VIEWER_COUNT, "joined": fence.JOINED, "left": fence.LEFT,
    "watched": fence.WATCHED, "chatted": fence.CHATTED, "liked": fence.LIKED,
    "followed": fence.FOLLOWED, "shared": fence.SHARED, "bid": fence.BID,
    "purchased": fence.PURCHASED, "reported": fence.REPORTED, "moderated": fence.MODERATED,
}  # fmt: skip
KIND_NAMES = {number: name for name, number in _KINDS.items()}
_NEEDS_EPOCH = (fence.STARTED, fence.HEARTBEAT, fence.END)


def decode_batch(payload: bytes, settings: TableSettings) -> DecodedBatch:
    """Decodes a serialised EventBatch; the log keeps these bytes, so recovery runs the same code.

    Raises:
        InvalidRequest: the batch itself is malformed; nothing of it may be applied.
    """
    batch = pb.EventBatch()
    try:
        batch.ParseFromString(payload)
    except Exception as error:
        raise InvalidRequest("EventBatch", f"not a valid message: {error}") from error
    if not 1 <= len(batch.producer_id.encode()) <= ID_BYTES:
        raise InvalidRequest("producer_id", f"1 to {ID_BYTES} bytes wanted, got {len(batch.producer_id.encode())}")
    if len(batch.events) > settings.max_events_per_batch:
        raise InvalidRequest(
            "events", f"at most {settings.max_events_per_batch} per batch allowed, got {len(batch.events)}"
        )
    index: list[int] = []
    rows: list[tuple[int, int, int, int, float, int]] = []
    ids: list[bytes] = []
    viewers: list[bytes] = []
    started: dict[int, StartedRow] = {}
    ended_reason: dict[int, str] = {}
    rejected: list[Rejection] = []
    for i, event in enumerate(batch.events):
        try:
            stream_id = event.stream_id.encode()
            kind = _check_header(event, stream_id)
            viewer_id = _too_long("viewer_id", event.viewer_id, ID_BYTES)
            value = _value(event, kind, settings)
            if kind == fence.STARTED:
                started[len(index)] = _started(event, settings)
            elif kind == fence.END:
                ended_reason[len(index)] = event.ended.reason
        except _Reject as reject:
            rejected.append(Rejection(i, event.sequence, reject.code, str(reject)))
            continue
        media_sequence = min(event.heartbeat.media_sequence, MAX_I63) if kind == fence.HEARTBEAT else 0
        index.append(i)
        rows.append((event.sequence, kind, event.epoch, event.event_time_ms, value, media_sequence))
        ids.append(stream_id)
        viewers.append(viewer_id)
    sequence, kinds, epoch, time_ms, values, media = zip(*rows) if rows else ((), (), (), (), (), ())
    packed, lengths = pack_ids(ids)
    events = EventColumns(
        producer_id=batch.producer_id,
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
        own_streams_only=batch.own_streams_only,
        max_streams=batch.max_streams,
    )
    return DecodedBatch(events, rejected)


def _check_header(event: Any, stream_id: bytes) -> int:
    """Kind of a well-formed event; raises _Reject otherwise."""
    case = event.WhichOneof("payload")
    if case is None:
        raise _Reject(pb.MISSING_PAYLOAD, "payload: one of the oneof cases must be set")
    kind = _KINDS[case]
    if not 1 <= len(stream_id) <= ID_BYTES:
        raise _Reject(pb.STREAM_ID_INVALID, f"stream_id: 1 to {ID_BYTES} bytes wanted, got {len(stream_id)}")
    if event.sequence == 0:
        raise _Reject(pb.SEQUENCE_INVALID, "sequence: 1 or more wanted, got 0")
    if not 0 < event.event_time_ms < MAX_TIME_MS:
        raise _Reject(pb.TIME_INVALID, f"event_time_ms: 1 to {MAX_TIME_MS - 1} allowed, got {event.event_time_ms}")
    if kind in _NEEDS_EPOCH and event.epoch == 0:
        raise _Reject(pb.EPOCH_MISSING, f"epoch: 1 or more wanted for {case}, got 0")
    if event.epoch > MAX_I63:
        raise _Reject(pb.VALUE_OUT_OF_RANGE, f"epoch: at most {MAX_I63} allowed, got {event.epoch}")
    return kind
