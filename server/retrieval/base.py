"""What a retrieval engine is: the k most similar eligible rows of the table, exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Hits:
    """Best first per query; ``slots`` int32[B, k] padded with -1, ``scores`` float32[B, k] with -inf."""

    slots: NDArray[np.int32]
    scores: NDArray[np.float32]


class SearchEngine(Protocol):
    """Searches rows by inner product. Owned and called by the engine thread only."""

    name: str
    embeddings: NDArray[np.float32]
    """float32[capacity, D], searched in place: the table's embedding column is this very memory, so a row
    written to the table is found by the next search, and there is no second copy to keep in step."""

    def search(
        self,
        queries: NDArray[np.float32],
        eligible: NDArray[np.bool_],
        mask_of: NDArray[np.int32],
        k: int,
    ) -> Hits:
        """Exact masked search.

        Args:
            queries: float32[B, D], finite.
            eligible: bool[M, N] with N <= capacity: which of the first N rows a query may find.
                The mask is applied inside the search: k eligible rows are found if there are k.
            mask_of: int32[B], query b uses eligible[mask_of[b]].
            k: >= 1, may exceed the number of eligible rows.

        Ties break by lower slot. Rows whose inner product is not finite are never returned.
        """
        ...
