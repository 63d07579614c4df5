"""Makes a logit a probability: Platt scaling, fitted on rows that training did not see.

Source: J. Platt, "Probabilistic outputs for support vector machines" (1999); the slope is the inverse
temperature of Guo et al., "On calibration of modern neural networks" (2017), the offset moves the base rate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_STEPS = 50
_MIN_SLOPE = 1e-3  # a model that orders at random must not be turned upside down


@dataclass(frozen=True)
class Platt:
    """p = sigmoid(slope * logit + offset); slope > 0, hence the order stays."""

    slope: float
    offset: float

    def apply(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """Probabilities float64[n]."""
        return 1.0 / (1.0 + np.exp(-(self.slope * logits.astype(np.float64) + self.offset)))


_Parts = tuple[float, NDArray[np.float64], NDArray[np.float64]]
"""Loss, gradient [2] and curvature [2, 2] at some weights."""


def fit_platt(
    logits: NDArray[np.float32],
    labels: NDArray[np.bool_] | NDArray[np.floating],
    ceiling: NDArray[np.floating] | None = None,
) -> Platt:
    """Maximum likelihood by Newton's method, of n logits and labels.

    Args:
        labels: bool[n], or float[n] within 0 to 1, shares.
        ceiling: float[n] in (0, 1], what each row's probability is multiplied by before it meets the label: the
            chance that the row's place is looked at, say. None: 1.

    Raises ValueError if the labels are all alike: they say nothing about a slope.
    """
    y = labels.astype(np.float64)
    if not 0 < y.sum() < len(y):
        raise ValueError("labels: some positive and some negative ones wanted")
    x = np.stack([logits.astype(np.float64), np.ones(len(y))])
    weights = _newton((lambda w: _plain(w, x, y)) if ceiling is None else (lambda w: _below(w, x, y, ceiling)), len(y))
    return Platt(max(float(weights[0]), _MIN_SLOPE), float(weights[1]))


def _plain(weights: NDArray[np.float64], x: NDArray[np.float64], y: NDArray[np.float64]) -> _Parts:
    logits = weights @ x
    with np.errstate(over="ignore"):  # infinity, and 0 as the chance: as it should be
        p = 1.0 / (1.0 + np.exp(-logits))
    loss = float((np.logaddexp(0.0, logits) - y * logits).sum())
    return loss, x @ (p - y), (x * (p * (1.0 - p))) @ x.T + 1e-9 * np.eye(2)


def _below(
    weights: NDArray[np.float64], x: NDArray[np.float64], y: NDArray[np.float64], ceiling: NDArray[np.floating]
) -> _Parts:
    """Fisher's information instead of the curvature, which need not be positive here."""
    s = 1.0 / (1.0 + np.exp(-(weights @ x)))
    p = np.clip(ceiling * s, 1e-12, 1.0 - 1e-12)
    steepness = ceiling * s * (1.0 - s)
    pull = steepness / (p * (1.0 - p))
    loss = float(-(y * np.log(p) + (1.0 - y) * np.log1p(-p)).sum())
    return loss, x @ (pull * (p - y)), (x * (pull * steepness)) @ x.T + 1e-9 * np.eye(2)


def _newton(parts: Callable[[NDArray[np.float64]], _Parts], n: int) -> NDArray[np.float64]:
    weights = np.array([1.0, 0.0])
    loss, gradient, curvature = parts(weights)
    for _ in range(_STEPS):
        step = np.linalg.solve(curvature, gradient)
        # Newton overshoots where the curve is flat: halve until it helps.
        for _ in range(30):
            tried = parts(weights - step)
            if tried[0] <= loss:
                break
            step *= 0.5
        else:
            break
        done = loss - tried[0] < 1e-12 * n
        weights, (loss, gradient, curvature) = weights - step, tried
        if done:
            break
    return weights
