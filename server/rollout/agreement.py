"""How far two models agree about the same rows. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST_ROWS = 16_384
"""Rows that ranks are compared on at most: sorting more tells nothing new."""
TOP = (10, 100)
BINS = 10


@dataclass(frozen=True)
class Agreement:
    """A candidate's scores against those of the version that serves.

    rows: compared ones, finite in both. rank_correlation: Spearman's, in [-1, 1]; NaN where one of them is constant.
    top10, top100: share of the serving version's best so many that the candidate's best contain.
    mean_serving, mean_candidate: mean score. calibration_gap: mean, over tenths of the rows by serving score, of the
    distance between the two mean scores: 0 when the candidate claims the same probabilities everywhere.
    """

    rows: int
    rank_correlation: float
    top10: float
    top100: float
    mean_serving: float
    mean_candidate: float
    calibration_gap: float

    @property
    def drift(self) -> float:
        """Relative distance of the mean scores; NaN without rows."""
        if not self.rows:
            return float("nan")
        return abs(self.mean_candidate - self.mean_serving) / max(abs(self.mean_serving), 1e-6)


def compare(serving: NDArray[np.float32], candidate: NDArray[np.float32]) -> Agreement:
    """Scores float32[n] of the same rows. O(n), and O(m log m) of at most MOST_ROWS rows."""
    both = np.isfinite(serving) & np.isfinite(candidate)
    a, b = serving[both].astype(np.float64), candidate[both].astype(np.float64)
    n = len(a)
    if n == 0:
        nan = float("nan")
        return Agreement(0, nan, nan, nan, nan, nan, nan)
    some = slice(None, None, -(-n // MOST_ROWS))
    return Agreement(
        rows=n,
        rank_correlation=_spearman(a[some], b[some]),
        top10=_overlap(a, b, TOP[0]),
        top100=_overlap(a, b, TOP[1]),
        mean_serving=float(a.mean()),
        mean_candidate=float(b.mean()),
        calibration_gap=_calibration_gap(a[some], b[some]),
    )


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """1-based ranks, ties sharing their mean."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[place])


def _spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    x, y = _ranks(a), _ranks(b)
    x -= x.mean()
    y -= y.mean()
    spread = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum() / spread) if spread > 0 else float("nan")


def _overlap(a: NDArray[np.float64], b: NDArray[np.float64], k: int) -> float:
    k = min(k, len(a))
    best_a, best_b = (np.argsort(-v, kind="stable")[:k] if k == len(v) else _best(v, k) for v in (a, b))
    return len(np.intersect1d(best_a, best_b)) / k


def _best(values: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """The k largest, ties by position: two models that are alike must not differ by how a partition falls."""
    least = np.partition(values, len(values) - k)[len(values) - k]
    above, ties = np.flatnonzero(values > least), np.flatnonzero(values == least)
    return np.concatenate([above, ties[: k - len(above)]])


def _calibration_gap(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    order = np.argsort(a, kind="stable")
    gaps = [abs(float(a[part].mean() - b[part].mean())) for part in np.array_split(order, BINS) if len(part)]
    return float(np.mean(gaps))
