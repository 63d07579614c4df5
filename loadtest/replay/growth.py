"""What really grew: the truth that feeds are compared with, and how.

At each full 5 minutes t of the file:

- A session is *readable* when it has begun, has not ended, and its last snapshot is at most 10 minutes old. Its
  value is that snapshot's viewers: what anybody could know at t, nothing interpolated.
- Candidates: sessions readable at t with at least 20 viewers, which are readable 15 minutes later too. Streams that
  end within these 15 minutes are left out for everybody, feeds and formulas: their growth is an end, not a trend.
- A bin counts with at least 30 candidates, and only while the file reaches t + 15 min.
- Truth, v0 now and v15 then: ``viewers`` v15; ``absolute_growth`` v15 - v0; ``relative_growth`` v15 / v0 - 1.
- overlap@10: share of the ten truly highest among the ten that a feed or formula puts first; mean over the bins.
  Equal values: the session that began earlier is first, in the truth and in formulas.

On the per-minute YouTube history that the documentation describes (171 bins), against the numbers published with it:
viewers now → viewers .92 (published .915), viewers now → absolute growth .26 (.237), viewers now → relative growth .08
(.050). Two are not reproduced: Δ viewers → absolute growth .34 (.416), likes per viewer → relative growth .37 (.407).
Several hundred other readings were tried on these baselines (bin means, medians, first and last values, trailing means,
interpolation, other floors and windows); none gave .416, the highest being .38 with trailing 5-minute means. .41 for
likes appears when the likes of a bin's 5 minutes are put beside the viewers at its begin, a look ahead that no live
server has. Counting streams that end as 0 instead of leaving them out gives .86 for viewers, so that was not done.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loadtest.replay.reader import History, Kind
from loadtest.replay.sessions import Sessions

BIN_S = 300
AHEAD_S = 900
FRESH_S = 600
MIN_VIEWERS = 20
MIN_CANDIDATES = 30
TOP = 10
TARGETS = ("viewers", "absolute_growth", "relative_growth")


class Reports:
    """The snapshots of a history, by session and time.

    t_s int64[m], viewers float64[m], likes int64[m] (of the session so far), session int32[m]: sorted by session,
    then time; of several at one moment the file's last counts.
    """

    def __init__(self, history: History, sessions: Sessions) -> None:
        rows = np.flatnonzero(sessions.of_row >= 0)
        rows = rows[np.argsort(sessions.of_row[rows], kind="stable")]
        # Likes of a start row count too, so sums come before the choice of snapshots.
        total = np.cumsum(history.likes[rows])
        first = np.searchsorted(sessions.of_row[rows], sessions.of_row[rows])
        total -= total[first] - history.likes[rows[first]]
        chosen = history.kind[rows] == Kind.SNAPSHOT
        rows = rows[chosen]
        self.t_s = history.t_s[rows]
        self.viewers = history.viewers[rows].astype(np.float64)
        self.likes = total[chosen]
        self.session = sessions.of_row[rows]
        self.sessions = sessions
        self._span_s = int(history.t_s[-1]) + 1
        self._key = self.session * np.int64(self._span_s) + self.t_s

    def last(self, t_s: int) -> NDArray[np.int64]:
        """int64[S]: each session's last report at or before ``t_s``; -1 without one."""
        if t_s < 0:
            return np.full(len(self.sessions.stream), -1, np.int64)
        every = np.arange(len(self.sessions.stream), dtype=np.int64)
        wanted = every * self._span_s + min(t_s, self._span_s - 1)
        at = np.searchsorted(self._key, wanted, side="right") - 1
        return np.where((at >= 0) & (self.session[np.maximum(at, 0)] == every), at, -1)

    def value(self, column: NDArray[np.generic], at: NDArray[np.int64]) -> NDArray[np.float64]:
        """float64: the column's value of reports ``at``; 0 for -1, before the first one."""
        return np.where(at >= 0, column[np.maximum(at, 0)], 0).astype(np.float64)

    def readable(self, t_s: int, at: NDArray[np.int64]) -> NDArray[np.bool_]:
        """bool[S]: live at ``t_s``, with a last report ``at`` int64[S] that is fresh."""
        live = (self.sessions.start_s <= t_s) & (t_s < self.sessions.end_s)
        return live & (at >= 0) & (t_s - self.t_s[np.maximum(at, 0)] <= FRESH_S)


@dataclass(frozen=True)
class Truth:
    """One bin. candidates int32[c]: sessions; streams int32[c]: theirs; tops: target → ten streams."""

    t_s: int
    candidates: NDArray[np.int32]
    streams: NDArray[np.int32]
    tops: dict[str, frozenset[int]]


def bins(first_s: int, last_s: int) -> range:
    """The full 5 minutes from ``first_s`` to ``last_s``, both included."""
    return range(-(-first_s // BIN_S) * BIN_S, last_s + 1, BIN_S)


def truth_at(reports: Reports, t_s: int, last_s: int) -> Truth | None:
    """The truth of one bin of a history that ends at ``last_s``; None when the bin does not count."""
    if t_s + AHEAD_S > last_s:
        return None
    now, then = reports.last(t_s), reports.last(t_s + AHEAD_S)
    chosen = reports.readable(t_s, now) & reports.readable(t_s + AHEAD_S, then)
    chosen &= reports.value(reports.viewers, now) >= MIN_VIEWERS
    candidates = np.flatnonzero(chosen).astype(np.int32)
    if len(candidates) < MIN_CANDIDATES:
        return None
    v0 = reports.value(reports.viewers, now[candidates])
    v15 = reports.value(reports.viewers, then[candidates])
    streams = reports.sessions.stream[candidates]
    targets = dict(zip(TARGETS, (v15, v15 - v0, v15 / v0 - 1.0)))
    tops = {name: frozenset(streams[highest(values)].tolist()) for name, values in targets.items()}
    return Truth(t_s, candidates, streams, tops)


def highest(values: NDArray[np.float64], k: int = TOP) -> NDArray[np.int64]:
    """Places of the k highest of float64[c], highest first; equal values keep their order."""
    return np.argsort(-values, kind="stable")[:k]


class Overlap:
    """overlap@10 of one feed, averaged over bins."""

    def __init__(self) -> None:
        self._shared = dict.fromkeys(TARGETS, 0)
        self.bins = 0

    def add(self, truth: Truth, first: NDArray[np.int32]) -> None:
        """Counts one bin; ``first`` int32[<= 10]: the streams that were put first."""
        if len(first) > TOP:
            raise ValueError(f"at most {TOP} streams wanted, got {len(first)}")
        self.bins += 1
        for name, top in truth.tops.items():
            self._shared[name] += len(top.intersection(first.tolist()))

    def means(self) -> dict[str, float | None]:
        """Target → mean share in [0, 1]; None without a bin."""
        return {
            name: round(shared / (TOP * self.bins), 4) if self.bins else None for name, shared in self._shared.items()
        }
