"""FAISS's brute force on the GPU behind the same contract, over our own memory in place.

There is no FAISS index: `faiss.knn_gpu` reads a device matrix that we own, so a written row is found by the next
search and nothing is added or removed. Its search has no masks. They are added to the matrix instead: behind the D
dimensions stand columns, one per filter, with -BIG where the filter forbids the row and 0 elsewhere; a query carries a
1 in the column of its filter. Adding exact zeros changes no eligible score, and a forbidden row sinks below all.
(GpuIndexFlat with an IDSelector would be the other way. Builds without cuVS ignore the selector in silence.)

FAISS proposes, the canonical score decides, as in `faiss_cpu`: a search asks for more than k, re-scores on the host
what comes back, and asks again for more when a row that was not returned could still belong to the k best; beyond
FAISS's own limit it falls back to the exact engine on the host. Every such query is counted.

Not run on a GPU yet: tested with FAISS on the CPU in the place of `knn_gpu`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.backend import CPU, Backend
from kernels.topk import masked_topk, rescore_topk
from server.errors import ConfigError
from server.retrieval.base import Hits
from server.retrieval.checks import check_search
from server.retrieval.mirror import MirroredRows

MAX_ASKED = 2048
"""Neighbours that FAISS finds at most in one GPU search."""
_MASKS = 16  # filters searched together; more take another call
_BIG = np.float32(1e30)
_LONGEST = 1e6  # of rows and queries that -BIG is sure to outweigh
_SPARE = 16  # asked for beyond k, for rounding and ties at the end
_UNIT_ROUNDOFF = 2.0**-24

Knn = Callable[[Any, Any, int], tuple[Any, Any]]
"""(queries float32[B, W], rows float32[N, W], k) as torch tensors of one device → (scores [B, k] by falling inner
product, row numbers [B, k], -1 padded), arrays or tensors."""


def knn_on_gpu() -> Knn:
    """FAISS's brute force over torch tensors of a GPU.

    Raises:
        ConfigError: FAISS is not installed, or was built without GPU support.
    """
    try:
        faiss = import_module("faiss")
        resources = faiss.StandardGpuResources()
        import_module("faiss.contrib.torch_utils")  # teaches knn_gpu to take torch tensors
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"retrieval engine: faiss_gpu needs FAISS with GPU support ({error}); install faiss-gpu-cuvs"
        ) from error

    def knn(queries: Any, rows: Any, k: int) -> tuple[Any, Any]:
        return faiss.knn_gpu(resources, queries, rows, k, metric=faiss.METRIC_INNER_PRODUCT)

    return knn


class FaissGpuSearch:
    """Brute force over a device matrix float32[capacity, D + 16], one call per 16 distinct masks.

    Args:
        capacity: rows of the table, >= 1.
        dim: D, length of an embedding, >= 1.
        backend: where the matrix lives.
        knn: who searches it; None: FAISS on the GPU.

    The first search binds the object to its thread: FAISS's GPU resources are not safe to share.

    Raises:
        ConfigError: the backend has no GPU, FAISS has no support for it, or a first small search went wrong.
    """

    name = "faiss_gpu"

    def __init__(self, capacity: int, dim: int, backend: Backend = CPU, knn: Knn | None = None) -> None:
        if knn is None and not backend.on_gpu:
            raise ConfigError(f"retrieval engine: faiss_gpu needs a GPU, and this process has none ({backend.why})")
        self._rows = MirroredRows(capacity, dim)
        self.embeddings = self._rows.embeddings
        self._torch: Any = import_module("torch")
        self._knn = knn or knn_on_gpu()
        self._column = backend.xp.zeros((capacity, dim + _MASKS), np.float32)
        self._matrix = backend.view(self._column)
        self._finite = np.ones(capacity, np.bool_)
        self._too_long = np.zeros(capacity, np.bool_)
        self._longest = 1.0
        self._owner: int | None = None
        self.fallback_queries = 0
        self._prove(dim)

    def write_rows(self, slots: NDArray[np.int32], rows: NDArray[np.float32]) -> None:
        """See :class:`SearchEngine`."""
        self._rows.write(slots, rows)

    def search(
        self, queries: NDArray[np.float32], eligible: NDArray[np.bool_], mask_of: NDArray[np.int32], k: int
    ) -> Hits:
        """See :class:`SearchEngine`.

        Raises:
            ValueError: an argument is not as the contract has it, or k > 2048; the message names it.
            RuntimeError: called from another thread than the first search was.
        """
        check_search(self.embeddings, queries, eligible, mask_of, k)
        if k > MAX_ASKED:
            raise ValueError(f"k: FAISS finds at most {MAX_ASKED} neighbours on a GPU, got {k}")
        self._require_owner()
        self._flush()
        slots = np.full((queries.shape[0], k), -1, np.int32)
        scores = np.full((queries.shape[0], k), -np.inf, np.float32)
        if eligible.shape[1] == 0:
            return Hits(slots, scores)
        searchable = np.linalg.norm(queries.astype(np.float64), axis=1) <= _LONGEST
        if self._too_long.any():
            searchable[:] = False
        masks = np.unique(mask_of[searchable])
        left = [np.flatnonzero(~searchable)]
        for first in range(0, masks.size, _MASKS):
            group = masks[first : first + _MASKS]
            members = np.flatnonzero(searchable & np.isin(mask_of, group))
            columns = np.searchsorted(group, mask_of[members])
            unproven = self._search_group(queries, eligible[group], members, columns, k, slots, scores)
            left.append(unproven)
        again = np.concatenate(left)
        if again.size:
            self.fallback_queries += again.size
            rows = self.embeddings[: eligible.shape[1]]
            slots[again], scores[again] = masked_topk(queries[again], rows, eligible, mask_of[again], k)
        return Hits(slots, scores)

    def _search_group(
        self,
        queries: NDArray[np.float32],
        eligible: NDArray[np.bool_],
        members: NDArray[np.intp],
        columns: NDArray[np.intp],
        k: int,
        slots: NDArray[np.int32],
        scores: NDArray[np.float32],
    ) -> NDArray[np.intp]:
        """Answers ``members`` under at most 16 masks in place; returns those it could not prove."""
        dim, rows = self.embeddings.shape[1], eligible.shape[1]
        forbidden = np.where(eligible & self._finite[:rows], np.float32(0.0), -_BIG).T
        self._matrix[:rows, dim : dim + eligible.shape[0]] = self._up(forbidden)
        extended = np.zeros((members.size, dim + _MASKS), np.float32)
        extended[:, :dim] = queries[members]
        extended[np.arange(members.size), dim + columns] = 1.0
        lengths = np.linalg.norm(queries[members].astype(np.float64), axis=1)
        errors = (dim + _MASKS + 2) * _UNIT_ROUNDOFF * self._longest * lengths + 2.0**-149
        pending, asked = np.arange(members.size), min(k + _SPARE, rows, MAX_ASKED)
        while pending.size:
            found = self._knn(self._up(extended[pending]), self._matrix[:rows], asked)
            proposed_scores, proposed = (self._down(part) for part in found)
            allowed = (proposed >= 0) & (proposed_scores > -_BIG / 2)
            candidates = np.where(allowed, proposed, -1).astype(np.int32)
            place = members[pending]
            slots[place], scores[place] = rescore_topk(queries[place], self.embeddings[:rows], candidates, k)
            # A last place that is forbidden or empty says that every eligible row was returned.
            last = proposed_scores[:, -1].astype(np.float64)
            proven = ~allowed[:, -1] | (scores[place, k - 1] > last + errors[pending]) | (asked == rows)
            pending = pending[~proven]
            if asked == min(rows, MAX_ASKED):
                break
            self.fallback_queries += pending.size
            asked = min(4 * asked, rows, MAX_ASKED)
        return members[pending]

    def _flush(self) -> None:
        """Takes the rows written since the last search to the device; what is not finite or too long goes as zeros."""
        slots = self._rows.take_unseen()
        if not slots.size:
            return
        rows = self.embeddings[slots]
        finite = np.isfinite(rows).all(axis=1)
        self._finite[slots] = finite
        rows[~finite] = 0.0
        lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
        too_long = lengths > _LONGEST
        self._too_long[slots] = too_long
        rows[too_long] = 0.0
        self._longest = max(self._longest, float(lengths[~too_long].max(initial=0.0)))
        self._matrix[self._up(slots.astype(np.int64)), : rows.shape[1]] = self._up(rows)

    def _require_owner(self) -> None:
        caller = threading.get_ident()
        if self._owner is None:
            self._owner = caller
        if caller != self._owner:
            raise RuntimeError("FAISS's GPU resources are owned by the thread that searched first; this is another")

    def _prove(self, dim: int) -> None:
        """Two masks over a few rows, one of them forbidding the best: refuses a FAISS that gets that wrong."""
        rng = np.random.default_rng(0)
        rows = np.zeros((64, dim + _MASKS), np.float32)
        rows[:, :dim] = rng.standard_normal((64, dim))
        query = np.zeros((2, dim + _MASKS), np.float32)
        query[:, :dim] = rng.standard_normal(dim)
        query[0, dim], query[1, dim + 1] = 1.0, 1.0
        exact = rows[:, :dim].astype(np.float64) @ query[0, :dim].astype(np.float64)
        order = np.argsort(-exact, kind="stable")
        rows[order[:10], dim + 1] = -_BIG
        scores, found = (self._down(part) for part in self._knn(self._up(query), self._up(rows), 8))
        # Sixteen times the bound: still far below what a product of rounded operands (TF32) would be off by.
        close = 16 * dim * _UNIT_ROUNDOFF * float(np.abs(exact).max() + 1.0)
        for b, first in enumerate((0, 10)):
            wanted = order[first : first + 8]
            if np.abs(np.sort(scores[b]) - np.sort(exact[wanted])).max() > close or set(found[b]) != set(wanted):
                raise ConfigError(
                    "retrieval engine: FAISS answered a small masked search wrongly at start-up: "
                    f"rows {found[b].tolist()} with scores {scores[b].tolist()} instead of {wanted.tolist()}"
                )

    def _up(self, array: NDArray[Any]) -> Any:
        return self._torch.from_numpy(np.ascontiguousarray(array)).to(self._matrix.device)

    def _down(self, part: Any) -> NDArray[Any]:
        return part if isinstance(part, np.ndarray) else part.cpu().numpy()
