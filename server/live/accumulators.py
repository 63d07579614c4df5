"""What events add up to in a session, and where that is kept: counters, gauges, sketches, and features of them."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kernels.counters import move_landmark, observe, scatter_decayed
from server.live.columns import Columns
from server.live.features import Features, FeatureSet


class Counted(NamedTuple):
    """n applied events of current sessions, in order; a slot may come many times.

    first, second: counters that the event adds ``value`` and 1 to, -1 none. viewers: -1 not a viewer count.
    viewer_hash: 0 none.
    """

    slots: NDArray[np.int32]
    first: NDArray[np.int8]
    second: NDArray[np.int8]
    value: NDArray[np.float64]
    time_ms: NDArray[np.int64]
    viewers: NDArray[np.float64]
    viewer_hash: NDArray[np.uint64]
    is_chat: NDArray[np.bool_]


class Accumulators(Protocol):
    """Keeps the session columns (see `Columns`) for the live table, on the host or on a GPU.

    Calls come from the thread that owns the table, in the order in which the columns must change. An
    implementation may do the work later, as long as nobody can tell.
    """

    def count(self, events: Counted, landmark_ms: int) -> None:
        """Adds events to counters, gauges and sketches."""

    def clear_sessions(self, slots: NDArray[np.int32]) -> None:
        """Forgets what happened in the rows' sessions; int32[n]."""

    def move_landmark(self, old_ms: int, new_ms: int, rows: int) -> None:
        """Rescales the counters of the first ``rows`` rows; see kernels.counters.move_landmark."""

    def liveness_changed(self, slots: NDArray[np.int32]) -> None:
        """State, lease, epoch, start or moderation of these rows may have changed on the host; int32[n]."""

    def identity_changed(self, slots: NDArray[np.int32]) -> None:
        """So may everything else about these rows that the host keeps; int32[n]."""

    def features(self, features: FeatureSet, slots: NDArray[np.int32], now_ms: int, landmark_ms: int) -> Features:
        """`FeatureSet.compute` of rows int32[n]."""

    def viewers(self, rows: int) -> NDArray[np.float32]:
        """float32[rows] on the host: viewers last reported for each of the first rows."""

    def column(self, name: str) -> Any:
        """One of the session columns (`columns.SESSION`), C rows, up to date; where it lives."""


class HostAccumulators:
    """Session columns in main memory: those of ``columns``."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self.identity_version = np.zeros(len(columns.state), np.uint32)
        """Changes whenever `identity_changed` is told of a row: for those who keep what they made of its names."""

    def count(self, events: Counted, landmark_ms: int) -> None:
        """See `Accumulators`."""
        c, n = self._columns, len(events.slots)
        scatter_decayed(
            c.counters, events.slots, events.first, events.value, events.second, np.ones(n, np.float64),
            events.time_ms, landmark_ms,
        )  # fmt: skip
        observe(
            events.slots, events.time_ms, events.viewers, events.viewer_hash, events.is_chat,
            c.last_event_ms, c.viewers, c.viewers_ms, c.viewer_registers, c.chatter_registers,
        )  # fmt: skip

    def clear_sessions(self, slots: NDArray[np.int32]) -> None:
        """See `Accumulators`."""
        self._columns.clear_sessions(slots)

    def move_landmark(self, old_ms: int, new_ms: int, rows: int) -> None:
        """See `Accumulators`."""
        move_landmark(self._columns.counters[:rows], old_ms, new_ms)

    def liveness_changed(self, slots: NDArray[np.int32]) -> None:
        """Nothing to do: there is one copy."""

    def identity_changed(self, slots: NDArray[np.int32]) -> None:
        """See `Accumulators`. There is one copy, so it is only told."""
        self.identity_version[slots] += np.uint32(1)

    def features(self, features: FeatureSet, slots: NDArray[np.int32], now_ms: int, landmark_ms: int) -> Features:
        """See `Accumulators`."""
        return features.compute(self._columns, slots, now_ms, landmark_ms)

    def viewers(self, rows: int) -> NDArray[np.float32]:
        """See `Accumulators`. The column itself."""
        return self._columns.viewers[:rows]

    def column(self, name: str) -> Any:
        """See `Accumulators`."""
        return getattr(self._columns, name)
