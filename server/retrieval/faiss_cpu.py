"""FAISS's flat index behind the same contract: an independent second engine.

FAISS proposes, the canonical score decides: its scores are float32 sums in an order of its own, it returns
ties in no promised order and lets +inf through. So a search asks for more than k, re-scores what comes back,
and asks again for more when a row that it did not return could still belong to the k best. Ids and scores are
therefore those of the exact engine, with duplicated embeddings too.
"""

from __future__ import annotations

import faiss
import numpy as np
from numpy.typing import NDArray

from kernels.topk import rescore_topk, rounding_errors
from server.retrieval.base import Hits
from server.retrieval.checks import check_search

_SPARE = 16  # asked for beyond k, for rounding and ties at the end


class FaissCpuSearch:
    """Scans the rows with ``IndexFlatIP`` and ``IDSelectorBitmap``, one FAISS call per distinct mask.

    Args:
        capacity: rows of the table, >= 1.
        dim: D, length of an embedding, >= 1.

    ``embeddings`` float32[capacity, D] is the index's own storage, preallocated and never added to
    afterwards: a row written there is found by the next search, without a rebuild.
    The view is valid while this object lives. FAISS is set to one thread, process-wide: the engine thread is
    the only user.
    """

    name = "faiss_cpu"

    def __init__(self, capacity: int, dim: int) -> None:
        if capacity < 1 or dim < 1:
            raise ValueError(f"capacity, dim: must be at least 1, got {capacity}, {dim}")
        faiss.omp_set_num_threads(1)
        self._index = faiss.IndexFlatIP(dim)
        self._index.add(np.zeros((capacity, dim), np.float32))
        storage = faiss.rev_swig_ptr(self._index.get_xb(), capacity * dim)
        self.embeddings: NDArray[np.float32] = storage.reshape(capacity, dim)
        self.fallback_queries = 0

    def write_rows(self, slots: NDArray[np.int32], rows: NDArray[np.float32]) -> None:
        """See :class:`SearchEngine`."""
        self.embeddings[slots] = rows

    def search(
        self, queries: NDArray[np.float32], eligible: NDArray[np.bool_], mask_of: NDArray[np.int32], k: int
    ) -> Hits:
        """See :class:`SearchEngine`. Raises ValueError naming the argument."""
        check_search(self.embeddings, queries, eligible, mask_of, k)
        rows = self.embeddings[: eligible.shape[1]]
        slots = np.full((queries.shape[0], k), -1, np.int32)
        scores = np.full((queries.shape[0], k), -np.inf, np.float32)
        errors = rounding_errors(queries, rows)
        for mask in np.unique(mask_of):
            members = np.flatnonzero(mask_of == mask)
            found = self._search_one_mask(queries[members], eligible[mask], k, errors[members])
            slots[members], scores[members] = found
        return Hits(slots, scores)

    def _search_one_mask(
        self,
        queries: NDArray[np.float32],
        eligible: NDArray[np.bool_],
        k: int,
        errors: NDArray[np.float64],
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        slots = np.full((queries.shape[0], k), -1, np.int32)
        scores = np.full((queries.shape[0], k), -np.inf, np.float32)
        available = int(np.count_nonzero(eligible))
        if available == 0:
            return slots, scores
        bitmap = np.packbits(eligible, bitorder="little")
        # FAISS's stub does not know the Python side of these two constructors.
        selector = faiss.IDSelectorBitmap(bitmap)  # type: ignore[call-arg, arg-type]
        parameters = faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]
        pending = np.arange(queries.shape[0])
        asked = min(k + _SPARE, available)
        while pending.size:
            proposed_scores, proposed = self._index.search(queries[pending], asked, params=parameters)
            best_slots, best_scores = rescore_topk(
                queries[pending], self.embeddings[: eligible.shape[0]], proposed.astype(np.int32), k
            )
            slots[pending], scores[pending] = best_slots, best_scores
            if asked == available:
                break
            # What FAISS left out scored no better than its last; canonically, than that plus the error.
            # A last place left empty (id -1) means that nothing was left out but what is never returned.
            last = proposed_scores[:, -1].astype(np.float64)
            proven = (proposed[:, -1] < 0) | (best_scores[:, -1] > last + errors[pending])
            pending = pending[~proven]
            self.fallback_queries += len(pending)
            asked = min(4 * asked, available)
        return slots, scores
