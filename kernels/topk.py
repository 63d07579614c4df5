"""Exact masked top-k by inner product on the CPU.

A BLAS product in cache-sized blocks *proposes* rows; a canonical inner product *decides*. BLAS may add in
another order for another batch size, another row position or another library, so its last bits are not a
property of the row. The canonical score is: the exact products summed in float64 in eight interleaved lanes
(lane j takes the dimensions d = j mod 8), lanes added pairwise, rounded once to float32. Every row whose BLAS
score lies within the rounding bound of the k-th is scored canonically. So equal embeddings have equal scores,
a query's answer does not depend on the batch it came in, and another engine can give bit-identical answers.

The rounding bound uses four times the longest row of a strided sample. A row longer than that may be
misplaced against neighbours that differ from it by float32 rounding, and by nothing more.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kernels.checks import require_array
from kernels.vectors import canonical_inner, float_bits

COMPILED_WITH = "f45d6cc95d0dae3c"  # vectors.py; see there
_UNIT_ROUNDOFF = 2.0**-24
_BLOCK_ROWS = 4096  # 1 MiB of table at D = 64, and a score tile that stays in the second-level cache
_SAMPLE_ROWS = 2048
_MIN_KEPT = 2048
NO_HIT = np.uint64(0xFFFF_FFFF_FFFF_FFFF)


def masked_topk(
    queries: NDArray[np.float32],
    table: NDArray[np.float32],
    eligible: NDArray[np.bool_],
    mask_of: NDArray[np.int32],
    k: int,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The k best eligible rows of ``table`` for each query, always exact.

    Args:
        queries: float32[B, D].
        table: float32[N, D]. NaN and infinities are allowed: such rows are never returned.
        eligible: bool[M, N].
        mask_of: int32[B] in [0, M): query b may find row i iff eligible[mask_of[b], i].
        k: >= 1; may exceed the number of eligible rows.

    Returns:
        ``slots`` int32[B, k], best first, ties by lower slot, padded with -1; ``scores`` float32[B, k], the
        canonical scores, padded with -inf. A row counts as non-finite when float32 overflows on the way, too.

    Raises:
        ValueError: an argument has the wrong dtype, shape or range; the message names it.

    Cost: 2·B·N·D flops, reading 4·N·D bytes of table once and 4·B·N bytes of scores that stay in cache; then
    about 2.5·k rows per query re-scored from cache, 2·D flops each. All-equal scores cost more (up to N
    re-scored rows per query), never exactness.
    """
    check_search(queries, table, eligible, mask_of, k)
    batch, rows = queries.shape[0], table.shape[0]
    slots = np.full((batch, k), -1, np.int32)
    scores = np.full((batch, k), -np.inf, np.float32)
    keep = min(k, rows)
    if batch == 0 or keep == 0:
        return slots, scores
    with np.errstate(all="ignore"):
        errors = rounding_errors(queries, table)
        floors = _sampled_floors(queries, table, eligible, mask_of, keep, errors)
        slots[:, :keep], scores[:, :keep] = _search(queries, table, eligible, mask_of, keep, errors, floors)
        # A row below the sampled floor can score floor + error at most. Where that might have been a hit, the
        # floor was too high for this query: search again without one.
        proven = np.isneginf(floors) | (scores[:, keep - 1] > floors.astype(np.float64) + errors)
        again = np.flatnonzero(~proven)
        if again.size:
            no_floors = np.full(again.size, -np.inf, np.float32)
            slots[again, :keep], scores[again, :keep] = _search(
                queries[again], table, eligible, mask_of[again], keep, errors[again], no_floors
            )
    return slots, scores


def masked_topk_reference(
    queries: NDArray[np.float32],
    table: NDArray[np.float32],
    eligible: NDArray[np.bool_],
    mask_of: NDArray[np.int32],
    k: int,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """What :func:`masked_topk` returns, bit for bit, by scoring and sorting every row."""
    check_search(queries, table, eligible, mask_of, k)
    slots = np.full((queries.shape[0], k), -1, np.int32)
    scores = np.full((queries.shape[0], k), -np.inf, np.float32)
    for b, query in enumerate(queries):
        exact = canonical_inner_reference(query, table)
        found = np.flatnonzero(eligible[mask_of[b]] & np.isfinite(exact))
        best = found[np.lexsort((found, -exact[found]))][:k]
        slots[b, : best.size] = best
        scores[b, : best.size] = exact[best]
    return slots, scores


def rescore_topk(
    queries: NDArray[np.float32], table: NDArray[np.float32], candidates: NDArray[np.int32], k: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The k best of given rows by canonical score: turns another engine's proposals into ours.

    Args:
        queries: float32[B, D].
        table: float32[N, D].
        candidates: int32[B, P] in [-1, N), distinct within a row; -1 is skipped.
        k: >= 1.

    Returns:
        ``slots`` int32[B, k] and ``scores`` float32[B, k] as :func:`masked_topk` returns them.

    Raises:
        ValueError: an argument has the wrong dtype, shape or range; the message names it.

    Cost: 2·B·P·D flops in float64, 4·B·P·D bytes of table.
    """
    require_array("queries", queries, np.float32, (None, None))
    require_array("table", table, np.float32, (None, queries.shape[1]))
    require_array("candidates", candidates, np.int32, (queries.shape[0], None))
    _check_k(k)
    if candidates.size and (candidates.min() < -1 or candidates.max() >= table.shape[0]):
        raise ValueError(f"candidates: must lie in [-1, {table.shape[0]})")
    slots = np.full((queries.shape[0], k), -1, np.int32)
    scores = np.full((queries.shape[0], k), -np.inf, np.float32)
    if candidates.size:
        keys = np.full(candidates.shape, NO_HIT, np.uint64)
        _rescore(queries.astype(np.float64), table, candidates, keys)
        take_best(keys, candidates.shape[1], slots, scores)
    return slots, scores


def rescore_topk_reference(
    queries: NDArray[np.float32], table: NDArray[np.float32], candidates: NDArray[np.int32], k: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """What :func:`rescore_topk` returns, one mask per query."""
    eligible = np.zeros((queries.shape[0], table.shape[0]), np.bool_)
    for b, row in enumerate(candidates):
        eligible[b, row[row >= 0]] = True
    return masked_topk_reference(queries, table, eligible, np.arange(len(queries), dtype=np.int32), k)


def rounding_errors(queries: NDArray[np.float32], table: NDArray[np.float32]) -> NDArray[np.float64]:
    """float64[B]: how far a float32 inner product, added in any order, may lie from the canonical score.

    γ(D)·|query|·|row| (Higham, Accuracy and Stability of Numerical Algorithms, 3.1) plus the last rounding,
    with |row| four times the longest of a strided sample of the table, sampled as described above.
    """
    dim = queries.shape[1]
    with np.errstate(all="ignore"):
        sample = table[:: _stride(table.shape[0])]
        squares = np.einsum("nd,nd->n", sample, sample)
        squares = squares[np.isfinite(squares)]
        longest = 4.0 * float(np.sqrt(squares.max())) if squares.size and squares.max() > 0 else 1.0
        lengths: NDArray[np.float64] = np.sqrt(np.einsum("bd,bd->b", queries, queries, dtype=np.float64))
    errors: NDArray[np.float64] = (dim + 2) * _UNIT_ROUNDOFF * longest * lengths
    return errors


def check_search(
    queries: NDArray[np.float32],
    table: NDArray[np.float32],
    eligible: NDArray[np.bool_],
    mask_of: NDArray[np.int32],
    k: int,
) -> None:
    require_array("queries", queries, np.float32, (None, None))
    require_array("table", table, np.float32, (None, queries.shape[1]))
    require_array("eligible", eligible, np.bool_, (None, table.shape[0]))
    require_array("mask_of", mask_of, np.int32, (queries.shape[0],))
    if mask_of.size and (mask_of.min() < 0 or mask_of.max() >= eligible.shape[0]):
        raise ValueError(f"mask_of: must lie in [0, {eligible.shape[0]})")
    _check_k(k)


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k: must be at least 1, got {k}")


def _stride(rows: int) -> int:
    return max(4, rows // _SAMPLE_ROWS) if rows > _MIN_KEPT else 1


def _sampled_floors(
    queries: NDArray[np.float32],
    table: NDArray[np.float32],
    eligible: NDArray[np.bool_],
    mask_of: NDArray[np.int32],
    keep: int,
    errors: NDArray[np.float64],
) -> NDArray[np.float32]:
    """float32[B]: a score that, very probably, at least ``keep`` eligible rows exceed; -inf: no floor."""
    stride = _stride(table.shape[0])
    sample = table[::stride]
    expected = keep / stride
    rank = int(expected + 4.0 * expected**0.5 + 4.0)  # four standard deviations: a second search is rare
    if stride == 1 or rank >= sample.shape[0] or table.shape[0] <= 4 * keep:
        return np.full(queries.shape[0], -np.inf, np.float32)
    scores = queries @ sample.T
    scores[~(eligible[:, ::stride][mask_of] & np.isfinite(scores))] = -np.inf
    at = scores.shape[1] - rank
    return _below(np.partition(scores, at, axis=1)[:, at] - 2.0 * errors)


def _below(values: NDArray[np.float64]) -> NDArray[np.float32]:
    return np.nextafter(values.astype(np.float32), np.float32(-np.inf))


def _search(
    queries: NDArray[np.float32],
    table: NDArray[np.float32],
    eligible: NDArray[np.bool_],
    mask_of: NDArray[np.int32],
    keep: int,
    errors: NDArray[np.float64],
    floors: NDArray[np.float32],
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The best ``keep`` of the rows above the floors: int32[B, keep], float32[B, keep]."""
    batch, rows = queries.shape[0], table.shape[0]
    capacity = max(4 * keep, _MIN_KEPT)
    exact_queries = queries.astype(np.float64)
    keys = np.full((batch, capacity), NO_HIT, np.uint64)
    counts = np.zeros(batch, np.int64)
    running = floors.copy()
    tile = np.empty((batch, min(rows, _BLOCK_ROWS)), np.float32)
    for first in range(0, rows, _BLOCK_ROWS):
        block = table[first : first + _BLOCK_ROWS]
        if not eligible[:, first : first + _BLOCK_ROWS].any():
            continue
        scores = tile if block.shape[0] == tile.shape[1] else np.empty((batch, block.shape[0]), np.float32)
        np.matmul(queries, block.T, out=scores)
        _collect(scores, first, eligible, mask_of, exact_queries, table, keep, errors, running, keys, counts)
    slots = np.full((batch, keep), -1, np.int32)
    scores = np.full((batch, keep), -np.inf, np.float32)
    take_best(keys, int(counts.max()), slots, scores)
    return slots, scores


def take_best(keys: NDArray[np.uint64], used: int, slots: NDArray[np.int32], scores: NDArray[np.float32]) -> None:
    """Sorts the first ``used`` of keys uint64[B, P] and writes the best into the first places of slots, scores [B, k].

    Places beyond those, or beyond the keys, which end at NO_HIT, stay as they are. See :func:`order_key`.
    """
    keys[:, :used].sort(axis=1)
    _decode(keys, used, slots, scores)


def canonical_inner_reference(query: NDArray[np.float32], table: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32[N]: the canonical score of query float32[D] with each row of float32[N, D]."""
    with np.errstate(all="ignore"):
        products = table.astype(np.float64) * query.astype(np.float64)
        lanes = np.zeros((8, table.shape[0]))
        for d in range(table.shape[1]):
            lanes[d % 8] += products[:, d]
        pairs = lanes[0::2] + lanes[1::2]
        total: NDArray[np.float64] = (pairs[0] + pairs[1]) + (pairs[2] + pairs[3])
        return total.astype(np.float32)


@njit(cache=True, nogil=True)
def order_key(score: np.float32, slot: np.int64) -> np.uint64:
    """Ascending keys are (score descending, slot ascending); never NO_HIT, for a slot is not negative."""
    bits = np.int64(float_bits(score + np.float32(0.0)))  # -0.0 equals 0.0
    ordered = bits ^ 0xFFFFFFFF if bits >= 0x80000000 else bits ^ 0x80000000
    return np.uint64(((ordered ^ 0xFFFFFFFF) << 32) | slot)


@njit(cache=True, nogil=True)
def _decode(keys: NDArray[np.uint64], used: int, slots: NDArray[np.int32], scores: NDArray[np.float32]) -> None:
    for b in range(keys.shape[0]):
        bits = scores[b].view(np.uint32)
        for i in range(min(used, slots.shape[1])):
            key = keys[b, i]
            if key == NO_HIT:
                break
            ordered = np.int64(key >> np.uint64(32)) ^ 0xFFFFFFFF
            bits[i] = ordered ^ 0x80000000 if ordered >= 0x80000000 else ordered ^ 0xFFFFFFFF
            slots[b, i] = np.int64(key & np.uint64(0xFFFFFFFF))


@njit(cache=True, nogil=True)
def _collect(
    tile: NDArray[np.float32],
    first: int,
    eligible: NDArray[np.bool_],
    mask_of: NDArray[np.int32],
    queries: NDArray[np.float64],
    table: NDArray[np.float32],
    keep: int,
    errors: NDArray[np.float64],
    floors: NDArray[np.float32],
    keys: NDArray[np.uint64],
    counts: NDArray[np.int64],
) -> None:
    """Scores canonically, while the block is in cache, its eligible rows above the floors; keeps their keys.

    A full buffer is cut to its best ``keep`` and the floor raised to the worst of them less the rounding
    error. Rows arrive in slot order, so a later row that only equals the k-th loses the tie: dropping it is
    exact.
    """
    batch, rows = tile.shape
    capacity = keys.shape[1]
    passing = np.empty(rows + 1, np.int32)
    queries_at, table_at, dim = queries.ctypes.data, table.ctypes.data, table.shape[1]
    row_bytes = 4 * dim
    for b in range(batch):
        scores, query_at = tile[b], queries_at + b * 8 * dim
        mask = eligible[mask_of[b], first : first + rows]
        floor = floors[b]
        count = counts[b]
        passed = 0
        for j in range(rows):  # no branch inside: about 0.3 ns a row, however many pass
            passing[passed] = j
            passed += scores[j] > floor
        for i in range(passed):
            j = passing[i]
            if not mask[j] or not floor < scores[j] < np.inf:
                continue
            exact = canonical_inner(query_at, table_at + (first + j) * row_bytes, dim)
            if not np.isfinite(exact):
                continue
            if count == capacity:
                count = keep
                keys[b, :keep] = np.sort(keys[b])[:keep]
                keys[b, keep:] = NO_HIT
                worst = canonical_inner(
                    query_at, table_at + np.int64(keys[b, keep - 1] & np.uint64(0xFFFFFFFF)) * row_bytes, dim
                )
                raised = np.float32(worst - errors[b])
                if raised > worst - errors[b]:  # rounded up
                    raised = np.nextafter(raised, np.float32(-np.inf))
                floor = max(floor, raised)
            keys[b, count] = order_key(exact, first + j)
            count += 1
        counts[b] = count
        floors[b] = floor


@njit(cache=True, nogil=True)
def _rescore(
    queries: NDArray[np.float64],
    table: NDArray[np.float32],
    candidates: NDArray[np.int32],
    keys: NDArray[np.uint64],
) -> None:
    queries_at, table_at, dim = queries.ctypes.data, table.ctypes.data, table.shape[1]
    for b in range(candidates.shape[0]):
        for i in range(candidates.shape[1]):
            slot = np.int64(candidates[b, i])
            if slot >= 0:
                exact = canonical_inner(queries_at + b * 8 * dim, table_at + slot * 4 * dim, dim)
                if np.isfinite(exact):
                    keys[b, i] = order_key(exact, slot)
