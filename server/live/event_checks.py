"""What makes an Event message well-formed: the one place that knows reject codes and their words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from liverank.v1 import ingest_pb2 as pb
from numpy.typing import NDArray

from kernels import fence
from kernels.event_rows import MAX_AMOUNT_MINOR, MAX_COUNT, MAX_I63
from kernels.event_rows import MAX_TIME_MS as MAX_TIME_MS  # for whoever makes events, too
from kernels.event_rows import MAX_WATCH_SECONDS as MAX_WATCH_SECONDS
from kernels.idmap import ID_BYTES
from server.config import TableSettings

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
    return length_problem(float(np.linalg.norm(embedding.astype(np.float64))))


def length_problem(norm: float) -> str:
    """What is wrong with an embedding of this length; "" when nothing is."""
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
    _too_long("impression.model_version", impression.model_version, ID_BYTES)
    for name in ("served_ms", "verify_by_ms"):
        if not 0 < getattr(impression, name) < MAX_TIME_MS:
            raise Reject(
                pb.VALUE_OUT_OF_RANGE,
                f"impression.{name}: 1 to {MAX_TIME_MS - 1} allowed, got {getattr(impression, name)}",
            )
    if not 0.0 <= impression.propensity <= 1.0:  # also true for NaN
        raise Reject(pb.VALUE_OUT_OF_RANGE, f"impression.propensity: 0 to 1 allowed, got {impression.propensity}")


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
