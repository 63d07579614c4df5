"""Exact masked search in blocks of the table, the default engine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kernels.checks import require_array
from kernels.topk import masked_topk
from server.retrieval.base import Hits


class ExactSearch:
    """Scans the rows with :func:`kernels.topk.masked_topk`.

    Args:
        capacity: rows of the table, >= 1.
        dim: D, length of an embedding, >= 1.

    Owns ``embeddings`` float32[capacity, D], which is the table's embedding column: there is no second copy,
    so a row written there is found by the next search.
    """

    name = "exact"
    fallback_queries = 0  # there is one way only

    def __init__(self, capacity: int, dim: int) -> None:
        if capacity < 1 or dim < 1:
            raise ValueError(f"capacity, dim: must be at least 1, got {capacity}, {dim}")
        self.embeddings: NDArray[np.float32] = np.zeros((capacity, dim), np.float32)

    def write_rows(self, slots: NDArray[np.int32], rows: NDArray[np.float32]) -> None:
        """See :class:`SearchEngine`."""
        self.embeddings[slots] = rows

    def search(
        self, queries: NDArray[np.float32], eligible: NDArray[np.bool_], mask_of: NDArray[np.int32], k: int
    ) -> Hits:
        """See :class:`SearchEngine`. Raises ValueError naming the argument."""
        rows = searched_rows(self.embeddings, eligible)
        require_array("queries", queries, np.float32, (None, self.embeddings.shape[1]))
        return Hits(*masked_topk(queries, rows, eligible, mask_of, k))


def searched_rows(table: NDArray[np.float32], eligible: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The first N rows, where ``eligible`` is bool[M, N]; N may not exceed the capacity."""
    require_array("eligible", eligible, np.bool_, (None, None))
    if eligible.shape[1] > table.shape[0]:
        raise ValueError(f"eligible: {eligible.shape[1]} columns for a capacity of {table.shape[0]} rows")
    return table[: eligible.shape[1]]
