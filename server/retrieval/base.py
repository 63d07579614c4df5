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
    """Searches rows by inner product. Owned and called by one thread, the engine thread once it runs."""

    name: str
    embeddings: NDArray[np.float32]
    """float32[capacity, D], the table's embedding column: this very memory. Only ``write_rows`` writes it. An engine
    on the CPU searches it in place; one on a GPU keeps its own copy in step with it."""

    @property
    def fallback_queries(self) -> int:
        """Queries so far that needed a slower way than the usual one to be exact."""
        ...

    def write_rows(self, slots: NDArray[np.int32], rows: NDArray[np.float32]) -> None:
        """Writes rows float32[n, D] at distinct slots int32[n]; the next search finds them."""
        ...

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
