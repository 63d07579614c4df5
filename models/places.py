"""How much less a place of the slate is looked at than the first one: solved exactly, once the net is trained.

Stochastic descent leaves the ridge between "liked less" and "looked at less" half climbed: only first places tell the
two apart, and they are few. Given the net's logits, what is left are some fifty numbers with one best solution.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STIFFNESS = (1e3, 1e4, 1e5, 1e6)
"""Clicks against which a bend weighs, to choose from: neighbours are looked at alike, and places far down have few
clicks each; where they are not (below a fold, say), clicks must say so."""
SLACK = 2.0
"""Log-likelihood of held-out clicks that the stiffest may lack of the best: less is chance."""
_FOLDS = 4
_STEPS = 50
_Told = tuple[NDArray[np.floating], NDArray[np.int64], NDArray[np.bool_]]
_LEAST = -6.0  # log; below, no click was ever seen


def examined(
    logits: NDArray[np.floating], places: NDArray[np.int64], clicked: NDArray[np.bool_], n_places: int
) -> NDArray[np.float64]:
    """log e float64[n_places], at most 0, e[0] = 1, of p(click) = e[place] * sigmoid(slope * logit + offset).

    Maximum likelihood by Fisher's scoring over e, slope and offset at once, with a penalty on bends of log e over
    log place, as stiff as held-out clicks allow. Places below the last one seen have its value.

    Args:
        logits: float[n], how much each row would be liked. places: int64[n] from 0. clicked: bool[n].

    Raises:
        ValueError: no row at place 0, which the others are compared with, or labels all alike.
    """
    seen = np.bincount(places, minlength=n_places)
    if seen[0] == 0 or not 0 < clicked.sum() < len(clicked):
        raise ValueError("impressions: some at the first place, some clicked and some not clicked wanted")
    n = int(np.flatnonzero(seen)[-1]) + 1
    told = logits, places, clicked
    weights, _ = _solved(_problem(*told, n, _stiffness(told, n)))
    return np.concatenate([weights[2:], np.full(n_places - n, weights[-1])])


def _stiffness(told: _Told, n: int) -> float:
    """The stiffest of STIFFNESS that predicts held-out clicks about as well as the best."""
    fold = np.arange(len(told[1])) // n % _FOLDS  # about a slate at a time
    losses = np.zeros(len(STIFFNESS))
    for i, stiffness in enumerate(STIFFNESS):
        for k in range(_FOLDS):
            weights, _ = _solved(_problem(*(part[fold != k] for part in told), n, stiffness))
            losses[i] += _problem(*(part[fold == k] for part in told), n, 0.0).loss(weights)
    return STIFFNESS[int(np.flatnonzero(losses <= losses.min() + SLACK)[-1])]


def _problem(
    logits: NDArray[np.floating], places: NDArray[np.int64], clicked: NDArray[np.bool_], n: int, stiffness: float
) -> _Problem:
    x = np.stack([logits.astype(np.float64), np.ones(len(clicked))])
    return _Problem(x, places, clicked.astype(np.float64), stiffness * _bends(n))


def _solved(problem: _Problem) -> tuple[NDArray[np.float64], float]:
    """The best weights float64[2 + places] (slope, offset, log e) and their loss."""
    weights = np.concatenate([[1.0, 0.0], np.zeros(len(problem.bends))])
    free = np.arange(len(weights)) != 2  # the first place is the measure
    loss = problem.loss(weights)
    for _ in range(_STEPS):
        gradient, information = problem.slope(weights)
        step = np.zeros_like(weights)
        step[free] = np.linalg.solve(information[np.ix_(free, free)] + 1e-6 * np.eye(free.sum()), gradient[free])
        for _ in range(30):
            tried = weights - step
            tried[2:] = np.clip(tried[2:], _LEAST, 0.0)
            tried_loss = problem.loss(tried)
            if tried_loss <= loss:
                break
            step *= 0.5
        else:
            break
        done = loss - tried_loss < 1e-10 * len(problem.y)
        weights, loss = tried, tried_loss
        if done:
            break
    return weights, loss


@dataclass(frozen=True)
class _Problem:
    """x float64[2, n] (logit, 1), places int64[n], y float64[n], bends float64[n_places, n_places] of the penalty."""

    x: NDArray[np.float64]
    places: NDArray[np.int64]
    y: NDArray[np.float64]
    bends: NDArray[np.float64]

    def loss(self, weights: NDArray[np.float64]) -> float:
        _, p = self._chance(weights)
        own = -(self.y * np.log(p) + (1.0 - self.y) * np.log1p(-p)).sum()
        return float(own + 0.5 * weights[2:] @ self.bends @ weights[2:])

    def slope(self, weights: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Gradient float64[2 + places] and Fisher's information of the same width."""
        n = len(self.bends)
        liked, p = self._chance(weights)
        slopes = self.x * (1.0 - liked)  # d log p / d (slope, offset); d log p / d log e is 1
        pull, weight = (p - self.y) / (1.0 - p), p / (1.0 - p)
        information = np.zeros((2 + n, 2 + n))
        information[:2, :2] = (slopes * weight) @ slopes.T
        information[2:, 2:] = np.diag(np.bincount(self.places, weight, n)) + self.bends
        for i in range(2):
            information[i, 2:] = information[2:, i] = np.bincount(self.places, weight * slopes[i], n)
        own = np.bincount(self.places, pull, n) + self.bends @ weights[2:]
        return np.concatenate([slopes @ pull, own]), information

    def _chance(self, weights: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        liked = 1.0 / (1.0 + np.exp(-(weights[:2] @ self.x)))
        return liked, np.clip(np.exp(weights[2:])[self.places] * liked, 1e-9, 1.0 - 1e-9)


def _bends(n: int) -> NDArray[np.float64]:
    """float64[n, n]: w @ it @ w is the sum of the squared distances of each place from the line of its two."""
    if n < 3:
        return np.zeros((n, n))
    at = np.log1p(np.arange(n))
    share = (at[2:] - at[1:-1]) / (at[2:] - at[:-2])
    rows = np.zeros((n - 2, n))
    i = np.arange(n - 2)
    rows[i, i], rows[i, i + 1], rows[i, i + 2] = -share, 1.0, share - 1.0
    return rows.T @ rows
