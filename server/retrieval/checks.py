"""What a search engine checks before it searches."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kernels.checks import require_array
from server.retrieval.exact import searched_rows


def check_search(
    table: NDArray[np.float32],
    queries: NDArray[np.float32],
    eligible: NDArray[np.bool_],
    mask_of: NDArray[np.int32],
    k: int,
) -> None:
    """Raises ValueError naming the argument of a search that the contract does not allow."""
    searched_rows(table, eligible)
    require_array("queries", queries, np.float32, (None, table.shape[1]))
    require_array("mask_of", mask_of, np.int32, (queries.shape[0],))
    if mask_of.size and (mask_of.min() < 0 or mask_of.max() >= eligible.shape[0]):
        raise ValueError(f"mask_of: must lie in [0, {eligible.shape[0]})")
    if k < 1:
        raise ValueError(f"k: must be at least 1, got {k}")
