"""When things are due: arrival times for a rate that is a function of time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_SLACK = 1e-9  # arrivals; 0.1 s at 30 per second are three arrivals, not four


@dataclass(frozen=True)
class Segment:
    """A stretch of time in which the rate moves linearly from ``begin_per_s`` to ``end_per_s``.

    Raises:
        ValueError: a duration that is not positive, or a rate that is negative or not finite.
    """

    duration_s: float
    begin_per_s: float
    end_per_s: float

    def __post_init__(self) -> None:
        if not (0 < self.duration_s < float("inf")):
            raise ValueError(f"duration_s: above 0 wanted, got {self.duration_s}")
        for name in ("begin_per_s", "end_per_s"):
            if not (0 <= getattr(self, name) < float("inf")):
                raise ValueError(f"{name}: 0 or more wanted, got {getattr(self, name)}")

    @property
    def arrivals(self) -> float:
        """Area under the rate: arrivals in this segment, not rounded."""
        return self.duration_s * (self.begin_per_s + self.end_per_s) / 2


class Schedule:
    """Segments one after another; arrival i is due when the area under the rate reaches i.

    At a constant rate that is i / rate. Nothing here depends on what a server does: that is what makes a load
    open loop.
    """

    def __init__(self, segments: Iterable[Segment]) -> None:
        self.segments = tuple(segments)
        if not self.segments:
            raise ValueError("segments: at least one wanted, got none")
        self._begins_s = np.cumsum([0.0, *(s.duration_s for s in self.segments)])
        self._areas = np.cumsum([0.0, *(s.arrivals for s in self.segments)])

    @classmethod
    def constant(cls, rate_per_s: float, seconds: float) -> Schedule:
        """One rate all the time."""
        return cls([Segment(seconds, rate_per_s, rate_per_s)])

    @property
    def duration_s(self) -> float:
        return float(self._begins_s[-1])

    @property
    def count(self) -> int:
        """Arrivals of the whole schedule."""
        return int(np.ceil(self._areas[-1] - _SLACK))

    def rate_at(self, t_s: float) -> float:
        """Arrivals per second at ``t_s``; 0 outside of the schedule. At a border: that of the later segment."""
        if not 0 <= t_s < self.duration_s:
            return 0.0
        k = int(np.searchsorted(self._begins_s, t_s, side="right")) - 1
        s = self.segments[k]
        return s.begin_per_s + (s.end_per_s - s.begin_per_s) * float(t_s - self._begins_s[k]) / s.duration_s

    def due_by(self, t_s: float) -> int:
        """Arrivals due before ``t_s``: those i whose due time is smaller (within rounding)."""
        t_s = min(max(t_s, 0.0), self.duration_s)
        k = min(int(np.searchsorted(self._begins_s, t_s, side="right")) - 1, len(self.segments) - 1)
        s, into_s = self.segments[k], t_s - float(self._begins_s[k])
        area = s.begin_per_s * into_s + (s.end_per_s - s.begin_per_s) * into_s**2 / (2 * s.duration_s)
        return int(np.ceil(self._areas[k] + area - _SLACK))

    def due_s(self) -> NDArray[np.float64]:
        """float64[count], ascending: seconds from the begin."""
        numbers = np.arange(self.count, dtype=np.float64)
        # side="right" skips segments without arrivals; rounding may lead past the last one.
        k = np.minimum(np.searchsorted(self._areas[1:], numbers, side="right"), len(self.segments) - 1)
        begin = np.array([s.begin_per_s for s in self.segments])[k]
        slope = np.array([(s.end_per_s - s.begin_per_s) / s.duration_s for s in self.segments])[k]
        area = np.maximum(numbers - self._areas[k], 0.0)
        # Root of begin·t + slope·t²/2 = area, in the form that does not cancel when the rate falls.
        below = begin + np.sqrt(np.maximum(begin**2 + 2 * slope * area, 0.0))
        t_s = np.divide(2 * area, below, out=np.zeros_like(area), where=below > 0)
        longest_s = np.array([s.duration_s for s in self.segments])[k]
        return np.maximum.accumulate(self._begins_s[k] + np.minimum(t_s, longest_s))
