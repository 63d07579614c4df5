"""The array contract of every scorer, checked on the way in and on the way out."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.errors import BadScores, SchemaMismatch


def checked_features(features: NDArray[np.float32], n_features: int) -> NDArray[np.float32]:
    """``features`` as C-contiguous float32[n, F]; copies only when it is not that already.

    Raises:
        SchemaMismatch: not two-dimensional, or not F columns.
    """
    if features.ndim != 2 or features.shape[1] != n_features:
        raise SchemaMismatch(f"features have shape {features.shape}, the schema has {n_features} per row")
    return np.ascontiguousarray(features, dtype=np.float32)


def checked_scores(values: NDArray[Any], n_rows: int, model: str) -> NDArray[np.float32]:
    """``values`` itself. Raises BadScores unless it is float32[n_rows]."""
    if values.dtype != np.float32 or values.shape != (n_rows,):
        raise BadScores(f"{model} answered {values.dtype}{list(values.shape)}, wanted is float32[{n_rows}]")
    return values
