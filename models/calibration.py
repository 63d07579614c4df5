"""Makes a logit a probability: Platt scaling, fitted on rows that training did not see.

Source: J. Platt, "Probabilistic outputs for support vector machines" (1999); the slope is the inverse
temperature of Guo et al., "On calibration of modern neural networks" (2017), the offset moves the base rate.
"""

from __future__ import annotations

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


def fit_platt(logits: NDArray[np.float32], labels: NDArray[np.bool_]) -> Platt:
    """Maximum likelihood by Newton's method, of n logits and labels.

    Raises ValueError if the labels are all alike: they say nothing about a slope.
    """
    y = labels.astype(np.float64)
    if not 0 < y.sum() < len(y):
        raise ValueError("labels: some positive and some negative ones wanted")
    x = np.stack([logits.astype(np.float64), np.ones(len(y))])
    weights = np.array([1.0, 0.0])
    loss = _loss(weights @ x, y)
    for _ in range(_STEPS):
        p = 1.0 / (1.0 + np.exp(-(weights @ x)))
        gradient = x @ (p - y)
        hessian = (x * (p * (1.0 - p))) @ x.T + 1e-9 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        # Newton overshoots where the curve is flat: halve until it helps.
        for _ in range(30):
            tried = weights - step
            if (tried_loss := _loss(tried @ x, y)) <= loss:
                break
            step *= 0.5
        else:
            break
        done = loss - tried_loss < 1e-12 * len(y)
        weights, loss = tried, tried_loss
        if done:
            break
    return Platt(max(float(weights[0]), _MIN_SLOPE), float(weights[1]))


def _loss(logits: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    return float((np.logaddexp(0.0, logits) - y * logits).sum())
