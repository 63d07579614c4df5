"""How events travel: numbered by their producers, then some late, some twice, some overtaken, some lost."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtest.world.events import COLUMN_DTYPES, LOST, Outbox, WorldEvents
from loadtest.world.producers import Producers
from loadtest.world.settings import WorldSettings
from loadtest.world.streams import StreamColumns

_OVERTAKEN_MS = 3_000
_RESEND_MS = 5_000  # mean time until a producer that saw no acknowledgement sends again

_Columns = dict[str, NDArray[Any]]


class Delivery:
    """Holds what is still under way, and every producer's next sequence."""

    def __init__(self, settings: WorldSettings, producers: Producers) -> None:
        self._adversity = settings.adversity
        self._start_ms = settings.start_ms
        self._ids = producers.ids
        self._next_sequence = np.ones(len(producers.ids), np.uint64)
        self._under_way: _Columns = {
            **{name: np.empty(0, dtype) for name, dtype in COLUMN_DTYPES.items()},
            "deliver_ms": np.empty(0, np.int64),
        }

    def step(self, out: Outbox, streams: StreamColumns, now_ms: int, rng: np.random.Generator) -> WorldEvents:
        """Numbers what was emitted and delivers what is due at ``now_ms``, old and new."""
        emitted = out.take()
        columns = self._under_way
        if emitted is not None:
            fresh = self._travel(self._numbered(emitted), rng)
            columns = {name: np.concatenate([columns[name], fresh[name]]) for name in columns}
        due = columns["deliver_ms"] <= now_ms
        self._under_way = {name: column[~due] for name, column in columns.items()}
        arrived = {name: column[due] for name, column in columns.items()}
        order = self._order(arrived["producer"], arrived["deliver_ms"])
        return WorldEvents(
            now_ms=now_ms,
            streams=streams,
            producer_ids=self._ids,
            **{name: arrived[name][order] for name in COLUMN_DTYPES},
        )

    def _order(self, producer: NDArray[np.int16], time_ms: NDArray[np.int64]) -> NDArray[np.intp]:
        # By producer, then time, ties as they came: one key is far cheaper than lexsort.
        return np.argsort((producer.astype(np.int64) << 44) + (time_ms - self._start_ms), kind="stable")

    def _numbered(self, columns: _Columns) -> _Columns:
        """The same events by producer and event time, with sequences that grow from 1 per producer."""
        order = self._order(columns["producer"], columns["event_time_ms"])
        columns = {name: column[order] for name, column in columns.items()}
        producer = columns["producer"]
        count = np.bincount(producer, minlength=len(self._ids))
        first = np.concatenate(([0], np.cumsum(count)[:-1]))
        place = np.arange(len(producer)) - first[producer]
        columns["sequence"] = self._next_sequence[producer] + place.astype(np.uint64)
        self._next_sequence += count.astype(np.uint64)
        return columns

    def _travel(self, columns: _Columns, rng: np.random.Generator) -> _Columns:
        """Adds deliver_ms int64[E], removes lost events, appends duplicates."""
        a, n = self._adversity, len(columns["kind"])
        decided = columns.pop("delay_ms")
        u = rng.random(n)
        delay = np.zeros(n, np.int64)
        late = u < a.late
        delay[late] = rng.exponential(a.late_mean_ms, int(late.sum())).astype(np.int64)
        overtaken = (u >= a.late) & (u < a.late + a.reorder)
        delay[overtaken] = rng.integers(0, _OVERTAKEN_MS, int(overtaken.sum()))
        delay = np.where(decided == Outbox.UNDECIDED, delay, decided)
        columns["deliver_ms"] = columns["event_time_ms"] + delay

        lost = delay == LOST
        twice = ~lost & (u >= 1.0 - a.duplicate)
        again = {name: column[twice] for name, column in columns.items()}
        wait = rng.exponential(_RESEND_MS, int(twice.sum())).astype(np.int64)
        again["deliver_ms"] = again["deliver_ms"] + wait
        return {name: np.concatenate([columns[name][~lost], again[name]]) for name in columns}


def delivered_ms(emitted_ms: int, delay_ms: int, now_ms: int, step_ms: int) -> int:
    """When an event emitted in the step that ends at ``now_ms`` is handed out; LOST if it never is."""
    if delay_ms == LOST:
        return LOST
    late_ms = max(0, emitted_ms + delay_ms - now_ms)
    return now_ms + -(-late_ms // step_ms) * step_ms
