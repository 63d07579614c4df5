"""`kernels.topk` on the GPU: a float16 scan proposes (`kernels.scan_gpu`), the canonical score decides
(`kernels.canonical_gpu`).

Same ids and scores as on the CPU, bit for bit, or the query is marked *unproven*, and then
:func:`kernels.canonical_gpu.masked_topk_slow` has the answer. The way of a batch, every step a launch of fixed
shape, nothing allocated and nothing read back, so that it fits into one captured graph:

1. *prepare*: each query is scaled by a power of two to below 1 and rounded to float16, and its rounding bound is
   computed. *pack*: eligible rows in use become one bit each.
2. *sample*, *floor*: scores of rows at a fixed stride. Their rank-th largest, less twice the bound, is a floor that
   very probably at least k rows exceed. It is found by bisection over registers, without a sort. A table of no more
   rows than the buffers hold gets no floor.
3. *scan*: words of hits above the floor. *expand*: words to candidate rows.
4. *rescore*, *select*, *order*: canonical scores of the candidates, the k best, and the proof: all candidates fitted,
   and either there was no floor or the k-th best lies above floor + bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.aot import Compiled
from kernels.canonical_gpu import decide
from kernels.checks_gpu import require_tensor
from kernels.scan_gpu import MIN_SAMPLE_ROWS, WORD_ROWS, propose

_MIN_CAPACITY = 4096
_PUT_BLOCK = 32


@dataclass(frozen=True)
class TopkBuffers:
    """Scratch of :func:`masked_topk` for one bucket of sizes; holds nothing between calls."""

    queries16: torch.Tensor  # float16[B, D]
    filter_of: torch.Tensor  # int32[B], -1: no hits
    scales: torch.Tensor  # float64[B]
    errors: torch.Tensor  # float64[B], of scaled scores
    floors: torch.Tensor  # float32[B], of scaled scores
    sample: torch.Tensor  # float32[B, S]
    bits: torch.Tensor  # int32[V, W], bit r of word w: row 32 w + r may be found
    words: torch.Tensor  # int64[B, P], number of 32 rows above, their hits as bits below
    n_words: torch.Tensor  # int32[B]
    candidates: torch.Tensor  # int32[B, P]
    n_candidates: torch.Tensor  # int32[B]
    keys: torch.Tensor  # int64[B, P]
    best: torch.Tensor  # int64[B, k]
    n_best: torch.Tensor  # int32[B]

    @classmethod
    def allocate(
        cls,
        batch: int,
        k: int,
        rows: int,
        dim: int,
        filters: int,
        device: torch.device,
        *,
        capacity: int = 0,
        sample_rows: int = 16_384,
    ) -> TopkBuffers:
        """Buffers for B queries, the best k, tables of C rows and D dimensions, and V filters.

        Args:
            capacity: P, candidates per query; 0 chooses. With 4·k (4,096 at least) the sampled floor lets about a
                third of that through at 1 M rows. sample_rows: S. Both powers of two.

        Raises:
            ValueError: a size is below 1, no power of two, or capacity < k.

        Cost: 8·B·(2.5·P + k) + 4·B·S bytes; 36 MiB at B = 256, k = 500.
        """
        if not capacity:
            capacity = max(_MIN_CAPACITY, triton.next_power_of_2(4 * k))
            capacity = min(capacity, triton.next_power_of_2(max(rows, k)))  # more could never fill
        if min(batch, k, rows, dim, filters) < 1:
            raise ValueError(f"batch, k, rows, dim, filters: must be at least 1, got {batch, k, rows, dim, filters}")
        if capacity < k or capacity & (capacity - 1):
            raise ValueError(f"capacity: must be a power of two and at least k = {k}, got {capacity}")
        if sample_rows < MIN_SAMPLE_ROWS or sample_rows & (sample_rows - 1):
            raise ValueError(f"sample_rows: must be a power of two and at least {MIN_SAMPLE_ROWS}, got {sample_rows}")

        def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        words = triton.cdiv(rows, WORD_ROWS)
        return cls(
            queries16=empty(torch.float16, batch, dim),
            filter_of=empty(torch.int32, batch),
            scales=empty(torch.float64, batch),
            errors=empty(torch.float64, batch),
            floors=empty(torch.float32, batch),
            sample=empty(torch.float32, batch, sample_rows),
            bits=empty(torch.int32, filters, words),
            words=empty(torch.int64, batch, capacity),
            n_words=empty(torch.int32, batch),
            candidates=empty(torch.int32, batch, capacity),
            n_candidates=empty(torch.int32, batch),
            keys=empty(torch.int64, batch, capacity),
            best=empty(torch.int64, batch, k),
            n_best=empty(torch.int32, batch),
        )


@triton.jit
def _put(
    slots_ptr, rows_ptr, table_ptr, table16_ptr, longest_ptr, n, capacity,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots_ptr + i, mask=i < n, other=-1)
    valid = (slot >= 0) & (slot < capacity)
    d = tl.arange(0, DIM_PADDED)
    inside = valid[:, None] & (d < DIM)[None, :]
    row = tl.load(rows_ptr + i.to(tl.int64)[:, None] * DIM + d[None, :], mask=inside, other=0.0)
    fits = tl.max(tl.where(tl.abs(row) < 65504.0, 0, 1), axis=1) == 0  # float16's largest
    row16 = tl.where(fits[:, None], row, float("nan")).to(tl.float16)
    at = tl.maximum(slot, 0).to(tl.int64)[:, None] * DIM + d[None, :]
    tl.store(table_ptr + at, row, mask=inside)
    tl.store(table16_ptr + at, row16, mask=inside)
    exact = row.to(tl.float64)
    length = 1.000001 * tl.sqrt(tl.sum(exact * exact, axis=1))  # never rounded down
    tl.atomic_max(longest_ptr, tl.max(tl.where(fits & valid, length, 0.0), axis=0).to(tl.float32))


def put_rows(
    slots: torch.Tensor,
    rows: torch.Tensor,
    *,
    table: torch.Tensor,
    table16: torch.Tensor,
    longest: torch.Tensor,
) -> None:
    """Writes rows and keeps their float16 copy and the longest length in step; the only writer of all three.

    Args:
        slots: int32[n], distinct; one outside [0, C) is skipped. rows: float32[n, D].
        table: float32[C, D]. table16: float16[C, D]; NaN throughout in a row with a value beyond float16's range.
        longest: float32[1], zero before the first row: raised to the length of the longest row that float16 holds,
            never lowered.

    Raises:
        ValueError: an argument has the wrong dtype, shape, layout or device; the message names it.

    Cost: 10·n·D bytes; allocates nothing.
    """
    device = table.device
    require_tensor("table", table, torch.float32, (None, None), device)
    require_tensor("table16", table16, torch.float16, table.shape, device)
    require_tensor("slots", slots, torch.int32, (None,), device)
    require_tensor("rows", rows, torch.float32, (slots.shape[0], table.shape[1]), device)
    require_tensor("longest", longest, torch.float32, (1,), device)
    if slots.shape[0] == 0:
        return
    dim = table.shape[1]
    _put[(triton.cdiv(slots.shape[0], _PUT_BLOCK),)](
        slots, rows, table, table16, longest, slots.shape[0], table.shape[0],
        DIM=dim, DIM_PADDED=triton.next_power_of_2(dim), BLOCK=_PUT_BLOCK,
    )  # fmt: skip


def masked_topk(
    queries: torch.Tensor,
    table: torch.Tensor,
    table16: torch.Tensor,
    longest: torch.Tensor,
    eligible: torch.Tensor,
    mask_of: torch.Tensor,
    k: int,
    params: torch.Tensor,
    *,
    work: TopkBuffers,
    slots: torch.Tensor,
    scores: torch.Tensor,
    unproven: torch.Tensor,
) -> None:
    """:func:`kernels.topk.masked_topk` over the rows in use, into ``slots`` and ``scores``.

    Args:
        queries: float32[B, D]. An all-zero row (a viewer without an embedding) has no hits; nor has one that is not
            finite, or one at or beyond params[2] (padding).
        table: float32[C, D], table16: float16[C, D], longest: float32[1]: written by :func:`put_rows` alone.
        eligible: uint8[V, C]. mask_of: int32[B]; a number outside [0, V) gives no hits.
        k: >= 1. params: int64[8]; [1] rows in use, [2] queries in use, [7] filters in use (0: all V):
            the masks behind them are not read, and no query in use may name one.
        work: scratch of exactly these sizes.
        slots: int32[B, k], scores: float32[B, k], as the CPU returns them.
        unproven: uint8[B]; 1: this row of the answer may lack a hit, ask ``masked_topk_slow``.

    Raises:
        ValueError: an argument has the wrong dtype, shape, layout or device; the message names it.

    Cost: 2·B·R·D flops in float16; reading 2·R·D bytes of table16 once per 128 queries and V·C bytes of masks;
    about 1,500 rows per query re-scored in float64 at k = 500 and 1 M rows. Ten launches.
    """
    batch, dim = queries.shape
    rows, filters, device = table.shape[0], eligible.shape[0], queries.device
    require_tensor("queries", queries, torch.float32, (None, None), device)
    require_tensor("table", table, torch.float32, (None, dim), device)
    require_tensor("table16", table16, torch.float16, (rows, dim), device)
    require_tensor("longest", longest, torch.float32, (1,), device)
    require_tensor("eligible", eligible, torch.uint8, (None, rows), device)
    require_tensor("mask_of", mask_of, torch.int32, (batch,), device)
    require_tensor("params", params, torch.int64, (8,), device)
    require_tensor("slots", slots, torch.int32, (batch, k), device)
    require_tensor("scores", scores, torch.float32, (batch, k), device)
    require_tensor("unproven", unproven, torch.uint8, (batch,), device)
    require_tensor("work.queries16", work.queries16, torch.float16, (batch, dim), device)
    require_tensor("work.bits", work.bits, torch.int32, (filters, triton.cdiv(rows, WORD_ROWS)), device)
    require_tensor("work.best", work.best, torch.int64, (batch, k), device)
    propose(queries, table16, longest, eligible, mask_of, k, params, work)
    decide(
        queries, table, work.candidates, work.n_candidates, work.n_words, work.floors, work.errors, work.scales, k,
        keys=work.keys, best=work.best, n_best=work.n_best, slots=slots, scores=scores, unproven=unproven,
    )  # fmt: skip


AOT = [
    Compiled(_put, "*i32 *fp32 *fp32 *fp16 *fp32 i32 i32", {"DIM": 64, "DIM_PADDED": 64, "BLOCK": _PUT_BLOCK}),
]
