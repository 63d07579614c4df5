"""The half of `kernels.topk_gpu` that proposes: a float16 scan on the tensor cores, and its rounding bound.

**The bound.** With u = 2^-11 and h = 2^-25·√D (half the spacing of float16's smallest numbers), query q scaled to
|q_i| < 1 and rows no longer than L: rounding moves q by dq = u·|q| + h at most and a row by dr = u·L + h, so the
product of the rounded vectors is off by dq·(L + dr) + |q|·dr. Tensor cores add in float32, but may truncate and need
not keep order: (D + 8)·2^-21·(|q| + dq)·(L + dr) is eight times Higham's γ and covers that and the float64 sum. The
canonical score's own rounding adds 2^-24·|q|·L, or 2^-149 before scaling. L is not sampled: it is the longest row that
`put_rows` ever wrote. A row that float16 cannot hold is NaN there, and a score that is NaN is always proposed.

**The scan.** All that leaves a tile of rows × queries is one word per query and 32 rows that has a hit: a compare and a
select-and-add per score, and a thirty-second of the cost of mask, atomic and store. Appending every hit by itself
would cost an address, an atomic and a store instruction per score, hit or not.

**Floor on an H100** at 1 M rows, D = 64: reading the float16 table once takes 43 µs at 3 TB/s; 256 queries are 33
GFLOP, 41 µs on the tensor cores. Compare and select-and-add are 19 µs of issue slots, which another program of the SM
can overlap: 128 queries × 128 rows keep 64 float32 accumulators per thread, and two programs fit an SM. Reading each
tile for 128 queries leaves two reads of the table at batch 256, the second from L2. Small batches are bound by memory:
fewer queries, longer row tiles, more stages in flight. These are estimates: `loadtest/bench/gpu_retrieval.py` measures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from kernels.aot import Compiled
from kernels.canonical_gpu import ascending, from_ascending

if TYPE_CHECKING:
    from kernels.topk_gpu import TopkBuffers

_PACK_WORDS, _SAMPLE_BLOCK, _EXPAND_WORDS = 64, 128, 64
_PROGRAMS = 4 * 132  # a few per SM of an H100: long loops keep loads in flight, short ones level the ends
_DIM_STEP = 64
WORD_ROWS = 32
MIN_SAMPLE_ROWS = _SAMPLE_BLOCK


class ScanShape(NamedTuple):
    """Tile of one scan program: queries × rows, warps, and tiles in flight."""

    queries: int
    rows: int
    num_warps: int
    num_stages: int


SCAN_SHAPES = {
    16: ScanShape(16, 256, 4, 4),
    32: ScanShape(32, 256, 4, 3),
    64: ScanShape(64, 128, 4, 3),
    128: ScanShape(128, 128, 8, 3),
}
"""By batch, rounded up to a power of two; larger batches take several tiles of 128 queries."""


@triton.jit
def _prepare(
    queries_ptr, mask_of_ptr, longest_ptr, params_ptr,
    queries16_ptr, filter_ptr, scales_ptr, errors_ptr, n_words_ptr, n_candidates_ptr,
    filters, DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DIM_PADDED)
    query = tl.load(queries_ptr + b * DIM + d, mask=d < DIM, other=0.0)
    size = tl.abs(query)
    infinite = tl.sum((~(size < float("inf"))).to(tl.int32), axis=0) > 0
    largest = tl.max(size, axis=0)
    mask = tl.load(mask_of_ptr + b)
    searched = (b < tl.load(params_ptr + 2)) & (mask >= 0) & (mask < filters) & (largest > 0.0) & (infinite == 0)
    # largest < 2^(exponent + 1), also when it is subnormal; the scale is built as a float64 from its bits
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 1) - 127
    scale = ((1022 - exponent).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    scaled = tl.where(searched, query.to(tl.float64) * scale, 0.0)
    tl.store(queries16_ptr + b * DIM + d, scaled.to(tl.float32).to(tl.float16), mask=d < DIM)
    length = tl.sqrt(tl.sum(scaled * scaled, axis=0))
    longest = tl.load(longest_ptr).to(tl.float64)
    tiny = 2.98023223876953125e-08 * tl.sqrt(tl.full((), DIM, tl.float64))  # 2^-25 √D
    query_error = 0.00048828125 * length + tiny  # 2^-11
    row_error = 0.00048828125 * longest + tiny
    error = query_error * (longest + row_error) + length * row_error
    error += (DIM + 8) * 4.76837158203125e-07 * (length + query_error) * (longest + row_error)  # 2^-21
    error += 5.9604644775390625e-08 * length * longest + 1.401298464324817e-45 * scale  # 2^-24, 2^-149
    tl.store(errors_ptr + b, 1.001 * error)
    tl.store(scales_ptr + b, scale)
    tl.store(filter_ptr + b, tl.where(searched, mask, -1))
    tl.store(n_words_ptr + b, 0)
    tl.store(n_candidates_ptr + b, 0)


@triton.jit
def _pack(eligible_ptr, params_ptr, bits_ptr, capacity, words, WORDS: tl.constexpr):
    v = tl.program_id(1).to(tl.int64)
    in_use = tl.load(params_ptr + 7)
    if (in_use > 0) & (v >= in_use):
        return
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    bit = tl.arange(0, 32)
    row = word[:, None] * 32 + bit[None, :]
    flags = tl.load(eligible_ptr + v * capacity + row, mask=row < tl.load(params_ptr + 1), other=0)
    found = tl.sum(tl.where(flags != 0, 1 << bit[None, :], 0), axis=1)
    tl.store(bits_ptr + v * words + word, found, mask=word < words)


@triton.jit
def _dot_tile(
    queries16_ptr, table16_ptr, b, row, batch,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr, DIM_STEP: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """float32[QUERIES, ROWS]: scores of queries ``b`` with rows ``row``."""
    scores = tl.zeros((QUERIES, ROWS), tl.float32)
    for part in range(DIM_PADDED // DIM_STEP):
        d = part * DIM_STEP + tl.arange(0, DIM_STEP)
        inside = (d < DIM)[None, :]
        query = tl.load(queries16_ptr + b[:, None] * DIM + d[None, :], mask=inside & (b < batch)[:, None], other=0.0)
        if DIM == DIM_PADDED:
            rows = tl.load(table16_ptr + row[:, None] * DIM + d[None, :])
        else:
            rows = tl.load(table16_ptr + row[:, None] * DIM + d[None, :], mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(rows), scores)
    return scores


@triton.jit
def _sample(
    queries16_ptr, table16_ptr, params_ptr, filter_ptr, bits_ptr, sample_ptr,
    batch, words, enough,
    SAMPLE: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, DIM_STEP: tl.constexpr,
    QUERIES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    used = tl.load(params_ptr + 1)
    if used <= enough:
        return
    b = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row = i.to(tl.int64) * used // SAMPLE
    scores = _dot_tile(queries16_ptr, table16_ptr, b, row, batch, DIM, DIM_PADDED, DIM_STEP, QUERIES, ROWS)
    mask = tl.load(filter_ptr + b, mask=b < batch, other=-1).to(tl.int64)
    word = tl.load(bits_ptr + mask[:, None] * words + (row >> 5)[None, :], mask=(mask >= 0)[:, None], other=0)
    eligible = ((word >> (row & 31).to(tl.int32)[None, :]) & 1) != 0
    scores = tl.where(eligible & (tl.abs(scores) < float("inf")), scores, float("-inf"))
    tl.store(sample_ptr + b.to(tl.int64)[:, None] * SAMPLE + i[None, :], scores, mask=(b < batch)[:, None])


@triton.jit
def _floor(sample_ptr, params_ptr, errors_ptr, floors_ptr, k, enough, SAMPLE: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    used = tl.load(params_ptr + 1)
    if used <= enough:
        tl.store(floors_ptr + b, float("-inf"))
        return
    expected = (tl.full((), SAMPLE, tl.float32) * k) / used.to(tl.float32)
    rank = (expected + 4.0 * tl.sqrt(expected) + 4.0).to(tl.int32)  # four standard deviations: failing is rare
    ordered = ascending(tl.load(sample_ptr + b * SAMPLE + tl.arange(0, SAMPLE)))
    low = tl.full((), -2139095041, tl.int64)  # ascending(-inf)
    high = tl.max(ordered, axis=0).to(tl.int64)
    while low < high:  # the largest value that `rank` samples reach lies in [low, high]
        middle = low + ((high - low + 1) >> 1)
        enough_reach = tl.sum((ordered >= middle.to(tl.int32)).to(tl.int32), axis=0) >= rank
        low = tl.where(enough_reach, middle, low)
        high = tl.where(enough_reach, high, middle - 1)
    score = from_ascending(low.to(tl.int32)).to(tl.float64)
    tl.store(floors_ptr + b, (score - 2.0 * tl.load(errors_ptr + b)).to(tl.float32))


@triton.jit
def _scan(
    queries16_ptr, table16_ptr, params_ptr, filter_ptr, bits_ptr, floors_ptr, words_ptr, n_words_ptr,
    batch, capacity, words, kept_words,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr, DIM_STEP: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(1) * TILES * ROWS
    if (first >= tl.load(params_ptr + 1)) | (tl.program_id(0) * QUERIES >= tl.load(params_ptr + 2)):
        return
    b = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    floor = tl.load(floors_ptr + b, mask=b < batch, other=float("inf"))
    mask = tl.load(filter_ptr + b, mask=b < batch, other=-1).to(tl.int64)
    bit = tl.arange(0, 32)
    group = tl.arange(0, ROWS // 32)
    if DIM_PADDED == DIM_STEP:  # the common widths: queries stay on the chip for the whole loop
        d = tl.arange(0, DIM_STEP)
        query = tl.load(
            queries16_ptr + b[:, None] * DIM + d[None, :], mask=(d < DIM)[None, :] & (b < batch)[:, None], other=0.0
        )
    for tile in range(TILES):  # a constant: the loop has no early end, so that loads run ahead
        start = first + tile * ROWS
        # Rows past the table's end are read from its last; the bits of rows past those in use are 0.
        row = tl.minimum(start + tl.arange(0, ROWS), capacity - 1).to(tl.int64)
        if DIM_PADDED == DIM_STEP:
            if DIM == DIM_PADDED:
                rows = tl.load(table16_ptr + row[:, None] * DIM + d[None, :])
            else:
                rows = tl.load(table16_ptr + row[:, None] * DIM + d[None, :], mask=(d < DIM)[None, :], other=0.0)
            scores = tl.dot(query, tl.trans(rows))
        else:
            scores = _dot_tile(queries16_ptr, table16_ptr, b, row, batch, DIM, DIM_PADDED, DIM_STEP, QUERIES, ROWS)
        hit = ~(scores <= floor[:, None])  # NaN is a hit
        grouped = tl.reshape(hit, (QUERIES, ROWS // 32, 32))
        found = tl.sum(tl.where(grouped, 1 << bit[None, None, :], 0), axis=2)
        number = start // 32 + group
        known = (mask >= 0)[:, None] & (number < words)[None, :]
        found &= tl.load(bits_ptr + mask[:, None] * words + number[None, :], mask=known, other=0)
        some = found != 0
        place = tl.atomic_add(n_words_ptr + b[:, None] + tl.zeros_like(found), 1, mask=some, sem="relaxed")
        words_at = words_ptr + b.to(tl.int64)[:, None] * kept_words
        word = (number.to(tl.int64)[None, :] << 32) | (found.to(tl.int64) & 0xFFFFFFFF)
        tl.store(words_at + place, word, mask=some & (place < kept_words))


@triton.jit
def _expand(words_ptr, n_words_ptr, candidates_ptr, n_candidates_ptr, capacity, WORDS: tl.constexpr):
    b = tl.program_id(1).to(tl.int64)
    count = tl.minimum(tl.load(n_words_ptr + b), capacity)
    first = tl.program_id(0) * WORDS
    if first >= count:
        return
    i = first + tl.arange(0, WORDS * 32) // 32
    bit = tl.arange(0, WORDS * 32) % 32
    word = tl.load(words_ptr + b * capacity + i, mask=i < count, other=0)
    hit = ((word >> bit) & 1).to(tl.int32)
    base = tl.atomic_add(n_candidates_ptr + b, tl.sum(hit, axis=0), sem="relaxed")
    place = base + tl.cumsum(hit, axis=0) - hit
    slot = (word >> 32).to(tl.int32) * 32 + bit
    tl.store(candidates_ptr + b * capacity + place, slot, mask=(hit != 0) & (place < capacity))


def propose(
    queries: torch.Tensor,
    table16: torch.Tensor,
    longest: torch.Tensor,
    eligible: torch.Tensor,
    mask_of: torch.Tensor,
    k: int,
    params: torch.Tensor,
    work: TopkBuffers,
) -> None:
    """Candidates of each query into ``work``, with the floor and the bound by which the others were left out.

    The arguments are those of :func:`kernels.topk_gpu.masked_topk`, which has checked them.
    """
    batch, dim = queries.shape
    filters, rows = eligible.shape
    capacity, sample, words = work.candidates.shape[1], work.sample.shape[1], work.bits.shape[1]
    _prepare[(batch,)](
        queries, mask_of, longest, params, work.queries16, work.filter_of, work.scales, work.errors, work.n_words,
        work.n_candidates, filters, DIM=dim, DIM_PADDED=triton.next_power_of_2(dim),
    )  # fmt: skip
    _pack[(triton.cdiv(words, _PACK_WORDS), filters)](eligible, params, work.bits, rows, words, WORDS=_PACK_WORDS)
    shape = SCAN_SHAPES[min(128, max(16, triton.next_power_of_2(batch)))]
    widths = _widths(dim)
    if rows > capacity:
        queries_per_tile = min(64, shape.queries)
        _sample[(triton.cdiv(batch, queries_per_tile), sample // _SAMPLE_BLOCK)](
            work.queries16, table16, params, work.filter_of, work.bits, work.sample, batch, words, capacity,
            SAMPLE=sample, **widths, QUERIES=queries_per_tile, ROWS=_SAMPLE_BLOCK,
        )  # fmt: skip
    _floor[(batch,)](
        work.sample, params, work.errors, work.floors, k, capacity, SAMPLE=sample, num_warps=_floor_warps(sample)
    )
    query_tiles, row_tiles = triton.cdiv(batch, shape.queries), triton.cdiv(rows, shape.rows)
    tiles = _tiles(query_tiles * row_tiles)
    _scan[(query_tiles, triton.cdiv(row_tiles, tiles))](
        work.queries16, table16, params, work.filter_of, work.bits, work.floors, work.words, work.n_words,
        batch, rows, words, capacity, **widths, QUERIES=shape.queries, ROWS=shape.rows, TILES=tiles,
        num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip
    _expand[(triton.cdiv(capacity, _EXPAND_WORDS), batch)](
        work.words, work.n_words, work.candidates, work.n_candidates, capacity, WORDS=_EXPAND_WORDS
    )


def _widths(dim: int) -> dict[str, int]:
    """DIM, DIM padded for the tensor cores, and how much of it is multiplied at a time."""
    step = min(_DIM_STEP, max(16, triton.next_power_of_2(dim)))
    return {"DIM": dim, "DIM_PADDED": triton.cdiv(dim, step) * step, "DIM_STEP": step}


def _tiles(total: int) -> int:
    """How many row tiles a program scans: a power of two, so that few kernels are compiled."""
    return 1 << max(0, min(4, (total // _PROGRAMS).bit_length() - 1))


def _floor_warps(sample: int) -> int:
    return max(1, min(16, sample // (32 * 32)))


_SCAN_TYPES = "*fp16 *fp16 *i64 *i32 *i32 *fp32 *i64 *i32 i32 i32 i32 i32"
AOT = [
    Compiled(
        _prepare, "*fp32 *i32 *fp32 *i64 *fp16 *i32 *fp64 *fp64 *i32 *i32 i32", {"DIM": 64, "DIM_PADDED": 64}
    ),
    Compiled(_pack, "*u8 *i64 *i32 i32 i32", {"WORDS": _PACK_WORDS}),
    *(
        Compiled(
            _sample, "*fp16 *fp16 *i64 *i32 *i32 *fp32 i32 i32 i32",
            {"SAMPLE": 16_384, **_widths(64), "QUERIES": queries, "ROWS": _SAMPLE_BLOCK}, label=str(queries),
        )
        for queries in (16, 64)
    ),
    Compiled(_floor, "*fp32 *i64 *fp64 *fp32 i32 i32", {"SAMPLE": 16_384}, num_warps=_floor_warps(16_384)),
    *(
        Compiled(
            _scan, _SCAN_TYPES, {**_widths(dim), "QUERIES": shape.queries, "ROWS": shape.rows, "TILES": 8},
            shape.num_warps, shape.num_stages, label=f"{shape.queries}×{shape.rows}, D={dim}",
        )
        for shape, dim in [*((shape, 64) for shape in SCAN_SHAPES.values()), (SCAN_SHAPES[128], 256)]
    ),
    Compiled(_expand, "*i64 *i32 *i32 *i32 i32", {"WORDS": _EXPAND_WORDS}),
]  # fmt: skip
