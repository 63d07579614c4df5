"""Exact masked search on the GPU over embeddings that live there.

For a host that ranks on the CPU: eligibility and queries go up and hits come back with every search. A pipeline that
ranks on the GPU reads the same device columns (:attr:`ExactGpuSearch.table` and its companions) after ``flush``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
from numpy.typing import NDArray

from kernels.backend import CPU, Backend
from kernels.canonical_gpu import masked_topk_slow
from kernels.topk_gpu import TopkBuffers, masked_topk, put_rows
from server.errors import ConfigError
from server.retrieval.base import Hits
from server.retrieval.checks import check_search
from server.retrieval.mirror import MirroredRows

_KEPT_BUFFERS = 8
_PARAMS, _ROWS_IN_USE, _QUERIES_IN_USE = 8, 1, 2


class ExactGpuSearch:
    """Scans the rows with :func:`kernels.topk_gpu.masked_topk`; what it cannot prove, canonically row by row.

    Args:
        capacity: rows of the table, >= 1.
        dim: D, length of an embedding, >= 1.
        backend: where the columns live.

    Owns the device columns ``table`` float32[capacity, D], ``table16`` float16[capacity, D] and ``longest``
    float32[1], as torch tensors over the backend's arrays, and ``embeddings`` on the host. Rows written are in all of
    them from the next ``flush`` on; a search flushes first.

    Raises:
        ConfigError: the backend has no GPU (and kernels are not interpreted, as they are in tests).
    """

    name = "exact_gpu"

    def __init__(self, capacity: int, dim: int, backend: Backend = CPU) -> None:
        if not backend.on_gpu and not triton.knobs.runtime.interpret:
            raise ConfigError(f"retrieval engine: exact_gpu needs a GPU, and this process has none ({backend.why})")
        self._rows = MirroredRows(capacity, dim)
        self.embeddings = self._rows.embeddings
        xp = backend.xp
        self._columns = (
            xp.zeros((capacity, dim), np.float32), xp.zeros((capacity, dim), np.float16), xp.zeros(1, np.float32)
        )  # fmt: skip
        self.table, self.table16, self.longest = (backend.view(column) for column in self._columns)
        self.fallback_queries = 0
        self._buffers: dict[tuple[int, int, int], TopkBuffers] = {}

    def write_rows(self, slots: NDArray[np.int32], rows: NDArray[np.float32]) -> None:
        """See :class:`SearchEngine`."""
        self._rows.write(slots, rows)

    def flush(self) -> None:
        """Takes the rows written since the last call to the device. Does not wait for it."""
        slots = self._rows.take_unseen()
        if slots.size:
            put_rows(
                self._up(slots), self._up(self.embeddings[slots]),
                table=self.table, table16=self.table16, longest=self.longest,
            )  # fmt: skip

    def search(
        self, queries: NDArray[np.float32], eligible: NDArray[np.bool_], mask_of: NDArray[np.int32], k: int
    ) -> Hits:
        """See :class:`SearchEngine`. Raises ValueError naming the argument."""
        check_search(self.embeddings, queries, eligible, mask_of, k)
        batch, rows = queries.shape[0], eligible.shape[1]
        if batch == 0 or rows == 0:
            return Hits(np.full((batch, k), -1, np.int32), np.full((batch, k), -np.inf, np.float32))
        self.flush()
        padded, filters = triton.next_power_of_2(batch), triton.next_power_of_2(eligible.shape[0])
        all_queries = np.zeros((padded, queries.shape[1]), np.float32)
        all_queries[:batch] = queries
        masks = np.zeros((filters, self.embeddings.shape[0]), np.uint8)
        masks[: eligible.shape[0], :rows] = eligible
        masks_of = np.zeros(padded, np.int32)
        masks_of[:batch] = mask_of
        params = np.zeros(_PARAMS, np.int64)
        params[[_ROWS_IN_USE, _QUERIES_IN_USE]] = rows, batch
        there = [self._up(array) for array in (all_queries, masks, masks_of)]
        slots = torch.empty((padded, k), dtype=torch.int32, device=self.table.device)
        scores = torch.empty((padded, k), dtype=torch.float32, device=self.table.device)
        unproven = torch.empty(padded, dtype=torch.uint8, device=self.table.device)
        masked_topk(
            there[0], self.table, self.table16, self.longest, there[1], there[2], k, self._up(params),
            work=self._buffers_for(padded, k, filters), slots=slots, scores=scores, unproven=unproven,
        )  # fmt: skip
        found = Hits(slots.cpu().numpy()[:batch], scores.cpu().numpy()[:batch])
        # A query without direction is no question to the scan; the contract has an answer: every score is 0.
        again = np.flatnonzero(unproven.cpu().numpy()[:batch].astype(np.bool_) | ~queries.any(axis=1))
        if again.size:
            self._search_slowly(found, again.astype(np.int32), queries, there[1], mask_of, k, rows)
        return found

    def _search_slowly(
        self,
        found: Hits,
        again: NDArray[np.int32],
        queries: NDArray[np.float32],
        masks: Any,
        mask_of: NDArray[np.int32],
        k: int,
        rows: int,
    ) -> None:
        """Answers queries int32[n] anew, in place."""
        self.fallback_queries += again.size
        slots = torch.empty((again.size, k), dtype=torch.int32, device=self.table.device)
        scores = torch.empty((again.size, k), dtype=torch.float32, device=self.table.device)
        masked_topk_slow(
            self._up(queries[again]), self.table, masks, self._up(mask_of[again]), k, rows, slots=slots, scores=scores
        )
        found.slots[again], found.scores[again] = slots.cpu().numpy(), scores.cpu().numpy()

    def _buffers_for(self, batch: int, k: int, filters: int) -> TopkBuffers:
        key = (batch, k, filters)
        if key not in self._buffers:
            if len(self._buffers) == _KEPT_BUFFERS:
                self._buffers.pop(next(iter(self._buffers)))
            capacity, dim = self.embeddings.shape
            self._buffers[key] = TopkBuffers.allocate(batch, k, capacity, dim, filters, self.table.device)
        return self._buffers[key]

    def _up(self, array: NDArray[Any]) -> Any:
        return torch.from_numpy(array).to(self.table.device)
