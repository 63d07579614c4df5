"""How much less a place of the slate is looked at than the first one: solved exactly, once the net is trained.

Stochastic descent leaves the ridge between "liked less" and "looked at less" half climbed: only first places tell the
two apart, and they are few. Given the net's logits, what is left are some fifty numbers with one best solution.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_STEPS = 30
_RIDGE = 1e-3
_LEAST = -6.0  # log; below, no click was ever seen


def examined(
    logits: NDArray[np.floating], places: NDArray[np.int64], clicked: NDArray[np.bool_], n_places: int
) -> NDArray[np.float64]:
    """log e float64[n_places], at most 0, e[0] = 1, of p(click) = e[place] * sigmoid(slope * logit + offset).

    Maximum likelihood by Fisher's scoring over e, slope and offset at once. A place without rows gets the value of
    the one before it.

    Args:
        logits: float[n], how much each row would be liked. places: int64[n] from 0. clicked: bool[n].

    Raises:
        ValueError: no row at place 0, which the others are compared with, or labels all alike.
    """
    seen = np.bincount(places, minlength=n_places)
    if seen[0] == 0 or not 0 < clicked.sum() < len(clicked):
        raise ValueError("impressions: some at the first place, some clicked and some not clicked wanted")
    y, x = clicked.astype(np.float64), np.stack([logits.astype(np.float64), np.ones(len(clicked))])
    weights = np.concatenate([[1.0, 0.0], np.zeros(n_places)])  # slope, offset, log e
    loss = _loss(weights, x, places, y)
    for _ in range(_STEPS):
        gradient, information = _gradient(weights, x, places, y, n_places)
        free = np.concatenate([[True, True], seen > 0])
        free[2] = False
        step = np.zeros_like(weights)
        step[free] = np.linalg.solve(information[np.ix_(free, free)] + _RIDGE * np.eye(free.sum()), gradient[free])
        for _ in range(30):
            tried = weights - step
            tried[2:] = np.clip(tried[2:], _LEAST, 0.0)
            tried_loss = _loss(tried, x, places, y)
            if tried_loss <= loss:
                break
            step *= 0.5
        else:
            break
        done = loss - tried_loss < 1e-10 * len(y)
        weights, loss = tried, tried_loss
        if done:
            break
    last = np.maximum.accumulate(np.where(seen > 0, np.arange(n_places), 0))
    return np.asarray(weights[2:][last])


def _chance(
    weights: NDArray[np.float64], x: NDArray[np.float64], places: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    liked = 1.0 / (1.0 + np.exp(-(weights[:2] @ x)))
    return liked, np.clip(np.exp(weights[2:])[places] * liked, 1e-9, 1.0 - 1e-9)


def _loss(
    weights: NDArray[np.float64], x: NDArray[np.float64], places: NDArray[np.int64], y: NDArray[np.float64]
) -> float:
    _, p = _chance(weights, x, places)
    return float(-(y * np.log(p) + (1.0 - y) * np.log1p(-p)).sum())


def _gradient(
    weights: NDArray[np.float64],
    x: NDArray[np.float64],
    places: NDArray[np.int64],
    y: NDArray[np.float64],
    n_places: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """float64[2 + n_places] and Fisher's information of the same width."""
    liked, p = _chance(weights, x, places)
    slopes = x * (1.0 - liked)  # d log p / d (slope, offset); d log p / d log e is 1
    pull, weight = (p - y) / (1.0 - p), p / (1.0 - p)
    information = np.zeros((2 + n_places, 2 + n_places))
    information[:2, :2] = (slopes * weight) @ slopes.T
    information[range(2, 2 + n_places), range(2, 2 + n_places)] = np.bincount(places, weight, n_places)
    for i in range(2):
        information[i, 2:] = information[2:, i] = np.bincount(places, weight * slopes[i], n_places)
    return np.concatenate([slopes @ pull, np.bincount(places, pull, n_places)]), information
