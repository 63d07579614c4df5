"""What is known about a stream at a minute: numbers from its own reports up to then, and its place among the live.

Nothing here depends on the clock's origin, the hour, or who streams: only what carries over to another file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from loadtest.replay.formulas import ewma
from loadtest.replay.growth import Reports

MINUTE_S = 60
SOFTENER = 5.0
"""Added to viewers before a logarithm: 3 of 20 viewers who leave are chance."""
CHANGE_MIN = (1, 2, 3, 5, 8, 10, 15, 20, 30, 45, 60)
MEAN_MIN = (3, 5, 10, 15, 30, 60)
LIKES_MIN = (1, 2, 3, 5, 10, 15, 30)
HALF_LIFE_MIN = (2, 5, 15, 45)

OWN = (
    "viewers", "age_min", "staleness_min", "below_peak", "since_peak_min", "likes", "likes_per_viewer",
    *(f"change_{m}m" for m in CHANGE_MIN), *(f"gain_{m}m" for m in CHANGE_MIN),
    *(f"above_mean_{m}m" for m in MEAN_MIN), *(f"spread_{m}m" for m in MEAN_MIN),
    *(f"above_ewma_{m}m" for m in HALF_LIFE_MIN),
    *(f"likes_{m}m" for m in LIKES_MIN), *(f"likes_per_viewer_{m}m" for m in LIKES_MIN),
)  # fmt: skip
RANKED = (
    "viewers", "age_min", "likes", "likes_per_viewer", "change_5m", "change_15m", "change_30m", "gain_3m", "gain_5m",
    "gain_10m", "gain_15m", "gain_30m", "above_mean_10m", "above_mean_30m", "above_ewma_5m", "above_ewma_15m",
    "likes_5m", "likes_15m", "likes_per_viewer_5m", "likes_per_viewer_15m",
)  # fmt: skip
"""Of these also the share of the live that are below."""
PLACED = ("viewers", "gain_15m", "change_15m", "likes_per_viewer_5m")
"""Of these also how many are above: what a top ten by a formula would be."""
AVERAGED = ("viewers", "change_15m")
"""Of these also the mean over the live."""
NAMES = (
    *OWN, *(f"rank_{name}" for name in RANKED), *(f"place_{name}" for name in PLACED),
    *(f"mean_{name}" for name in AVERAGED), "live",
)  # fmt: skip
_PLACED_AT = np.array([RANKED.index(name) for name in PLACED])
_RANKED_AT = np.array([OWN.index(name) for name in RANKED])
_AVERAGED_AT = np.array([OWN.index(name) for name in AVERAGED])


def schema(names: Sequence[str] = NAMES) -> str:
    """Hash of the features' names and of the constants they are made with."""
    return hashlib.sha256(f"growth {SOFTENER} {','.join(names)}".encode()).hexdigest()[:16]


class OwnFeatures:
    """Features of sessions from their own reports.

    viewers: of the last report. age: since the begin. staleness: of the last report. below_peak, change_, above_…:
    logs of ratios of viewers now to the peak, to the viewers m minutes ago (the first report's, before that), to the
    mean of the reports of the last m minutes, to the mean with a half-life. gain_: viewers now - viewers then.
    spread_: root mean square of the steps between the logs of reports. likes: of the session, and of m minutes.
    Counts and gains are signed logs.
    """

    def __init__(self, reports: Reports) -> None:
        self._reports = reports
        n = len(reports.t_s)
        self._first = np.searchsorted(reports.session, np.arange(len(reports.sessions.stream)))
        begins = self._first[reports.session]
        self._log = np.log(reports.viewers + SOFTENER)
        step = np.diff(self._log, prepend=self._log[:1])
        step[begins == np.arange(n)] = 0.0
        self._square = step * step
        self._sum, self._squares = (_running_sum(x, self._first) for x in (self._log, self._square))
        self._ewma = [np.log(ewma(reports, m * MINUTE_S) + SOFTENER) for m in HALF_LIFE_MIN]
        self._peak, self._peak_s = _running_peak(reports.viewers, reports.t_s, begins)

    def at(self, t_s: int, of: NDArray[np.int64]) -> NDArray[np.float32]:
        """float32[c, OWN] of sessions ``of`` int64[c], all with a report by ``t_s``; later ones are not read."""
        r, minute = self._reports, MINUTE_S
        now, first = r.last(t_s)[of], self._first[of]
        viewers, log, likes = r.viewers[now], self._log[now], r.likes[now]
        before = {m: r.last(t_s - m * minute)[of] for m in {*CHANGE_MIN, *MEAN_MIN, *LIKES_MIN}}
        then = [np.maximum(before[m], first) for m in CHANGE_MIN]
        # Reports of the last m minutes; the last one of all if it is older than that.
        since = [np.clip(before[m] + 1, first, now) for m in MEAN_MIN]
        recent = [likes - r.value(r.likes, before[m]) for m in LIKES_MIN]
        columns = [
            log,
            np.log1p((t_s - r.sessions.start_s[of]) / minute),
            np.log1p((t_s - r.t_s[now]) / minute),
            log - np.log(self._peak[now] + SOFTENER),
            np.log1p((t_s - self._peak_s[now]) / minute),
            np.log1p(likes),
            np.log((likes + 1.0) / (viewers + SOFTENER)),
            *(log - self._log[at] for at in then),
            *(signed_log(viewers - r.viewers[at]) for at in then),
            *(log - (self._sum[now] - self._sum[at] + self._log[at]) / (now + 1 - at) for at in since),
            *(
                np.sqrt(np.maximum(self._squares[now] - self._squares[at] + self._square[at], 0.0) / (now + 1 - at))
                for at in since
            ),
            *(log - mean[now] for mean in self._ewma),
            *(np.log1p(count) for count in recent),
            *(np.log((count + 0.5) / (viewers + SOFTENER)) for count in recent),
        ]
        return np.stack(columns, axis=1).astype(np.float32)


def with_places(own: NDArray[np.float32], live: NDArray[np.int64]) -> NDArray[np.float32]:
    """float32[n, NAMES]: own features float32[n, OWN], and where they are among rows with the same ``live`` int64[n].

    rank_: share of the others that are below, equal ones half; in [0, 1], .5 when alone. place_: log of how many are
    above. live: log of how many there are.
    """
    _, group = np.unique(live, return_inverse=True)
    sizes = np.bincount(group)
    ranks = np.stack([_ranks(own[:, at], group, sizes) for at in _RANKED_AT], axis=1)
    places = np.log1p((1.0 - ranks[:, _PLACED_AT]) * (sizes[group] - 1)[:, None])
    means = np.stack([np.bincount(group, own[:, at])[group] / sizes[group] for at in _AVERAGED_AT], axis=1)
    live_log = np.log(sizes[group])[:, None]
    return np.concatenate([own, ranks, places, means, live_log], axis=1, dtype=np.float32, casting="same_kind")


def signed_log(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """sign(x) log(1 + |x|)."""
    return np.sign(x) * np.log1p(np.abs(x))


def _ranks(column: NDArray[np.float32], group: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.float64]:
    order = np.lexsort((column, group))
    value, of = column[order], group[order]
    index = np.arange(len(order))
    fresh = np.ones(len(order), np.bool_)
    fresh[1:] = (value[1:] != value[:-1]) | (of[1:] != of[:-1])
    begin = np.maximum.accumulate(np.where(fresh, index, 0))
    last = np.ones(len(order), np.bool_)
    last[:-1] = fresh[1:]
    end = np.minimum.accumulate(np.where(last, index, len(order))[::-1])[::-1]
    first = (np.cumsum(sizes) - sizes)[of]
    others = sizes[of] - 1
    rank = np.empty(len(order))
    rank[order] = np.where(others > 0, ((begin + end) / 2.0 - first) / np.maximum(others, 1), 0.5)
    return rank


def _running_sum(x: NDArray[np.float64], first: NDArray[np.int64]) -> NDArray[np.float64]:
    """float64[m]: sum of the session so far, as of each report; first int64[S] is where sessions begin.

    Not one sum over all: its rounding would carry what other sessions do later into this one.
    """
    return np.concatenate([np.cumsum(part) for part in np.split(x, first[1:])])


def _running_peak(
    viewers: NDArray[np.float64], t_s: NDArray[np.int64], begins: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Highest viewers of the session so far, and when they were first reached, as of each report."""
    peak, peak_s = viewers.copy(), t_s.copy()
    for i in np.flatnonzero(begins != np.arange(len(viewers))).tolist():
        if peak[i - 1] >= peak[i]:
            peak[i], peak_s[i] = peak[i - 1], peak_s[i - 1]
    return peak, peak_s
