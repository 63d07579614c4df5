"""The half of `kernels.topk` that decides, on the GPU: canonical scores, their sort keys, the best k in order.

A canonical score is summed in float64 in eight lanes, exactly as on the CPU: a product of two float32 is exact in
float64, so a fused multiply-add cannot change a bit, and lane j takes d = j mod 8 in ascending order. Its sort key
is int64, never negative: 32 bits that ascend with falling score, then 31 bits of slot. Keys are distinct, so what
follows depends on the set of keys alone and not on the order in which threads found them.

The best k are taken without a sort: a bisection over the value of the k-th key (at most 63 counts over registers),
then each survivor's place is the number of survivors before it. For 256 queries and k = 500 that is 67 million
comparisons, less than a sort of all candidates moves in memory; nothing is allocated.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.aot import Compiled
from kernels.checks_gpu import require_tensor

_NO_HIT = tl.constexpr(0x7FFF_FFFF_FFFF_FFFF)
_RESCORE_BLOCK, _RESCORE_WARPS = 64, 2
_ORDER_BLOCK, _ORDER_STEP = 64, 16
_SLOW_BLOCK_ROWS = 65_536


@triton.jit
def ascending(score):
    """int32 that ascends with a float32 score (not NaN)."""
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def from_ascending(ordered):
    """The float32 score of :func:`ascending`'s int32."""
    return tl.where(ordered >= 0, ordered, ordered ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _score_of(key):
    """float32 score of a key that is a hit."""
    return from_ascending((0x7FFFFFFF - (key >> 31)).to(tl.int32))


@triton.jit
def _keys_of(query_ptr, table_ptr, slot, valid, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """int64[BLOCK]: keys of rows ``slot`` for one query; _NO_HIT where not valid or the score is not finite."""
    lane = tl.arange(0, 8)
    row = tl.where(valid, slot, 0).to(tl.int64)
    lanes = tl.zeros((BLOCK, 8), tl.float64)
    for first in range(0, DIM, 8):
        d = first + lane
        inside = d < DIM
        query = tl.load(query_ptr + d, mask=inside, other=0.0).to(tl.float64)
        values = tl.load(table_ptr + row[:, None] * DIM + d[None, :], mask=inside[None, :] & valid[:, None], other=0.0)
        lanes += query[None, :] * values.to(tl.float64)
    even, odd = tl.split(tl.reshape(lanes, (BLOCK, 4, 2)))
    even, odd = tl.split(tl.reshape(even + odd, (BLOCK, 2, 2)))
    even, odd = tl.split(even + odd)
    score = (even + odd).to(tl.float32)
    score = tl.where(score == 0.0, 0.0, score)  # -0.0 equals 0.0
    falling = 0x7FFFFFFF - ascending(score).to(tl.int64)
    return tl.where(valid & (tl.abs(score) < float("inf")), (falling << 31) | slot.to(tl.int64), _NO_HIT)


@triton.jit
def _rescore(
    queries_ptr, table_ptr, candidates_ptr, n_candidates_ptr, keys_ptr,
    capacity, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    count = tl.minimum(tl.load(n_candidates_ptr + b), capacity)
    first = tl.program_id(0) * BLOCK
    if first >= count:
        return
    i = first + tl.arange(0, BLOCK)
    slot = tl.load(candidates_ptr + b * capacity + i, mask=i < count, other=0)
    keys = _keys_of(queries_ptr + b * DIM, table_ptr, slot, i < count, DIM, BLOCK)
    tl.store(keys_ptr + b * capacity + i, keys, mask=i < count)


@triton.jit
def _select(
    keys_ptr, n_candidates_ptr, n_words_ptr, floors_ptr, errors_ptr, scales_ptr, best_ptr, n_best_ptr, unproven_ptr,
    k, CAPACITY: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    offered = tl.load(n_candidates_ptr + b)
    i = tl.arange(0, CAPACITY)
    key = tl.load(keys_ptr + b * CAPACITY + i, mask=i < offered, other=_NO_HIT)
    wanted = tl.minimum(tl.sum((key != _NO_HIT).to(tl.int32), axis=0), k)
    low = tl.min(key, axis=0)
    high = tl.max(tl.where(key == _NO_HIT, low, key), axis=0)
    while low < high:  # the smallest key that `wanted` keys do not exceed lies in [low, high]
        middle = low + ((high - low) >> 1)
        enough = tl.sum((key <= middle).to(tl.int32), axis=0) >= wanted
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    kept = (key <= low) & (key != _NO_HIT)
    place = tl.cumsum(kept.to(tl.int32), axis=0) - 1
    tl.store(best_ptr + b * k + place, key, mask=kept)
    tl.store(n_best_ptr + b, wanted)
    # A row that the scan left out scores floor + error at most, so the k-th best must be above that.
    floor = tl.load(floors_ptr + b)
    worst = _score_of(tl.where(wanted > 0, low, 0)).to(tl.float64) * tl.load(scales_ptr + b)
    full = (wanted == k) & (worst > floor.to(tl.float64) + tl.load(errors_ptr + b))
    fits = (offered <= CAPACITY) & (tl.load(n_words_ptr + b) <= CAPACITY)
    proven = fits & (full | (floor == float("-inf")))
    tl.store(unproven_ptr + b, tl.where(proven, 0, 1).to(tl.uint8))


@triton.jit
def _order(best_ptr, n_best_ptr, slots_ptr, scores_ptr, k, BLOCK: tl.constexpr, STEP: tl.constexpr):
    b = tl.program_id(1).to(tl.int64)
    count = tl.load(n_best_ptr + b)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mine = tl.load(best_ptr + b * k + i, mask=i < count, other=_NO_HIT)
    place = tl.zeros((BLOCK,), tl.int32)
    first = tl.zeros((), tl.int32)
    while first < count:
        j = first + tl.arange(0, STEP)
        other = tl.load(best_ptr + b * k + j, mask=j < count, other=_NO_HIT)
        place += tl.sum((other[None, :] < mine[:, None]).to(tl.int32), axis=1)
        first += STEP
    found = i < count
    place = tl.where(found, place, i)  # places beyond the hits are padding
    slot = tl.where(found, (mine & 0x7FFFFFFF).to(tl.int32), -1)
    score = tl.where(found, _score_of(tl.where(found, mine, 0)), float("-inf"))
    tl.store(slots_ptr + b * k + place, slot, mask=i < k)
    tl.store(scores_ptr + b * k + place, score, mask=i < k)


@triton.jit
def _score_all(
    queries_ptr, table_ptr, eligible_ptr, mask_of_ptr, keys_ptr,
    first_row, last_row, capacity, width, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = first_row + column
    mask = tl.load(mask_of_ptr + b).to(tl.int64)
    valid = row < last_row
    valid = valid & (tl.load(eligible_ptr + mask * capacity + row, mask=valid, other=0) != 0)
    keys = _keys_of(queries_ptr + b * DIM, table_ptr, row, valid, DIM, BLOCK)
    tl.store(keys_ptr + b * width + column, keys, mask=column < width)


def decide(
    queries: torch.Tensor,
    table: torch.Tensor,
    candidates: torch.Tensor,
    n_candidates: torch.Tensor,
    n_words: torch.Tensor,
    floors: torch.Tensor,
    errors: torch.Tensor,
    scales: torch.Tensor,
    k: int,
    *,
    keys: torch.Tensor,
    best: torch.Tensor,
    n_best: torch.Tensor,
    slots: torch.Tensor,
    scores: torch.Tensor,
    unproven: torch.Tensor,
) -> None:
    """The k best candidates of each query in order, and whether anything not proposed could belong to them.

    Args:
        queries: float32[B, D]. table: float32[C, D].
        candidates: int32[B, P] of which the first n_candidates int32[B] count, distinct, in any order. A count
            above P says that some were lost; so does n_words int32[B] above P.
        floors, errors, scales: what :mod:`kernels.topk_gpu` proposed by, float32, float64 and float64[B].
        keys: int64[B, P], best: int64[B, k], n_best: int32[B], scratch.
        slots, scores, unproven: see :func:`kernels.topk_gpu.masked_topk`. P is a power of two.
    """
    batch, capacity = candidates.shape
    dim = queries.shape[1]
    _rescore[(triton.cdiv(capacity, _RESCORE_BLOCK), batch)](
        queries,
        table,
        candidates,
        n_candidates,
        keys,
        capacity,
        DIM=dim,
        BLOCK=_RESCORE_BLOCK,
        num_warps=_RESCORE_WARPS,
    )
    _select[(batch,)](
        keys, n_candidates, n_words, floors, errors, scales, best, n_best, unproven, k,
        CAPACITY=capacity, num_warps=_select_warps(capacity),
    )  # fmt: skip
    _order[(triton.cdiv(k, _ORDER_BLOCK), batch)](best, n_best, slots, scores, k, BLOCK=_ORDER_BLOCK, STEP=_ORDER_STEP)


def masked_topk_slow(
    queries: torch.Tensor,
    table: torch.Tensor,
    eligible: torch.Tensor,
    mask_of: torch.Tensor,
    k: int,
    rows: int,
    *,
    slots: torch.Tensor,
    scores: torch.Tensor,
) -> None:
    """:func:`kernels.topk.masked_topk` over the first ``rows`` rows by the canonical score of every row.

    Exact whatever the data: for the few queries whose answer :func:`kernels.topk_gpu.masked_topk` could not prove.
    An all-zero query is scored like any other here, as on the CPU.

    Args:
        queries: float32[B, D]. table: float32[C, D]. eligible: uint8[V, C]. mask_of: int32[B] in [0, V), which is
            not checked. k: >= 1. slots: int32[B, k]. scores: float32[B, k].

    Raises:
        ValueError: an argument has the wrong dtype, shape, layout or device; the message names it.

    Cost: 2·B·rows·D flops in float64, 4·rows·D bytes of table per query, a partial sort of 65,536 keys per block
    of rows. Allocates 1.5 MiB and more per query: not for a captured graph.
    """
    batch, dim = queries.shape
    capacity, device = table.shape[0], queries.device
    require_tensor("queries", queries, torch.float32, (None, None), device)
    require_tensor("table", table, torch.float32, (None, dim), device)
    require_tensor("eligible", eligible, torch.uint8, (None, capacity), device)
    require_tensor("mask_of", mask_of, torch.int32, (batch,), device)
    require_tensor("slots", slots, torch.int32, (batch, k), device)
    require_tensor("scores", scores, torch.float32, (batch, k), device)
    if not 0 <= rows <= capacity:
        raise ValueError(f"rows: must lie in [0, {capacity}], got {rows}")
    if batch == 0:
        return
    best = torch.full((batch, k), _NO_HIT.value, dtype=torch.int64, device=device)
    for first in range(0, rows, _SLOW_BLOCK_ROWS):
        width = min(_SLOW_BLOCK_ROWS, rows - first)
        keys = torch.empty((batch, width), dtype=torch.int64, device=device)
        _score_all[(triton.cdiv(width, _RESCORE_BLOCK), batch)](
            queries,
            table,
            eligible,
            mask_of,
            keys,
            first,
            rows,
            capacity,
            width,
            DIM=dim,
            BLOCK=_RESCORE_BLOCK,
            num_warps=_RESCORE_WARPS,
        )
        best = torch.cat((best, keys), dim=1).topk(k, dim=1, largest=False, sorted=True).values
    n_best = (best != _NO_HIT.value).sum(dim=1, dtype=torch.int32)
    _order[(triton.cdiv(k, _ORDER_BLOCK), batch)](
        best.contiguous(), n_best, slots, scores, k, BLOCK=_ORDER_BLOCK, STEP=_ORDER_STEP
    )


def _select_warps(capacity: int) -> int:
    """16 keys in the registers of a thread; 32 where more threads would have too few registers for that."""
    return max(4, min(16, capacity // (32 * 16)))


_RESCORE_TYPES = "*fp32 *fp32 *i32 *i32 *i64 i32"
_SELECT_TYPES = "*i64 *i32 *i32 *fp32 *fp64 *fp64 *i64 *i32 *u8 i32"
AOT = [
    Compiled(_rescore, _RESCORE_TYPES, {"DIM": 64, "BLOCK": _RESCORE_BLOCK}, num_warps=_RESCORE_WARPS),
    *(
        Compiled(_select, _SELECT_TYPES, {"CAPACITY": size}, num_warps=_select_warps(size), label=str(size))
        for size in (4096, 8192)
    ),
    Compiled(_order, "*i64 *i32 *i32 *fp32 i32", {"BLOCK": _ORDER_BLOCK, "STEP": _ORDER_STEP}),
    Compiled(
        _score_all,
        "*fp32 *fp32 *u8 *i32 *i64 i32 i32 i32 i32",
        {"DIM": 64, "BLOCK": _RESCORE_BLOCK},
        num_warps=_RESCORE_WARPS,
    ),
]
