"""Rows of a feature matrix for the candidates of a batch: what a per-request model is asked about."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kernels.checks import require_array


def gather_rows(features: NDArray[np.float32], slots: NDArray[np.int32]) -> NDArray[np.float32]:
    """The features of each candidate.

    Args:
        features: float32[C, F].
        slots: int32[B, K] in [-1, C); -1 (anywhere) is padding.

    Returns:
        float32[B, K, F], zeros for padding.

    Raises:
        ValueError: an argument has the wrong dtype, shape or range; the message names it.

    Cost: 8·B·K·F bytes.
    """
    _check(features, slots)
    if features.shape[0] == 0:
        return np.zeros((*slots.shape, features.shape[1]), np.float32)
    # mode: the range was checked already, and "raise" would buffer the whole output
    gathered = np.take(features, slots, axis=0, mode="wrap")
    gathered[slots < 0] = 0.0
    return gathered


def gather_rows_reference(features: NDArray[np.float32], slots: NDArray[np.int32]) -> NDArray[np.float32]:
    """What :func:`gather_rows` returns, row by row."""
    _check(features, slots)
    gathered = np.zeros((*slots.shape, features.shape[1]), np.float32)
    for place, slot in np.ndenumerate(slots):
        if slot >= 0:
            gathered[place] = features[slot]
    return gathered


def _check(features: NDArray[np.float32], slots: NDArray[np.int32]) -> None:
    require_array("features", features, np.float32, (None, None))
    require_array("slots", slots, np.int32, (None, None))
    if slots.size and (slots.min() < -1 or slots.max() >= features.shape[0]):
        raise ValueError(f"slots: must lie in [-1, {features.shape[0]})")
