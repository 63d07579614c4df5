"""What may become of a stream in 15 minutes, and from that its chance to be in the next top ten.

- *A stream alone.* How it will grow is learned from its own reports, not from who else is live: in a history company is
  chance, and a model that sees it learns the few companies there were. Hence every row with a truth teaches, at
  moments with three live streams too, and one distribution answers for all targets.
- *Company only at the end.* At each moment and target there is one mark that ten of the live are expected to pass, that
  is, above which their chances sum up to ten. A stream's score is its chance to pass it. A score of one stream without
  knowing the others would need a mark that suits every moment, and there is none: the tenth highest growth is 2 viewers
  at one moment and 50 at another.
- *In swings.* Viewers come and go about as their square root, so growth is counted in roots of viewers; its asinh keeps
  a raid from outweighing an hour.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loadtest.replay.growth import TARGETS, TOP
from models.growth.features import SOFTENER

TINY = 1e-30
"""The least weight, so that it has a logarithm."""
MARK_LIMIT = 25.0
"""Marks are sought as sinh(x), |x| up to this: beyond any number of viewers."""
HALVINGS = 48
PARTS = 3
"""A component's weight, centre and log of spread."""


@dataclass(frozen=True)
class Outlook:
    """Of n streams, each a mixture of m logistic distributions over its swing.

    weight, centre, log_spread float64[n, m], weights of a row add up to 1; now float64[n]: viewers, > 0.
    """

    weight: NDArray[np.float64]
    centre: NDArray[np.float64]
    log_spread: NDArray[np.float64]
    now: NDArray[np.float64]

    def chance(self, then: NDArray[np.float64]) -> NDArray[np.float64]:
        """float64[n]: of more viewers than float64[n] in 15 minutes."""
        return (self.weight * 0.5 * (1.0 - np.tanh(0.5 * self._standardised(then)))).sum(axis=1)

    def log_odds(self, then: NDArray[np.float64]) -> NDArray[np.float64]:
        """float64[n]: log(chance / (1 - chance)), where the chance itself would be rounded to 0 or 1 too."""
        x, weight = self._standardised(then), np.log(np.maximum(self.weight, TINY))
        above = np.logaddexp.reduce(weight - np.logaddexp(0.0, x), axis=1)
        below = np.logaddexp.reduce(weight - np.logaddexp(0.0, -x), axis=1)
        return above - below

    def _standardised(self, then: NDArray[np.float64]) -> NDArray[np.float64]:
        return (swing(then - self.now, self.now)[:, None] - self.centre) * np.exp(-self.log_spread)


def swing(growth: NDArray[np.float64], now: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64[n]: asinh of growth in square roots of viewers ``now``; NaN where growth is."""
    return np.arcsinh(growth / np.sqrt(now + SOFTENER))


def scores(answer: NDArray[np.float32], now: NDArray[np.float64], moment: NDArray[np.int64]) -> NDArray[np.float32]:
    """float32[n, TARGETS]: log odds to be in the next top ten of what is live at the same ``moment`` int64[n].

    Args:
        answer: float32[n, PARTS, m], as the nets give it. now: float64[n], viewers.
    """
    weight, centre, log_spread = np.moveaxis(answer.astype(np.float64), 1, 0)
    outlook = Outlook(weight, centre, log_spread, now)
    _, group = np.unique(moment, return_inverse=True)
    found = [outlook.log_odds(_then(target, marks(outlook, target, group)[group], now)) for target in TARGETS]
    return np.stack(found, axis=1).astype(np.float32)


def marks(outlook: Outlook, target: str, group: NDArray[np.int64]) -> NDArray[np.float64]:
    """float64[g], g groups in [0, g): of each the value of ``target`` that ten are expected to pass; of fewer than
    twenty streams, half of them."""
    sizes = np.bincount(group)
    wanted = np.minimum(TOP, sizes / 2.0)
    low, high = np.full(len(sizes), -MARK_LIMIT), np.full(len(sizes), MARK_LIMIT)
    for _ in range(HALVINGS):
        middle = (low + high) / 2.0
        chance = outlook.chance(_then(target, np.sinh(middle)[group], outlook.now))
        above = np.bincount(group, chance, len(sizes)) > wanted
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.sinh(low)


def _then(target: str, value: NDArray[np.float64], now: NDArray[np.float64]) -> NDArray[np.float64]:
    """Viewers in 15 minutes at which ``target`` is ``value``."""
    return {"viewers": value, "absolute_growth": now + value, "relative_growth": now * (1.0 + value)}[target]
