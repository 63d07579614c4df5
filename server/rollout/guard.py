"""When a canary ends itself: limits, what was seen, and the verdict. Pure."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from server.config import RolloutSettings
from server.rollout.agreement import Agreement

WINDOW = 8
"""Refreshes that drift and latency are averaged over."""
MIN_ROWS = 20
"""Fewer rows tell nothing about a mean."""


@dataclass
class Trial:
    """What a candidate did since it was pushed. Written by one thread, read by others.

    refreshes, failures: of the table, in all; failures_in_a_row: just now. last_failure: told in the verdict.
    agreement: the newest. seconds: newest (serving, candidate) times to score the same rows.
    """

    refreshes: int = 0
    failures: int = 0
    failures_in_a_row: int = 0
    last_failure: str = ""
    agreement: Agreement | None = None
    _drifts: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _seconds: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def scored(self, agreement: Agreement, serving_s: float, candidate_s: float) -> None:
        """Both versions scored the same rows."""
        self.refreshes += 1
        self.failures_in_a_row = 0
        self.agreement = agreement
        if agreement.rows >= MIN_ROWS:
            self._drifts.append(agreement.drift)
        self._seconds.append((serving_s, candidate_s))

    def failed(self, told: str) -> None:
        """The serving version scored the rows and the candidate did not."""
        self.failures += 1
        self.failures_in_a_row += 1
        self.last_failure = told

    @property
    def drift(self) -> float:
        """Mean of the newest; NaN before there are any."""
        drifts = list(self._drifts)
        return sum(drifts) / len(drifts) if drifts else math.nan

    @property
    def compared(self) -> int:
        """Refreshes that drift is averaged over."""
        return len(self._drifts)

    @property
    def latency_s(self) -> tuple[float, float]:
        """Mean of the newest, (serving, candidate); (0, 0) before there are any."""
        seconds = list(self._seconds)
        n = max(1, len(seconds))
        return sum(s for s, _ in seconds) / n, sum(c for _, c in seconds) / n


@dataclass(frozen=True)
class Viewers:
    """What clients reported of the viewers of one version.

    dead: impressions of streams that were over. ours: those that we could have prevented.
    """

    impressions: int = 0
    dead: int = 0
    ours: int = 0


def verdict(
    limits: RolloutSettings, trial: Trial, faults: int, serving: Viewers, candidate: Viewers
) -> tuple[str, str] | None:
    """(which guardrail, what was seen) when the canary must end; None while it may go on.

    Args:
        faults: batches that could not be ranked by the candidate; one is enough.
    """
    if faults:
        return "errors", f"{faults} batches could not be ranked by it"
    if trial.failures_in_a_row >= limits.max_failures:
        return "errors", f"{trial.failures_in_a_row} refreshes in a row failed: {trial.last_failure}"
    if trial.compared >= limits.min_refreshes and trial.drift > limits.max_drift:
        found = trial.agreement
        means = f" ({found.mean_candidate:.4g} against {found.mean_serving:.4g})" if found else ""
        return "drift", f"its mean score is off by {trial.drift:.1%}{means}; allowed are {limits.max_drift:.0%}"
    ours_s, theirs_s = trial.latency_s
    if (
        trial.refreshes >= limits.min_refreshes
        and theirs_s * 1000 > limits.latency_floor_ms
        and theirs_s > limits.max_latency_ratio * ours_s
    ):
        return "latency", f"a refresh takes {theirs_s * 1000:.0f} ms, the serving version's {ours_s * 1000:.0f} ms"
    if candidate.ours > 0 and serving.ours == 0:
        return "dead_impressions", f"{candidate.ours} viewers were shown a stream that we knew to be over"
    if candidate.impressions >= limits.min_impressions and serving.impressions >= limits.min_impressions:
        ours, theirs = serving.dead / serving.impressions, candidate.dead / candidate.impressions
        # The error of the difference of two shares: chance alone must not end a canary.
        pooled = (serving.dead + candidate.dead) / (serving.impressions + candidate.impressions)
        error = math.sqrt(pooled * (1 - pooled) * (1 / serving.impressions + 1 / candidate.impressions))
        if theirs - ours > max(limits.max_dead_increase, 3 * error):
            return "dead_impressions", f"{theirs:.2%} of its impressions are dead, {ours:.2%} of the others"
    return None
