"""The quality factor: what share of the candidates is scored, so that replies stay in time."""

from __future__ import annotations

from collections.abc import Callable


class QualityFactor:
    """In [floor, 1]; up by ``step`` per request in time, down by step · p / (100 - p) per request that was not.

    In balance p per cent of the requests are in time: step · p = (step · p / (100 - p)) · (100 - p). Requests in
    time while others are shed were bought by shedding and prove no room: they raise nothing (`hold`).
    Not thread-safe.

    Args:
        floor: lowest value, in (0, 1].
        step: the small step up, per request.
        percentile: p, in (0, 100): the share of requests that is to be in time.
        hold_ms: how long after the last shed request the factor may rise again.
        clock: seconds, monotonic.
    """

    def __init__(
        self, floor: float, step: float, percentile: float, hold_ms: float, clock: Callable[[], float]
    ) -> None:
        self._floor, self._up, self._down = floor, step, step * percentile / (100.0 - percentile)
        self._hold_s, self._clock = hold_ms / 1000, clock
        self._held_until_s = float("-inf")
        self.value = 1.0

    @property
    def at_floor(self) -> bool:
        """Nothing is left to give but requests."""
        return self.value <= self._floor

    def hold(self) -> None:
        """A request was shed."""
        self._held_until_s = self._clock() + self._hold_s

    def answered(self, in_time: int, too_late: int) -> None:
        """So many requests met the target, and so many did not."""
        up = self._up * in_time if self._clock() >= self._held_until_s else 0.0
        self.value = min(1.0, max(self._floor, self.value + up - self._down * too_late))
