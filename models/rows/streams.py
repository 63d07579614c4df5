"""Rows of every live stream, every so many minutes of the log's clock, and how its crowd grew afterwards.

The state at minute t holds the records stamped up to t and no later one. Labels are sums of events by their own time,
taken when the labels of t are closed; see `models.labels`.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kernels import fence
from kernels.counters import COUNTERS
from models import labels
from models.rows.base import Emit, LeakError, Shard, stream_keys
from models.rows.cursor import Cursor, Reading
from models.schema import arrow_schema, vectors
from server.live.table import Applied
from server.log.commit import Committed

MINUTE_MS = 60_000
LONGEST = max(labels.HORIZONS_MINUTES)
_RING = 2 * LONGEST + -(-labels.LATE_MS // MINUTE_MS) + 2
"""Minutes of sums that are kept: before and after, until the labels are closed."""


_WATCHED, _VALUE = COUNTERS.index("watched"), COUNTERS.index("purchase_value")


class MinuteSums:
    """Watched seconds and purchase value per row and minute of event time, for the newest ``_RING`` minutes."""

    def __init__(self) -> None:
        self._sums = np.zeros((2, _RING, 0))
        self._minute_of = np.full(_RING, -1, np.int64)
        self._generation = np.zeros(0, np.int64)

    def add(self, slots: NDArray[np.int32], generation: NDArray[np.uint32], events: Any, newest_minute: int) -> None:
        """Counts applied events, rows int32[n] of generation uint32[n]; what is older than the ring is left out."""
        self._grow(int(slots.max()) + 1)
        other = np.unique(slots[self._generation[slots] != generation])
        self._sums[:, :, other] = 0.0  # the row was another stream's
        self._generation[slots] = generation
        minute = -(-events.time_ms // MINUTE_MS) - 1  # (t, t + 1 min] belongs to t
        for place in np.unique(minute[minute > newest_minute - _RING]):
            at = int(place) % _RING
            if self._minute_of[at] != place:
                self._minute_of[at] = place
                self._sums[:, at] = 0.0
        for which, kind in enumerate((fence.WATCHED, fence.PURCHASED)):
            chosen = (events.kind == kind) & (minute > newest_minute - _RING)
            np.add.at(self._sums[which], (minute[chosen] % _RING, slots[chosen]), events.value[chosen])

    def between(self, slots: NDArray[np.int32], first: int, end: int) -> NDArray[np.float64]:
        """float64[2, n]: watched seconds and value of rows int32[n] in the minutes [first, end)."""
        self._grow(int(slots.max(initial=0)) + 1)
        minutes = [m % _RING for m in range(first, end) if self._minute_of[m % _RING] == m]
        return np.asarray(self._sums[:, minutes][:, :, slots].sum(axis=1))

    def _grow(self, rows: int) -> None:
        if rows > len(self._generation):
            more = max(1024, 2 * len(self._generation), rows) - len(self._generation)
            self._sums = np.concatenate([self._sums, np.zeros((2, _RING, more))], axis=2)
            self._generation = np.concatenate([self._generation, np.zeros(more, np.int64)])


@dataclass(frozen=True)
class _Gauges:
    """All rows at one full minute: viewers float32[rows], live bool[rows], generation uint32[rows]."""

    viewers: NDArray[np.float32]
    live: NDArray[np.bool_]
    generation: NDArray[np.uint32]


@dataclass(frozen=True)
class _Moment:
    """The rows of one moment, n of them, until their labels are closed."""

    minute: int
    slots: NDArray[np.int32]
    generation: NDArray[np.uint32]
    ids: list[str]
    epoch: NDArray[np.int64]
    reading: Reading

    @property
    def close_ms(self) -> int:
        return (self.minute + LONGEST) * MINUTE_MS + labels.LATE_MS


class StreamRows:
    """The `models.rows.base.Job` for streams. Memory: the rows of the last quarter of an hour.

    Args:
        cursor: at the record before the first one fed. every_minutes: between moments, at full multiples of it.
    """

    def __init__(self, cursor: Cursor, emit: Emit, every_minutes: int, shard: Shard | None = None) -> None:
        if every_minutes < 1:
            raise ValueError(f"every_minutes: at least 1 wanted, got {every_minutes}")
        self._cursor, self._emit, self._every, self._shard = cursor, emit, every_minutes, shard or Shard()
        self.told: Counter[str] = Counter()
        self._sums = MinuteSums()
        self._gauges: dict[int, _Gauges] = {}
        self._moments: deque[_Moment] = deque()
        self._next_minute: int | None = None  # the next full minute to stop at
        self._began_minute = 0

    def feed(self, committed: Committed) -> None:
        stamp_ms = committed.record.applied_ms
        if self._next_minute is None:
            self._next_minute = self._began_minute = -(-stamp_ms // MINUTE_MS)
        self._until(stamp_ms)
        applied = self._cursor.apply(committed)
        if applied is not None and committed.batch is not None:
            self._count(committed, applied)

    def finish(self) -> None:
        for moment in self._moments:
            self.told["labels not closed"] += len(moment.slots)
        self._moments.clear()

    def _until(self, stamp_ms: int) -> None:
        """Stops at every full minute before ``stamp_ms``, and at every closing before it."""
        assert self._next_minute is not None
        while True:
            minute_ms = self._next_minute * MINUTE_MS
            close_ms = self._moments[0].close_ms if self._moments else stamp_ms
            if close_ms < min(minute_ms, stamp_ms):
                self._close(self._moments.popleft())
            elif minute_ms < stamp_ms:
                self._stop(self._next_minute)
                self._next_minute += 1
            else:
                return

    def _stop(self, minute: int) -> None:
        table, at_ms = self._cursor.table, minute * MINUTE_MS
        columns, rows = table.columns, table.rows
        live = table.live_mask(at_ms)
        self._gauges[minute] = _Gauges(columns.viewers[:rows].copy(), live, columns.generation[:rows].copy())
        self._gauges.pop(minute - LONGEST - _RING, None)
        if minute % self._every:
            return
        slots = np.flatnonzero(live).astype(np.int32)
        slots = slots[self._shard.owns(stream_keys(columns.ids[slots], columns.id_lengths[slots]))]
        ids = [table.stream_id(int(slot)) for slot in slots]
        order = np.array(sorted(range(len(ids)), key=ids.__getitem__), np.int64)
        slots = slots[order]
        self._moments.append(
            _Moment(
                minute, slots, columns.generation[slots], [ids[i] for i in order], columns.epoch[slots],
                self._cursor.read(slots, at_ms),
            )
        )  # fmt: skip

    def _count(self, committed: Committed, applied: Applied) -> None:
        assert committed.batch is not None
        events = committed.batch.events
        chosen = (applied.codes == fence.APPLIED) & np.isin(events.kind, (fence.WATCHED, fence.PURCHASED))
        if chosen.any():
            slots = self._cursor.table.map.lookup(events.ids[chosen], events.id_lengths[chosen])
            counted = _Counted(events.kind[chosen], events.time_ms[chosen], events.value[chosen])
            generation = self._cursor.table.columns.generation[slots]
            self._sums.add(slots, generation, counted, committed.record.applied_ms // MINUTE_MS)

    def _close(self, moment: _Moment) -> None:
        """Emits the rows of a moment: the state now holds every record stamped up to its closing."""
        if moment.reading.at_ms != moment.minute * MINUTE_MS or self._cursor.stamp_ms > moment.close_ms:
            raise LeakError(f"minute {moment.minute}: closed at {self._cursor.stamp_ms}, after {moment.close_ms}")
        if len(moment.slots):
            n_features = moment.reading.features.shape[1]
            schema = arrow_schema("streams", n_features, self._cursor.table.settings.embedding_dim)
            columns = {**_read_columns(moment), **self._labels(moment)}
            self._emit(pa.table([columns[name] for name in schema.names], schema=schema))

    def _labels(self, moment: _Moment) -> dict[str, Any]:
        found: dict[str, Any] = {}
        seen = dict(zip(labels.MEASURES[1:], self._reported(), strict=True))
        viewers = self._viewers(moment, moment.minute)[0]
        for minutes in labels.HORIZONS_MINUTES:
            later, live = self._viewers(moment, moment.minute + minutes)
            found[f"live_after_{minutes}m"] = live
            before = self._sums.between(moment.slots, moment.minute - minutes, moment.minute)
            after = self._sums.between(moment.slots, moment.minute, moment.minute + minutes)
            if moment.minute - minutes < self._began_minute:
                before[:] = np.nan  # the log does not reach back so far
            per_person = np.array([60.0 * minutes, 1.0])[:, None]
            pairs = {"viewers": (viewers, later)}
            for which, (measure, reported) in enumerate(seen.items()):
                missing = 0.0 if reported else np.nan
                pairs[measure] = (
                    before[which] / per_person[which] + missing, after[which] / per_person[which] + missing
                )  # fmt: skip
            for measure, (was, became) in pairs.items():
                gain, growth = labels.growth(was, became, measure)
                for part, values in (("before", was), ("after", became), ("gain", gain), ("growth", growth)):
                    found[f"{measure}_{part}_{minutes}m"] = values.astype(np.float32)
        return found

    def _reported(self) -> tuple[bool, bool]:
        """Whether anybody has ever told of watching, and of purchases."""
        seen = self._cursor.table.counters_seen
        return bool(seen[_WATCHED]), bool(seen[_VALUE])

    def _viewers(self, moment: _Moment, minute: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """(viewers float64[n], live bool[n]) of a moment's streams at another minute; 0 where not live."""
        at = self._gauges[minute]
        live = (moment.generation == at.generation[moment.slots]) & at.live[moment.slots]
        return np.where(live, at.viewers[moment.slots], 0.0).astype(np.float64), live


@dataclass(frozen=True)
class _Counted:
    """n events: kind uint8[n], time_ms int64[n], value float64[n]."""

    kind: NDArray[np.uint8]
    time_ms: NDArray[np.int64]
    value: NDArray[np.float64]


def _read_columns(moment: _Moment) -> dict[str, Any]:
    reading, n = moment.reading, len(moment.slots)
    return {
        "at_ms": np.full(n, reading.at_ms), "offset": np.full(n, reading.offset), "stream_id": moment.ids,
        "epoch": moment.epoch, "features": vectors(reading.features), "feature_states": vectors(reading.states),
        "stream_embedding": vectors(reading.embedding), **reading.attributes,
    }  # fmt: skip
