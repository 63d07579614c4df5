"""Exact masked search in blocks of the table, the default engine on a CPU."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kernels.checks import require_array
from kernels.int8_rows import Int8Rows
from kernels.lines import zeros_in_lines
from kernels.topk import masked_topk
from kernels.topk_int8 import masked_topk_int8, pack_masks
from kernels.vectors import has_int8_dots
from server.retrieval.base import Hits

Scan = Literal["auto", "int8", "float32"]
_MOST_UNCOPIED = 4_096


class ExactSearch:
    """Scans the rows with :func:`kernels.topk_int8.masked_topk_int8` or :func:`kernels.topk.masked_topk`.

    Args:
        capacity: rows of the table, >= 1.
        dim: D, length of an embedding, >= 1.
        scan: what is scanned: the float32 rows, or an int8 copy of them that rules most rows out, with the same
            answers. auto: the copy on a CPU that is made for it (AVX-512 VNNI), elsewhere the rows.

    Owns ``embeddings`` float32[capacity, D], which is the table's embedding column, and, if it scans one, the int8
    copy. Rows are written one event at a time and searched in batches: they are copied before the next search, or when
    many wait.
    """

    name = "exact"

    def __init__(self, capacity: int, dim: int, scan: Scan = "auto") -> None:
        if capacity < 1 or dim < 1:
            raise ValueError(f"capacity, dim: must be at least 1, got {capacity}, {dim}")
        self.embeddings: NDArray[np.float32] = zeros_in_lines((capacity, dim), np.float32)
        self.fallback_queries = 0
        small = scan == "int8" or (scan == "auto" and has_int8_dots())
        self._copy = Int8Rows(capacity, dim) if small else None
        self._uncopied: list[NDArray[np.int32]] = []
        self._n_uncopied = 0
        self._masks: tuple[NDArray[np.bool_], NDArray[np.uint64]] | None = None  # the last ones that stay, packed

    def write_rows(self, slots: NDArray[np.int32], rows: NDArray[np.float32]) -> None:
        """See :class:`SearchEngine`."""
        self.embeddings[slots] = rows
        if self._copy is not None:
            self._uncopied.append(slots.copy())
            self._n_uncopied += slots.size
            if self._n_uncopied >= _MOST_UNCOPIED:
                self._catch_up(self._copy)

    def search(
        self, queries: NDArray[np.float32], eligible: NDArray[np.bool_], mask_of: NDArray[np.int32], k: int
    ) -> Hits:
        """See :class:`SearchEngine`. Raises ValueError naming the argument."""
        rows = searched_rows(self.embeddings, eligible)
        require_array("queries", queries, np.float32, (None, self.embeddings.shape[1]))
        if self._copy is None:
            return Hits(*masked_topk(queries, rows, eligible, mask_of, k))
        self._catch_up(self._copy)
        found = masked_topk_int8(queries, rows, self._copy, eligible, mask_of, k, self._packed(eligible))
        self.fallback_queries += found.again
        return Hits(found.slots, found.scores)

    def _packed(self, eligible: NDArray[np.bool_]) -> NDArray[np.uint64]:
        """Masks that nobody can write are packed once, for as long as the same ones are searched under."""
        if self._masks is not None and self._masks[0] is eligible:
            return self._masks[1]
        packed = pack_masks(eligible)
        if not eligible.flags.writeable and eligible.base is None:
            self._masks = eligible, packed
        return packed

    def _catch_up(self, copy: Int8Rows) -> None:
        """Brings the copy into step with the rows."""
        if self._uncopied:
            copy.write(np.concatenate(self._uncopied), self.embeddings)
            self._uncopied.clear()
            self._n_uncopied = 0


def searched_rows(table: NDArray[np.float32], eligible: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The first N rows, where ``eligible`` is bool[M, N]; N may not exceed the capacity."""
    require_array("eligible", eligible, np.bool_, (None, None))
    if eligible.shape[1] > table.shape[0]:
        raise ValueError(f"eligible: {eligible.shape[1]} columns for a capacity of {table.shape[0]} rows")
    return table[: eligible.shape[1]]
