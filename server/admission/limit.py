"""How many requests may be in the server at once: as many as keep the wait before ranking at its target."""

from __future__ import annotations

import math
from collections.abc import Callable

ROUND_MS = 100.0
_LEAST_CUT = 0.5
_ROUNDS_TO_CUT = 2
_QUICK_GROWTH = 0.25


class AdaptiveLimit:
    """Additive increase, multiplicative decrease, once per round, on the mean time that requests waited.

    A cut is in proportion to how far the wait is above its target, by half at most, and starts from what was
    really in flight (RFC 5681: FlightSize), however high the limit then was. It never goes below what Little's
    law gives for the target at the present rate: waits of requests that came before a cut would else cut again.
    One round above the target is no overload but a stall, after which nobody waits any more: a cut takes two in a row.
    The limit grows only when it was reached; by a quarter while requests wait at most half of the target, for by
    Little's law twice as many would still wait no longer than that: what a cut took too much is soon there again.
    Waiting for the batch in hand is no sign of overload, so the time that a batch takes is added to the target; a
    limit below a batch's rows would only make batches less worth it.
    Sources: Chiu and Jain, "Analysis of the Increase and Decrease Algorithms", 1989 (AIMD); Netflix
    concurrency-limits, Gradient (the cut); Zhou et al., "Overload Control for Scaling WeChat Microservices",
    SoCC 2018 (queueing time, not response time, as the signal: that rises with a request's own work, too).
    Not thread-safe.

    Args:
        target_ms: mean wait to settle at, beyond the time of one batch.
        least, most: bounds of the limit.
        clock: seconds, monotonic.
    """

    def __init__(self, target_ms: float, least: int, most: int, clock: Callable[[], float]) -> None:
        self._target_ms, self._least, self._most, self._clock = target_ms, least, most, clock
        self.value = float(most)
        self._begun_s = clock()
        self._samples, self._sum_ms, self._batches_ms, self._peak = 0, 0.0, 0.0, 0
        self._rounds_above = 0

    def in_flight(self, count: int) -> None:
        """So many are in the server now."""
        self._peak = max(self._peak, count)

    def waited(self, count: int, sum_ms: float, batch_ms: float) -> None:
        """So many requests waited ``sum_ms`` in all and were then ranked together in ``batch_ms``."""
        self._samples += count
        self._sum_ms += sum_ms
        self._batches_ms += count * batch_ms
        round_ms = (self._clock() - self._begun_s) * 1000
        if round_ms < ROUND_MS or not self._samples:
            return
        target_ms = self._target_ms + self._batches_ms / self._samples
        self._judge(self._sum_ms / self._samples, target_ms, self._samples / round_ms)
        self._begun_s = self._clock()
        self._samples, self._sum_ms, self._batches_ms, self._peak = 0, 0.0, 0.0, 0

    def _judge(self, wait_ms: float, target_ms: float, served_per_ms: float) -> None:
        self._rounds_above = self._rounds_above + 1 if wait_ms > target_ms else 0
        if self._rounds_above >= _ROUNDS_TO_CUT:
            cut = min(self.value, self._peak) * max(_LEAST_CUT, target_ms / wait_ms)
            self.value = min(self.value, max(self._least, served_per_ms * target_ms, cut))
        elif not self._rounds_above and self._peak >= self.value:
            quick = _QUICK_GROWTH * self.value if wait_ms <= target_ms / 2 else 0.0
            self.value = min(self._most, self.value + max(1.0, math.sqrt(self.value) / 4, quick))
