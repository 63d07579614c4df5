"""How many requests may be in the server at once: as many as keep the wait before ranking at its target."""

from __future__ import annotations

from collections.abc import Callable

ROUND_SAMPLES = 16
ROUND_MS = 100.0
_CUT = 0.7
_GROWTH = 1.0


class AdaptiveLimit:
    """Additive increase, multiplicative decrease, once per round, on the time that requests waited.

    A round judges only requests that arrived after it began, so a cut shows its effect before the next one:
    once per round trip, as in TCP. It cuts from what was really in flight, which is where the first round of
    an overload starts, however high the limit then was (RFC 5681: FlightSize). It grows only when it was reached.
    Sources: Chiu and Jain, "Analysis of the Increase and Decrease Algorithms", 1989 (AIMD); Zhou et al.,
    "Overload Control for Scaling WeChat Microservices", SoCC 2018 (queueing time, not response time, as the
    signal: response time rises with the work of a request, too). Not thread-safe.

    Args:
        target_ms: mean wait to settle at.
        least, most: bounds of the limit.
        clock: seconds, monotonic.
    """

    def __init__(self, target_ms: float, least: int, most: int, clock: Callable[[], float]) -> None:
        self._target_ms, self._least, self._most, self._clock = target_ms, least, most, clock
        self.value = float(most)
        self._begun_s = clock()
        self._samples, self._sum_ms, self._peak = 0, 0.0, 0

    def in_flight(self, count: int) -> None:
        """So many are in the server now."""
        self._peak = max(self._peak, count)

    def waited(self, arrived_s: float, wait_ms: float) -> None:
        """A request that came at ``arrived_s`` is being ranked after ``wait_ms``."""
        if arrived_s < self._begun_s:
            return
        self._samples += 1
        self._sum_ms += wait_ms
        if self._samples >= ROUND_SAMPLES or (self._clock() - self._begun_s) * 1000 >= ROUND_MS:
            self._judge(self._sum_ms / self._samples)
            self._begin()

    def _judge(self, wait_ms: float) -> None:
        if wait_ms > self._target_ms:
            self.value = max(self._least, _CUT * min(self.value, self._peak))
        elif self._peak >= self.value:
            self.value = min(self._most, self.value + _GROWTH)

    def _begin(self) -> None:
        self._begun_s = self._clock()
        self._samples, self._sum_ms, self._peak = 0, 0.0, 0
