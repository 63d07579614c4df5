"""Counter events of the ingest bench as columns, and as each rival wants them: messages, Arrow, Redis commands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from liverank.v1 import ingest_pb2 as pb
from numpy.typing import NDArray

from kernels.counters import HALF_LIVES_MS
from loadtest.bench.catalogue import stream_id
from loadtest.bench.redis_rival import Pipeline, pipeline
from loadtest.load.fleet import zipf_draws

KINDS = ("viewer_count", "joined", "left", "watched", "chatted", "liked", "followed", "shared", "bid", "purchased")
_SHARES = np.array([0.10, 0.12, 0.08, 0.20, 0.16, 0.28, 0.02, 0.01, 0.02, 0.01])
_UNIQUE = ("joined", "chatted")  # their viewers are counted once each
_SECOND = {"viewer_count": "viewer_reports", "bid": "bid_value", "purchased": "purchase_value"}
SPREAD_MS = 1_000
MESSAGES, ARROW = "messages", "columns"


@dataclass(frozen=True)
class EventRows:
    """n events: kind int8[n] of KINDS, row int64[n] of the catalogue, viewer, value, time_ms int64[n], ascending."""

    kind: NDArray[np.int8]
    row: NDArray[np.int64]
    viewer: NDArray[np.int64]
    value: NDArray[np.int64]
    time_ms: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.kind)

    def parts(self, size: int) -> Iterator[slice]:
        """Batches of at most ``size``."""
        return (slice(first, min(first + size, len(self))) for first in range(0, len(self), size))


def draw(n: int, streams: int, now_ms: int, rng: np.random.Generator, zipf: float = 1.0) -> EventRows:
    """``n`` events of the second before ``now_ms``, on streams by popularity."""
    kind = rng.choice(len(KINDS), n, p=_SHARES).astype(np.int8)
    value = np.where(kind == KINDS.index("viewer_count"), rng.integers(0, 5_000, n), rng.integers(1, 60, n))
    time_ms = now_ms - SPREAD_MS + np.arange(n) * SPREAD_MS // n
    return EventRows(kind, zipf_draws(streams, zipf, n, rng), rng.integers(0, 1_000_000, n), value, time_ms)


def has_columns() -> bool:
    """Whether this build's EventBatch takes Arrow."""
    return "arrow" in pb.EventBatch.DESCRIPTOR.fields_by_name


def as_messages(rows: EventRows, part: slice, producer: str, first_sequence: int) -> bytes:
    """One serialised EventBatch of Event messages."""
    events = []
    for place in range(part.start, part.stop):
        kind, value = KINDS[rows.kind[place]], int(rows.value[place])
        event = pb.Event(
            sequence=first_sequence + place - part.start,
            stream_id=stream_id(int(rows.row[place])),
            event_time_ms=int(rows.time_ms[place]),
        )
        if kind in _UNIQUE:
            event.viewer_id = f"viewer-{rows.viewer[place]}"
        if kind == "viewer_count":
            event.viewer_count.count = value
        elif kind == "watched":
            event.watched.seconds = value
        elif kind in ("bid", "purchased"):
            getattr(event, kind).amount_minor = value
            getattr(event, kind).currency = "EUR"
        else:
            getattr(event, kind).count = 1
        events.append(event)
    payload: bytes = pb.EventBatch(producer_id=producer, events=events).SerializeToString()
    return payload


def as_arrow(rows: EventRows, part: slice, producer: str, first_sequence: int) -> bytes:
    """One serialised EventBatch with the same events as an Arrow IPC stream; ids plain, as most producers have them."""
    import pyarrow as pa

    kind, n = rows.kind[part], part.stop - part.start
    named = np.array(KINDS)[kind]
    unique, money = np.isin(named, _UNIQUE), np.isin(named, ("bid", "purchased"))
    value, watched, counted = rows.value[part], named == "watched", named == "viewer_count"
    viewers = [f"viewer-{v}" if u else None for v, u in zip(rows.viewer[part].tolist(), unique.tolist(), strict=True)]
    columns = {
        "sequence": pa.array(np.arange(first_sequence, first_sequence + n, dtype=np.uint64)),
        "stream_id": pa.array([stream_id(row) for row in rows.row[part].tolist()], pa.utf8()),
        "event_time_ms": pa.array(rows.time_ms[part]),
        "kind": pa.DictionaryArray.from_arrays(pa.array(kind), pa.array(list(KINDS))),
        "viewer_id": pa.array(viewers, pa.utf8()),
        "count": pa.array(np.where(counted, value, 1).astype(np.uint32)),
        "seconds": pa.array(np.where(watched, value, 0).astype(np.float32)),
        "amount_minor": pa.array(np.where(money, value, 0).astype(np.int64)),
        "currency": pa.array(["EUR" if paid else None for paid in money.tolist()], pa.utf8()),
    }
    batch = pa.record_batch(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    payload: bytes = pb.EventBatch(producer_id=producer, arrow=sink.getvalue().to_pybytes()).SerializeToString()
    return payload


def as_redis(rows: EventRows, part: slice, landmark_ms: int) -> Pipeline:
    """The same counter updates as commands: forward-decayed sums at three half-lives, and distinct viewers.

    One hash per stream. The weights are computed here, not by Redis. What the live table does besides (sequence and
    epoch fences, leases, one ranking table) is not asked of Redis at all.
    """
    age_ms = rows.time_ms[part] - landmark_ms
    growth = np.stack([2.0 ** (age_ms / half_life) for half_life in HALF_LIVES_MS], 1).tolist()
    return pipeline(_commands(rows, part, growth))


def as_redis_counts(rows: EventRows, part: slice) -> Pipeline:
    """One HINCRBY per event and nothing else: the least that could be called counting."""
    return pipeline(
        (1, (b"HINCRBY", _key(rows, place), KINDS[rows.kind[place]].encode(), b"1"))
        for place in range(part.start, part.stop)
    )


def _commands(rows: EventRows, part: slice, growth: list[list[float]]) -> Iterator[tuple[int, tuple[bytes, ...]]]:
    for place in range(part.start, part.stop):
        kind, key = KINDS[rows.kind[place]], _key(rows, place)
        value = float(rows.value[place])
        first = "viewers" if kind == "viewer_count" else kind
        amounts = {first: value if kind in ("viewer_count", "watched") else 1.0}
        if kind in _SECOND:
            amounts[_SECOND[kind]] = 1.0 if kind == "viewer_count" else value
        for counter, amount in amounts.items():
            for half_life, factor in zip(HALF_LIVES_MS, growth[place - part.start], strict=True):
                words = (b"HINCRBYFLOAT", key, b"%b:%d" % (counter.encode(), half_life), b"%.9g" % (amount * factor))
                yield 2, words
        if kind in _UNIQUE:
            yield 1, (b"PFADD", b"u:%b:%b" % (kind.encode(), key), b"viewer-%d" % rows.viewer[place])


def _key(rows: EventRows, place: int) -> bytes:
    return stream_id(int(rows.row[place])).encode()
