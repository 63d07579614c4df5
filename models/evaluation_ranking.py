"""How good an order of candidates is, how sure that is, and what it would have earned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 200


@dataclass(frozen=True)
class Interval:
    """A statistic, and where it lies in 95 of 100 resamples; NaN where it could not be computed."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], float],
    groups: NDArray[np.int64],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """``statistic`` of row numbers int64[n], over all rows and over resampled ones; seeded.

    Whole groups are drawn, with replacement: rows of one reply, or of one viewer, are no independent witnesses.

    Args:
        groups: int64[R], the group of each row.
    """
    order = np.argsort(groups, kind="stable")
    _, starts, sizes = np.unique(groups[order], return_index=True, return_counts=True)
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        drawn = rng.integers(0, len(sizes), len(sizes))
        size = sizes[drawn]
        # Of each drawn group its rows, one after the other.
        within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
        found.append(statistic(order[np.repeat(starts[drawn], size) + within]))
    values = np.array(found)
    values = values[np.isfinite(values)]
    low, high = np.quantile(values, [0.025, 0.975]) if len(values) else (np.nan, np.nan)
    return Interval(float(statistic(np.arange(len(groups)))), float(low), float(high))


def bootstrap_mean(values: NDArray[np.floating], resamples: int = 1_000, seed: int = 0) -> Interval:
    """The mean of float[n], one value per independent group; NaN values are left out."""
    kept = values[np.isfinite(values)].astype(np.float64)
    if not len(kept):
        return Interval(float("nan"), float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    means = np.array([kept[rng.integers(0, len(kept), len(kept))].mean() for _ in range(resamples)])
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(kept.mean()), float(low), float(high))


def ndcg(
    scores: NDArray[np.floating], gains: NDArray[np.floating], groups: NDArray[np.int64], k: int = 10
) -> NDArray[np.float64]:
    """Normalised discounted cumulative gain of the first ``k``, float64[G], by group in ascending order.

    sum of gain / log2(1 + rank), over that of the best order (Järvelin, Kekäläinen, 2002). NaN for a group
    without any gain: every order of it is best. Ties keep the order of rows.

    Args:
        scores, gains: float[R], gains at least 0. groups: int64[R].
    """
    _, group = np.unique(groups, return_inverse=True)
    n = int(group.max()) + 1 if len(group) else 0

    def discounted(by: NDArray[np.floating]) -> NDArray[np.float64]:
        order = np.lexsort((-by, group))
        sizes = np.bincount(group, minlength=n)
        rank = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        worth = np.where(rank < k, gains[order] / np.log2(2.0 + rank), 0.0)
        return np.bincount(group[order], worth, n)

    best = discounted(gains)
    return np.divide(discounted(scores), best, out=np.full(n, np.nan), where=best > 0)


def best_of(scores: NDArray[np.floating], groups: NDArray[np.int64], k: int) -> NDArray[np.bool_]:
    """bool[R]: whether a row is among the ``k`` best scored of its group; ties by place."""
    order = np.lexsort((np.arange(len(scores)), -scores, groups))
    first = np.flatnonzero(np.diff(groups[order], prepend=groups[order[:1]] - 1))
    rank = np.arange(len(order)) - np.repeat(first, np.diff(np.append(first, len(order))))
    chosen = np.zeros(len(scores), np.bool_)
    chosen[order[rank < k]] = True
    return chosen


@dataclass(frozen=True)
class OffPolicy:
    """What a policy would have earned per impression. effective_rows: as many equally weighted ones say as much."""

    reward: Interval
    effective_rows: float


def snips(
    rewards: NDArray[np.floating],
    logged: NDArray[np.floating],
    target: NDArray[np.floating],
    groups: NDArray[np.int64],
    *,
    largest_weight: float = 100.0,
) -> OffPolicy:
    """Self-normalised inverse propensity score: sum(w r) / sum(w), w = min(target / logged, largest_weight).

    Source: Swaminathan, Joachims, "The self-normalized estimator for counterfactual learning" (2015).

    Args:
        rewards: float[R] of what was shown. logged: its probability when it was shown; rows with 0 (shown for
            certain, by score) say nothing about other policies and are left out. target: its probability under the
            policy asked about, up to a constant factor. groups: int64[R], resampled as wholes.
    """
    drawn = np.flatnonzero(logged > 0)
    w = np.minimum(target[drawn] / logged[drawn], largest_weight).astype(np.float64)
    r = rewards[drawn].astype(np.float64)
    if not w.sum() > 0:
        nothing = float("nan")
        return OffPolicy(Interval(nothing, nothing, nothing), 0.0)

    def estimate(rows: NDArray[np.int64]) -> float:
        total = float(w[rows].sum())
        return float((w[rows] * r[rows]).sum()) / total if total > 0 else float("nan")

    return OffPolicy(bootstrap(estimate, groups[drawn]), float(w.sum() ** 2 / (w * w).sum()))


def recall(
    viewers: NDArray[np.floating],
    streams: NDArray[np.floating],
    wanted: NDArray[np.int64],
    live: NDArray[np.bool_] | None = None,
    k: int = 500,
) -> NDArray[np.float64]:
    """float64[Q]: 1 where the wanted stream is among the ``k`` nearest by inner product, else 0; ties by place.

    Args:
        viewers: float[Q, D]. streams: float[S, D]. wanted: int64[Q] into streams. live: bool[Q, S], what could have
            been shown then; None: all.
    """
    found = np.zeros(len(viewers))
    for first in range(0, len(viewers), 256):
        some = slice(first, first + 256)
        products = viewers[some] @ streams.T
        own = np.take_along_axis(products, wanted[some, None], axis=1)
        before = np.arange(len(streams)) < wanted[some, None]
        better = (products > own) | ((products == own) & before)
        if live is not None:
            better &= live[some]
        found[some] = better.sum(1) < k
    return found
