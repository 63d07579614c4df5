"""What events add up to in a session, and where that is kept: counters, gauges, sketches, and features of them."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kernels import fence
from kernels.counters import COUNTERS, move_landmark
from kernels.sessions import Sessions, count_events
from server.live.columns import Columns
from server.live.features import Features, FeatureSet

# Which counters a kind of event adds to: its value to the first, 1 to the second.
FIRST_COUNTER = np.full(256, -1, np.int8)
SECOND_COUNTER = np.full(256, -1, np.int8)
"""int8[256]: the counter that a kind of event adds its value to, and the one it adds 1 to; -1 none."""

for _kind, _first, _second in (
    (fence.VIEWER_COUNT, "viewers", "viewer_reports"),
    (fence.JOINED, "joined", None),
    (fence.LEFT, "left", None),
    (fence.WATCHED, "watched", None),
    (fence.CHATTED, "chatted", None),
    (fence.LIKED, "liked", None),
    (fence.FOLLOWED, "followed", None),
    (fence.SHARED, "shared", None),
    (fence.BID, "bid_value", "bid"),
    (fence.PURCHASED, "purchase_value", "purchased"),
    (fence.REPORTED, "reported", None),
):
    FIRST_COUNTER[_kind] = COUNTERS.index(_first)
    if _second is not None:
        SECOND_COUNTER[_kind] = COUNTERS.index(_second)


class Counted(NamedTuple):
    """n events, in order, of which those that are ``current`` count; a slot may come many times.

    slots int32[n], of a row where current. kind uint8[n], value float64[n], time_ms int64[n], viewer_hash uint64[n]:
    as `EventColumns` has them. current bool[n].
    """

    slots: NDArray[np.int32]
    kind: NDArray[np.uint8]
    value: NDArray[np.float64]
    time_ms: NDArray[np.int64]
    viewer_hash: NDArray[np.uint64]
    current: NDArray[np.bool_]


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
        self._columns = c = columns
        self.identity_version = np.zeros(len(columns.state), np.uint32)
        """Changes whenever `identity_changed` is told of a row: for those who keep what they made of its names."""
        self._sessions = Sessions(
            c.counters, c.last_event_ms, c.viewers, c.viewers_ms, c.viewer_registers, c.chatter_registers
        )

    def count(self, events: Counted, landmark_ms: int) -> None:
        """See `Accumulators`."""
        count_events(
            self._sessions, events.slots, events.kind, events.value, events.time_ms, events.viewer_hash,
            events.current, landmark_ms, first_counter=FIRST_COUNTER, second_counter=SECOND_COUNTER,
            gauge=fence.VIEWER_COUNT, chat=fence.CHATTED,
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
