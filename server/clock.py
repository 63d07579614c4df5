"""Time, injected. Nothing else in the server reads a clock for decisions."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

logger = logging.getLogger(__name__)

FOLLOWED_NS = 2_000_000_000
"""A larger difference between the machine's wall clock and ours is a step, and is not followed."""
SLEW = 0.005
"""Smaller ones are made up for by running this much faster or slower."""
_ELAPSED_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # counts time asleep where it can


class Clock(Protocol):
    """A source of wall-clock time."""

    def now_ms(self) -> int:
        """Milliseconds since the Unix epoch; never less than before."""
        ...

    def not_before(self, now_ms: int) -> None:
        """From now on returns at least ``now_ms``."""
        ...

    def stepped_ms(self) -> int:
        """The machine's wall clock minus this one while they disagree by a step; 0: they agree."""
        ...


class SystemClock:
    """The wall clock at the start, carried on by the machine's elapsed time. Thread-safe.

    Leases are durations, so a wall clock that jumps must move no lease: an hour back would keep dead streams
    for an hour, an hour forward would end every live one. So drift and small corrections are followed slowly
    (`SLEW`), and a step beyond `FOLLOWED_NS` is not followed but reported: whoever set the clock decides, and
    a restart takes the new time over. See docs/adr/0006-a-clock-that-does-not-jump.md.

    Args:
        wall_ns, elapsed_ns: the machine's clocks; for tests.
    """

    def __init__(
        self,
        wall_ns: Callable[[], int] = lambda: time.time_ns(),  # looked up at each call
        elapsed_ns: Callable[[], int] = lambda: time.clock_gettime_ns(_ELAPSED_CLOCK),
    ) -> None:
        self._wall_ns, self._elapsed_ns = wall_ns, elapsed_ns
        self._now_ns, self._read_ns = wall_ns(), elapsed_ns()
        self._stepped_ns = 0
        self._lock = threading.Lock()

    def now_ms(self) -> int:
        with self._lock:
            read_ns = self._elapsed_ns()
            passed_ns = max(0, read_ns - self._read_ns)
            self._read_ns = read_ns
            self._now_ns += passed_ns
            ahead_ns = self._wall_ns() - self._now_ns
            stepped = abs(ahead_ns) > FOLLOWED_NS
            changed = stepped != (self._stepped_ns != 0)
            self._stepped_ns = ahead_ns if stepped else 0
            if not stepped:
                most_ns = int(passed_ns * SLEW)
                self._now_ns += max(-most_ns, min(most_ns, ahead_ns))
            now_ns = self._now_ns
        if changed and stepped:
            logger.error(
                "the machine's clock is %.1f s %s the server's: a step is not followed; restart to take it over",
                abs(ahead_ns) / 1e9, "ahead of" if ahead_ns > 0 else "behind",
            )  # fmt: skip
        elif changed:
            logger.warning("the machine's clock agrees with the server's again")
        return now_ns // 1_000_000

    def not_before(self, now_ms: int) -> None:
        with self._lock:
            self._now_ns = max(self._now_ns, now_ms * 1_000_000)

    def stepped_ms(self) -> int:
        return self._stepped_ns // 1_000_000


class ManualClock:
    """A clock that its owner moves; for tests and replay. Thread-safe."""

    def __init__(self, now_ms: int) -> None:
        self._now_ms = now_ms
        self._lock = threading.Lock()

    def now_ms(self) -> int:
        with self._lock:
            return self._now_ms

    def advance(self, by_ms: int) -> None:
        """Moves forward by ``by_ms`` >= 0."""
        if by_ms < 0:
            raise ValueError(f"by_ms must be >= 0, not {by_ms}")
        with self._lock:
            self._now_ms += by_ms

    def set(self, now_ms: int) -> None:
        """Moves to ``now_ms``, never backwards."""
        with self._lock:
            self._now_ms = max(self._now_ms, now_ms)

    def not_before(self, now_ms: int) -> None:
        self.set(now_ms)

    def stepped_ms(self) -> int:
        return 0
