"""Time, injected. Nothing else in the server reads a clock for decisions."""

from __future__ import annotations

import threading
import time
from typing import Protocol


class Clock(Protocol):
    """A source of wall-clock time."""

    def now_ms(self) -> int:
        """Milliseconds since the Unix epoch."""
        ...


class SystemClock:
    """The machine's clock, made monotone: never returns less than it returned before."""

    def __init__(self) -> None:
        self._last_ms = 0
        self._lock = threading.Lock()

    def now_ms(self) -> int:
        with self._lock:
            self._last_ms = max(self._last_ms, time.time_ns() // 1_000_000)
            return self._last_ms


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
