"""When to call the model, and what to answer with when it does not deliver. Pure policy: no I/O, no clock."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Level(IntEnum):
    """How far an answer fell from what was asked for; higher is worse. Values match the public API."""

    NONE = 0  # the model's scores
    LAST_GOOD = 1  # the model's scores of a moment ago
    FORMULA = 2  # the documented trend formula
    POPULAR = 3  # the popular list; chosen by the request's deadline, never by this module


@dataclass(frozen=True)
class Assessment:
    """level: where scores come from now. reasons: why it is not NONE, most important first."""

    level: Level
    reasons: tuple[str, ...]


class Ladder:
    """Circuit breaker around the model, and the choice of level. Owned and called by one thread.

    Closed: every call is allowed. After ``breaker_failures`` failures in a row it opens: no call for
    ``breaker_open_ms``. Then one trial call; its success closes the breaker, its failure opens it again.
    A trial whose outcome is never reported blocks the next one for ``breaker_open_ms`` only.

    All times are milliseconds of the same injected clock.
    """

    def __init__(self, breaker_failures: int, breaker_open_ms: int, max_score_age_ms: int) -> None:
        self._breaker_failures = breaker_failures
        self._breaker_open_ms = breaker_open_ms
        self._max_score_age_ms = max_score_age_ms
        self._failures_in_a_row = 0
        self._next_call_ms: int | None = None  # None: the breaker is closed
        self._failure: str | None = "no model answer yet"
        self.model_version = ""

    @property
    def is_open(self) -> bool:
        """True while calls are held back or on trial."""
        return self._next_call_ms is not None

    def may_call(self, now_ms: int) -> bool:
        """True when the model may be called now. The caller then reports succeeded or failed."""
        if self._next_call_ms is None:
            return True
        if now_ms < self._next_call_ms:
            return False
        self._next_call_ms = now_ms + self._breaker_open_ms  # one trial at a time
        return True

    def succeeded(self, now_ms: int, version: str) -> None:
        """The model answered with usable scores."""
        self._failures_in_a_row = 0
        self._next_call_ms = None
        self._failure = None
        self.model_version = version

    def failed(self, now_ms: int, reason: str) -> None:
        """The model did not answer, or not usably. ``reason`` is shown to callers until the next success."""
        self._failures_in_a_row += 1
        self._failure = reason
        if self._failures_in_a_row >= self._breaker_failures:
            self._next_call_ms = now_ms + self._breaker_open_ms

    def assess(self, now_ms: int, last_good_ms: int | None) -> Assessment:
        """The level to answer with.

        Args:
            last_good_ms: as-of time of the newest scores that a model gave; None: there never were any.
        """
        if self._failure is None:
            return Assessment(Level.NONE, ())
        reasons = [self._failure]
        if self._next_call_ms is not None:
            reasons.append(f"breaker open after {self._failures_in_a_row} failures in a row")
        if last_good_ms is None:
            return Assessment(Level.FORMULA, tuple(reasons))
        age_ms = now_ms - last_good_ms
        if age_ms <= self._max_score_age_ms:
            return Assessment(Level.LAST_GOOD, tuple(reasons))
        reasons.append(f"last good scores are {age_ms} ms old, allowed are {self._max_score_age_ms} ms")
        return Assessment(Level.FORMULA, tuple(reasons))
