"""The queue in front of the engine: packs what waits into batches. Pure policy; its owner holds the lock."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Generic

from server.batching.base import Priority, T, Turn, Waiting
from server.batching.fair import FairQueue

ROUND_ROWS = 8
"""Rows of one client's share within which the deadline decides; larger: more deadlines met, less even shares."""
BATCH_PATIENCE_TURNS = 8
"""A waiting BATCH call is passed over by INTERACTIVE ones at most this often."""
BUSY_FOR_S = 0.05
"""So long after a batch of more than one row, more requests are believed to be on their way."""
_STALE_ABOVE = 64


class RankQueue(Generic[T]):
    """Every call that is put comes out once: in a turn's batch, late, unreached, or dropped as abandoned.

    Order: INTERACTIVE before BATCH, fair between clients, earliest deadline first within that. A call whose
    time left is below the turn's budget leaves at once, whatever its place.

    Args:
        max_batch_rows: rows ranked together at most.
        window_s: under load, how long an idle engine waits for a batch to fill. After a batch of one row, or a
            pause, it does not wait: a lone request is never delayed.
        clock: seconds, monotonic.
    """

    def __init__(self, max_batch_rows: int, window_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_batch_rows, self._window_s, self._clock = max_batch_rows, window_s, clock
        self._fair: dict[Priority, FairQueue[T]] = {p: FairQueue(ROUND_ROWS) for p in Priority}
        self._parked: list[Waiting[T]] = []
        self._deadlines: list[tuple[float, int, Waiting[T]]] = []
        self._numbers = itertools.count()
        self._calls = 0  # in the fair queues
        self._passed_over = 0
        self._full_at_s = float("-inf")  # when the window of what waits closes
        self._busy_until_s = float("-inf")
        self.rows = 0
        """Viewers that wait, parked ones included."""

    def put(self, items: Sequence[Waiting[T]], applied_offset: int) -> None:
        """Queues calls.

        Raises:
            ValueError: a call has no rows, or more than a batch may have; nothing was queued.
        """
        for item in items:
            if not 1 <= len(item) <= self._max_batch_rows:
                raise ValueError(f"items: 1 to {self._max_batch_rows} rows allowed, got {len(item)}")
        for item in items:
            self.rows += len(item)
            if item.min_offset > applied_offset:
                self._parked.append(item)
            else:
                self._enter(item)

    def due_in_s(self) -> float | None:
        """Seconds until a turn should be taken: 0 now, None when nothing can be ranked."""
        if not self._calls:
            return None
        if self.rows >= self._max_batch_rows:
            return 0.0
        now_s = self._clock()
        return max(0.0, self._full_at_s - now_s) if now_s < self._busy_until_s else 0.0

    def take(
        self, applied_offset: int, budget_s: float, closing: bool = False, most_rows: int | None = None
    ) -> Turn[T]:
        """One turn.

        Args:
            applied_offset: last log offset in the table.
            budget_s: time that ranking takes; a call with less than this left is late.
            closing: no more offsets will be applied.
            most_rows: rows that are better not ranked together now; None: ``max_batch_rows``. One call is taken, even
                if it has more.
        """
        turn: Turn[T] = Turn()
        now_s = self._clock()
        self._unpark(turn, applied_offset, now_s, closing)
        if not self._calls:
            return turn
        self._take_late(turn, now_s, budget_s)
        room_rows = self._max_batch_rows if most_rows is None else min(most_rows, self._max_batch_rows)
        taken_rows, batch_first = 0, self._passed_over >= BATCH_PATIENCE_TURNS
        for priority in sorted(Priority, reverse=batch_first):
            while taken_rows < room_rows:
                item = self._fair[priority].pop(room_rows - taken_rows if taken_rows else self._max_batch_rows)
                if item is None:
                    break
                self._calls -= 1
                if self._claim(item, turn, now_s):
                    turn.rank.append(item)
                    taken_rows += len(item)
        waited = any(item.priority is Priority.BATCH for item in turn.rank) or not self._fair[Priority.BATCH]
        self._passed_over = 0 if waited else self._passed_over + 1
        self._busy_until_s = now_s + BUSY_FOR_S if taken_rows > 1 else float("-inf")
        self._full_at_s = float("-inf")  # what is left has waited for a whole batch
        return turn

    def waiting(self) -> list[Waiting[T]]:
        """All calls that wait, in no order."""
        return [*self._parked, *(item for _, _, item in self._deadlines if not item.gone)]

    # --- inside -------------------------------------------------------------------------------

    def _enter(self, item: Waiting[T]) -> None:
        if not self._calls:
            self._full_at_s = self._clock() + self._window_s
        self._calls += 1
        self._fair[item.priority].push(item)
        if len(self._deadlines) > 2 * self._calls + _STALE_ABOVE:
            self._deadlines = [entry for entry in self._deadlines if not entry[2].gone]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (item.deadline_s, next(self._numbers), item))

    def _unpark(self, turn: Turn[T], applied_offset: int, now_s: float, closing: bool) -> None:
        parked, self._parked = self._parked, []
        for item in parked:
            if item.done.cancelled():
                self._claim(item, turn)
            elif item.min_offset <= applied_offset:
                item.arrived_s = now_s  # until now it waited for a write, not for its turn
                self._enter(item)
            elif closing or item.deadline_s <= now_s:
                if self._claim(item, turn):
                    turn.unreached.append(item)
            else:
                self._parked.append(item)

    def _take_late(self, turn: Turn[T], now_s: float, budget_s: float) -> None:
        room_rows = self._max_batch_rows
        while self._deadlines and self._deadlines[0][0] - now_s < budget_s:
            item = self._deadlines[0][2]
            if not item.gone:
                if len(item) > room_rows:
                    return
                item.gone = True  # its fair queue passes it by
                self._calls -= 1
                self._fair[item.priority].left()
                if self._claim(item, turn, now_s):
                    turn.late.append(item)
                    room_rows -= len(item)
            heapq.heappop(self._deadlines)

    def _claim(self, item: Waiting[T], turn: Turn[T], now_s: float = float("-inf")) -> bool:
        """Takes a call out of the count; False when nobody waits for it, or is about to stop waiting."""
        self.rows -= len(item)
        if item.deadline_s <= now_s:
            item.done.cancel()
        if item.done.set_running_or_notify_cancel():
            return True
        turn.abandoned_rows += len(item)
        return False
