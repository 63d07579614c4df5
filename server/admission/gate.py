"""Admission: who may wait, who is turned away, and when those should come back."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any

from server.admission.limit import AdaptiveLimit
from server.admission.quality import QualityFactor
from server.batching.base import Priority, Waiting
from server.config import AdmissionSettings
from server.errors import Overloaded

ROOM_FOR_OTHERS = 8
"""Places beyond the limit for clients that have less than their share."""
MIN_RETRY_MS, MAX_RETRY_MS = 25, 10_000
_GOLDEN = (math.sqrt(5) - 1) / 2


class ShedReason(StrEnum):
    """Why a request was turned away; a label in metrics."""

    QUEUE_FULL = "queue_full"
    LIMIT = "limit"
    CLIENT_SHARE = "client_share"
    BATCH_FIRST = "batch_first"


class Admission:
    """Turns requests away before any work, and only when serving less good slates is no longer enough.

    The order under rising load: the quality factor falls to its floor; then BATCH is shed; then INTERACTIVE is
    held at a limit that keeps the wait at its target. The bounds ``most_calls`` hold at any quality.
    Thread-safe; every method is a few microseconds.

    Args:
        most_limit: where the limit starts, and its upper bound: interactive calls that are handled at once.
        most_calls: calls waiting at most, whatever the quality.
        on_shed: told the reason and priority of each refusal; any thread.
    """

    def __init__(
        self,
        settings: AdmissionSettings,
        most_limit: int,
        most_calls: int,
        on_shed: Callable[[ShedReason, Priority], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._most_calls, self._on_shed, self._clock = settings, most_calls, on_shed, clock
        least = min(settings.min_limit, most_limit)
        self._limit = AdaptiveLimit(settings.target_wait_ms, least, most_limit, clock)
        self._quality = QualityFactor(
            settings.quality_floor, settings.quality_step, settings.target_percentile, settings.hold_ms, clock
        )
        self._lock = threading.Lock()
        self._clients: Counter[str] = Counter()  # calls in hand, by client
        self._in_hand = dict.fromkeys(Priority, 0)
        self._refused = 0
        self._rates = _Rates(clock)

    @property
    def quality(self) -> float:
        """The quality factor for the next batch, in (0, 1]."""
        return self._quality.value

    @property
    def limit(self) -> int:
        """Interactive calls that may be in the server at once, while it sheds."""
        return int(self._limit.value)

    # --- at the edge --------------------------------------------------------------------------

    def enter(self, client: str, priority: Priority) -> Overloaded | None:
        """Lets a call in (None), which `leave`s when it is over, or says why it is turned away: returned, not
        raised, which would be a large part of what a refusal costs.

        Over the limit a client with less than its share of the places still gets one, so that a flood of one
        does not shut the others out.
        """
        with self._lock:
            interactive, waiting = self._in_hand[Priority.INTERACTIVE], self._in_hand[priority]
            self._limit.in_flight(interactive + (priority is Priority.INTERACTIVE))
            if waiting >= self._most_calls:
                return self._shed(ShedReason.QUEUE_FULL, priority, f"{waiting} calls are already waiting", waiting)
            if priority is Priority.BATCH:
                if interactive >= self._limit.value / 2 and self._quality.at_floor:
                    why = "interactive requests take all there is"
                    return self._shed(ShedReason.BATCH_FIRST, priority, why, waiting)
            elif interactive >= self.limit:
                if not self._quality.at_floor:
                    self._quality.answered(0, 1)  # it will be late; once that is measured, hundreds more will have come
                elif (error := self._over_its_share(client, interactive)) is not None:
                    return error
            self._in_hand[priority] += 1
            if priority is Priority.INTERACTIVE:
                self._clients[client] += 1
        return None

    def _over_its_share(self, client: str, interactive: int) -> Overloaded | None:
        mine = self._clients.get(client, 0)
        share = self._limit.value / (len(self._clients) + (mine == 0))
        if mine < share and interactive < self.limit + ROOM_FOR_OTHERS:
            return None
        several = len(self._clients) > (mine > 0)
        if several and mine >= share:
            why = f"{mine} requests of this client are in the server already"
            return self._shed(ShedReason.CLIENT_SHARE, Priority.INTERACTIVE, why, interactive)
        why = f"{interactive} requests are in the server already"
        return self._shed(ShedReason.LIMIT, Priority.INTERACTIVE, why, interactive)

    def leave(self, client: str, priority: Priority) -> None:
        """A call that entered is over."""
        with self._lock:
            self._in_hand[priority] -= 1
            if priority is Priority.INTERACTIVE:
                self._clients[client] -= 1
                if not self._clients[client]:
                    del self._clients[client]

    def full(self, waiting_rows: int, priority: Priority) -> Overloaded:
        """The error for a call whose viewers do not fit the queue."""
        with self._lock:
            why = f"{waiting_rows} viewers are already waiting"
            return self._shed(ShedReason.QUEUE_FULL, priority, why, waiting_rows)

    # --- from the engine ----------------------------------------------------------------------

    def answered(self, items: Sequence[Waiting[Any]], begun_s: float) -> None:
        """These were ranked together from ``begun_s`` until now. BATCH may be slow, so it says nothing of load."""
        now_s = self._clock()
        arrived_s = [item.arrived_s for item in items if item.priority is Priority.INTERACTIVE]
        too_late = sum((now_s - came_s) * 1000 > self._settings.target_ms for came_s in arrived_s)
        with self._lock:
            waited_s = sum(begun_s - came_s for came_s in arrived_s)
            self._limit.waited(len(arrived_s), 1000 * waited_s, 1000 * (now_s - begun_s))
            self._quality.answered(len(arrived_s) - too_late, too_late)
            self._rates.served(sum(len(item) for item in items))

    # --- inside -------------------------------------------------------------------------------

    def _shed(self, reason: ShedReason, priority: Priority, why: str, backlog: int) -> Overloaded:
        self._refused += 1
        self._rates.refused()
        if priority is Priority.INTERACTIVE:  # callers of BATCH must not keep the others' quality down
            self._quality.hold()
        self._on_shed(reason, priority)
        return Overloaded(why, self._retry_ms(backlog))

    def _retry_ms(self, backlog: int) -> int:
        """When what waits, and what was shed within a second, could have been served; spread by a quarter
        either way, so that those who were shed together do not come back together."""
        wait_ms = 1000 * (backlog + self._rates.refused_per_s) / max(self._rates.served_per_s, 1.0)
        spread = 0.75 + 0.5 * (self._refused * _GOLDEN % 1.0)
        return int(min(MAX_RETRY_MS, max(MIN_RETRY_MS, wait_ms * spread)))


class _Rates:
    """Served and refused per second, over the last second that is complete."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._begun_s = clock, clock()
        self._served = self._refused = 0
        self.served_per_s = self.refused_per_s = 0.0

    def served(self, count: int) -> None:
        self._turn()
        self._served += count

    def refused(self) -> None:
        self._turn()
        self._refused += 1

    def _turn(self) -> None:
        passed_s = self._clock() - self._begun_s
        if passed_s >= 1.0:
            self.served_per_s, self.refused_per_s = self._served / passed_s, self._refused / passed_s
            self._served = self._refused = 0
            self._begun_s += passed_s
