"""How good an order is at each moment, and how sure a difference is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loadtest.replay.growth import TOP
from models.growth.labels import place_of

BLOCK_MOMENTS = 30
"""Minutes drawn together: truths of 15 minutes ahead overlap, and who is live changes slowly."""
DRAWS = 10_000
_DISCOUNT = 1.0 / np.log2(np.arange(TOP) + 2.0)
_GAIN = (TOP - np.arange(TOP)) / TOP


@dataclass(frozen=True)
class Quality:
    """Per moment, float64[k] each: overlap@10 and NDCG@10, in [0, 1]."""

    overlap10: NDArray[np.float64]
    ndcg10: NDArray[np.float64]


def quality(score: NDArray[np.floating], truth: NDArray[np.float64], moment: NDArray[np.int64]) -> Quality:
    """Of scores [n] against what came, float64[n], at moments int64[n]; finite values, moments in [0, k).

    overlap@10: share of the truly ten highest among the ten scored highest. NDCG@10: the gain of a stream is 1 for the
    truly highest, .9 for the second … .1 for the tenth, 0 for others, discounted by log2(place + 1). By place, not by
    growth: when everything shrinks growth gives no gain to share, and one raid would outweigh an hour. Of equal values
    the earlier row is before.
    """
    true, scored = place_of(truth, moment), place_of(score.astype(np.float64), moment)
    both = (true < TOP) & (scored < TOP)
    k = int(moment.max(initial=-1)) + 1
    wanted = np.minimum(np.bincount(moment, minlength=k), TOP)
    gains = np.bincount(moment[both], _GAIN[true[both]] * _DISCOUNT[scored[both]], k)
    ideal = np.concatenate([[0.0], np.cumsum(_GAIN * _DISCOUNT)])[wanted]
    return Quality(np.bincount(moment[both], minlength=k) / wanted, gains / ideal)


def interval95(differences: NDArray[np.float64], block: int = BLOCK_MOMENTS, seed: int = 7) -> tuple[float, float]:
    """95 % interval of the mean of float64[k] in order of time, by a circular block bootstrap; NaN under two blocks.

    Paired: give it differences at the same moments. Source: Politis, Romano, "A circular block-resampling procedure
    for stationary data" (1992).
    """
    k = len(differences)
    if k < 2 * block:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    sums = np.concatenate([[0.0], np.cumsum(np.concatenate([differences, differences[:block]]))])
    whole, rest = divmod(k, block)
    begins = rng.integers(0, k, (DRAWS, whole))
    total = (sums[begins + block] - sums[begins]).sum(axis=1)
    if rest:  # a shorter block, so that each draw has k moments
        begin = rng.integers(0, k, DRAWS)
        total += sums[begin + rest] - sums[begin]
    low, high = np.percentile(total / k, [2.5, 97.5])
    return float(low), float(high)
