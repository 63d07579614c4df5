"""One way around the live table, a chunk per tick: rule bits and features, then a job for the model.

Bounds what a tick costs on a large table; on a small one a sweep is a single step.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kernels import fence
from server.live.features import FeatureSet
from server.live.table import LiveTable
from server.retrieval.streams import StreamState
from server.scoring.refresh import RefreshJob

CHUNK_ROWS = 16_384
"""Rows whose features one step recomputes at most."""
MOST_STEPS = 100
"""Smaller steps than a chunk are taken only as long as this many (ten seconds of ticks) do for the whole table."""


class Sweep:
    """Features and rule bits of the live rows as they were at its begin; one `step` per tick.

    slots int32[n]; states uint8[n, F], the feature states found so far.
    """

    def __init__(self, slots: NDArray[np.int32], features: FeatureSet) -> None:
        self.slots = slots
        self.states = np.empty((len(slots), len(features)), np.uint8)
        self.finished = False
        self._values = np.empty((len(slots), len(features)), np.float32)
        self._sessions = np.empty(len(slots), np.uint32)
        self._done = 0

    @classmethod
    def begin(cls, table: LiveTable, features: FeatureSet) -> Sweep:
        """A sweep of the rows that are live now."""
        live = table.columns.state[: table.rows] == fence.LIVE
        return cls(np.flatnonzero(live).astype(np.int32), features)

    def step(self, streams: StreamState, now_ms: int, share: float = 1.0) -> None:
        """Assesses the next chunk; ``finished`` once there is none left.

        Args:
            share: of a chunk's rows, in (0, 1]: on a large table sweeping takes a good part of the engine's time,
                and under overload that is better spent on replies.
        """
        rows = min(CHUNK_ROWS, max(math.ceil(CHUNK_ROWS * share), -(-len(self.slots) // MOST_STEPS)))
        span = slice(self._done, self._done + rows)
        chunk = self.slots[span]
        if len(chunk):
            found = streams.assess(chunk, now_ms)
            self._values[span], self.states[span] = found.values, found.states
            self._sessions[span] = streams.session[chunk]  # a later session must not get this one's score
        self._done += len(chunk)
        self.finished = self._done >= len(self.slots)

    def job(self, table: LiveTable, now_ms: int) -> RefreshJob:
        """The rows for the model. An empty table sends one row that belongs to nobody: it keeps the
        connection warm and tells whether the model answers."""
        if not len(self.slots):
            probe = np.zeros((1, self._values.shape[1]), np.float32)
            nobody = np.array([np.iinfo(np.uint32).max], np.uint32)
            return RefreshJob(np.zeros(1, np.int32), nobody, probe, None, now_ms)
        ids = table.columns.ids[self.slots].view("S64").reshape(-1)
        return RefreshJob(self.slots, self._sessions, self._values, ids, now_ms)


class Sweeps:
    """Sweeps one after the other: the next begins ``refresh_ms`` after the last did, once that is finished."""

    def __init__(self, table: LiveTable, features: FeatureSet, streams: StreamState, refresh_ms: int) -> None:
        self._table, self._features, self._streams, self._refresh_ms = table, features, streams, refresh_ms
        self._current = Sweep.begin(table, features)
        self._next_ms = 0

    @property
    def states(self) -> NDArray[np.uint8]:
        """Of the newest sweep: uint8[n, F]."""
        return self._current.states

    def step(self, now_ms: int, share: float = 1.0) -> RefreshJob | None:
        """Sweeps on, if one is due; the rows for the model when that finished it. ``share``: see `Sweep.step`."""
        if self._current.finished:
            if now_ms < self._next_ms:
                return None
            self._begin(now_ms)
        self._current.step(self._streams, now_ms, share)
        return self._current.job(self._table, now_ms) if self._current.finished else None

    def whole(self, now_ms: int) -> RefreshJob:
        """A whole new one at once. It stands for the one that is due, not for one more just before it."""
        self._begin(now_ms)
        while not self._current.finished:
            self._current.step(self._streams, now_ms)
        return self._current.job(self._table, now_ms)

    def _begin(self, now_ms: int) -> None:
        self._next_ms = now_ms + self._refresh_ms
        self._current = Sweep.begin(self._table, self._features)
