"""Exact masked top-k by inner product, most rows ruled out by an int8 copy of them.

`kernels.topk` says what the answer is; this gives the same, bit for bit. A pass over the integers finds the rows whose
certified upper bound (`kernels.int8_rows`) reaches a floor, some twice k of them, and only those are scored
canonically. The floor comes from sampled rows and is proven afterwards: no row that was ruled out can be among the k
best unless the k-th found is below the floor. Where it is, that query is searched again from no floor at all. Bounds
that rule out nothing (equal rows, queries without length) cost time, never exactness.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kernels.int8_rows import WORD_ROWS, Int8Columns, Int8Queries, Int8Rows, quantise_queries
from kernels.topk import NO_HIT, check_search, order_key, take_best
from kernels.vectors import (
    BLOCK_QUERIES,
    GROUP_ROWS,
    approximate_scores,
    canonical_inner,
    count_reaching,
    largest_of,
    lowest_bit,
    prefetch_lines,
    reach_floor,
    reach_floors,
)

COMPILED_WITH = "3f7b9307ca6072f2"  # vectors.py and topk.py; see the former
_BLOCK_WORDS = 32  # 2,048 rows: what is found among them is scored while they are in the second-level cache
_WORD_GROUPS = WORD_ROWS // GROUP_ROWS
_ALONE = 2  # as few queries as this are taken one by one: a block costs the same, however empty
_LINE = 4 * GROUP_ROWS  # bytes of sixteen float32, int32, or four dimensions of sixteen rows
_BLOCK_BYTES = 4 * BLOCK_QUERIES  # of a float32 or four dimensions of each query in a block
_MIN_SAMPLE_GROUPS, _MAX_SAMPLE_GROUPS, _SAMPLED = 64, 256, 8
"""One group in eight is sampled, as long as that is not too few or too many."""
_MIN_KEPT, _ALL_KEPT = 1024, 4096
_INFINITY = np.float32(np.inf)
_BEYOND = np.float32(2.0**100)
"""More than scores over the query's length can differ by."""


class Found(NamedTuple):
    """``slots`` int32[B, k] and ``scores`` float32[B, k] as `kernels.topk.masked_topk` returns them; ``again``: how
    many queries had to be searched a second time."""

    slots: NDArray[np.int32]
    scores: NDArray[np.float32]
    again: int


def masked_topk_int8(
    queries: NDArray[np.float32],
    table: NDArray[np.float32],
    rows: Int8Rows,
    eligible: NDArray[np.bool_],
    mask_of: NDArray[np.int32],
    k: int,
    packed: NDArray[np.uint64] | None = None,
) -> Found:
    """What `kernels.topk.masked_topk_reference` returns, bit for bit, for rows that ``rows`` has a copy of.

    Args:
        rows: of at least N rows; row i of ``table`` as it is now was the last written there as slot i.
        queries, table, eligible, mask_of, k: as for `kernels.topk.masked_topk`.
        packed: what `pack_masks` makes of ``eligible``, from whoever searches under the same masks again and again.

    Raises:
        ValueError: an argument has the wrong dtype, shape or range; the message names it.

    Cost: 2·B·N·D operations on bytes, reading (D + 16)·N bytes once; then some 2·k rows per query scored in float64.
    """
    check_search(queries, table, eligible, mask_of, k)
    batch, n = queries.shape[0], table.shape[0]
    if rows.dim != queries.shape[1] or rows.capacity < n:
        raise ValueError(f"rows: at least {n} of {queries.shape[1]} wanted, got {rows.capacity} of {rows.dim}")
    slots = np.full((batch, k), -1, np.int32)
    scores = np.full((batch, k), -np.inf, np.float32)
    keep = min(k, n)
    if batch == 0 or keep == 0:
        return Found(slots, scores, 0)
    small, words = quantise_queries(queries), pack_masks(eligible) if packed is None else packed
    floors = _sampled_floors(small, rows.columns, words, mask_of, n, keep)
    _search(queries, small, table, rows.columns, words, mask_of, keep, floors, slots, scores)
    with np.errstate(invalid="ignore"):  # no floor, no length: -inf·0
        proven = np.isneginf(floors) | (scores[:, keep - 1] >= floors * small.lengths)
    again = np.flatnonzero(~proven)
    if again.size:
        part = queries[again]
        found_slots = np.full((again.size, k), -1, np.int32)
        found_scores = np.full((again.size, k), -np.inf, np.float32)
        _search(
            part, quantise_queries(part), table, rows.columns, words, mask_of[again], keep,
            np.full(again.size, -np.inf, np.float32), found_slots, found_scores,
        )  # fmt: skip
        slots[again], scores[again] = found_slots, found_scores
    return Found(slots, scores, int(again.size))


def pack_masks(eligible: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """bool[M, N] as bits, uint64[M, W], row i at bit i % 64 of word i // 64."""
    masks, n = eligible.shape
    words = np.zeros((masks, -(-n // WORD_ROWS)), "<u8")
    packed = np.packbits(eligible, axis=1, bitorder="little")
    words.view(np.uint8)[:, : packed.shape[1]] = packed
    return words


def _sampled_floors(
    small: Int8Queries,
    columns: Int8Columns,
    words: NDArray[np.uint64],
    mask_of: NDArray[np.int32],
    n: int,
    keep: int,
) -> NDArray[np.float32]:
    """float32[B]: a score over the query's length that, very probably, ``keep`` eligible rows reach; -inf: none."""
    floors = np.full(len(mask_of), -np.inf, np.float32)
    groups = n // GROUP_ROWS
    stride = max(1, groups // max(_MIN_SAMPLE_GROUPS, min(groups // _SAMPLED, _MAX_SAMPLE_GROUPS)))
    expected = keep / stride
    rank = int(expected + 3.0 * expected**0.5 + 3.0)  # three standard deviations: a second search is rare
    # A small table needs no floor; it is asked for nothing all the same, so that a warm-up on one compiles everything.
    sample = np.arange(stride // 2, groups if stride > 2 and n > 4 * keep else 0, stride)
    scores = np.empty((BLOCK_QUERIES, len(sample) * GROUP_ROWS), np.float32)
    _sample(small, columns, words, mask_of, sample, rank, scores, np.zeros(BLOCK_QUERIES, np.uint16), floors)
    return floors


def _search(
    queries: NDArray[np.float32],
    small: Int8Queries,
    table: NDArray[np.float32],
    columns: Int8Columns,
    words: NDArray[np.uint64],
    mask_of: NDArray[np.int32],
    keep: int,
    floors: NDArray[np.float32],
    slots: NDArray[np.int32],
    scores: NDArray[np.float32],
) -> None:
    """Fills the first ``keep`` places with the best of the rows that reach the floors."""
    batch, n = len(queries), len(table)
    keys = np.empty((batch, n if n <= _ALL_KEPT else max(3 * keep, _MIN_KEPT)), np.uint64)
    running = np.full(len(small.words) * BLOCK_QUERIES, np.inf, np.float32)
    running[:batch] = floors
    reached = np.empty((BLOCK_QUERIES, _BLOCK_WORDS), "<u8")
    most = _scan(queries.astype(np.float64), small, table, columns, words, mask_of, keep, running, reached, keys)
    take_best(keys, most, slots, scores)


@njit(cache=True, nogil=True)
def _sample(
    small: Int8Queries,
    columns: Int8Columns,
    words: NDArray[np.uint64],
    mask_of: NDArray[np.int32],
    sample: NDArray[np.int64],
    rank: int,
    scores: NDArray[np.float32],
    masks: NDArray[np.uint16],
    floors: NDArray[np.float32],
) -> None:
    """Floors that ``rank`` eligible rows of the groups in ``sample`` reach; left as they are where there are fewer."""
    packed_at, bias_at, scale_at = (
        columns.packed.ctypes.data, columns.bias.ctypes.data, columns.scale.ctypes.data,
    )  # fmt: skip
    words_at, factors_at = small.words.ctypes.data, small.factors.ctypes.data
    scores_at, masks_at, stride = scores.ctypes.data, masks.ctypes.data, 4 * scores.shape[1]
    steps = columns.packed.shape[1]
    for block in range(small.words.shape[0]):
        first = block * BLOCK_QUERIES
        last = min(first + BLOCK_QUERIES, mask_of.shape[0])
        for i in range(sample.shape[0]):
            g = sample[i]
            shift = np.uint64((g % _WORD_GROUPS) * GROUP_ROWS)
            for b in range(first, last):
                masks[b - first] = words[mask_of[b], g // _WORD_GROUPS] >> shift
            approximate_scores(
                packed_at + g * steps * _LINE, steps, bias_at + g * _LINE, scale_at + g * _LINE,
                words_at + block * steps * _BLOCK_BYTES, factors_at + block * 2 * _BLOCK_BYTES, masks_at,
                scores_at + i * _LINE, stride,
            )  # fmt: skip
        for b in range(first, last):
            if small.lengths[b] > 0.0:
                floors[b] = _reached_by(scores_at + (b - first) * stride, sample.shape[0], rank)


@njit(cache=True, nogil=True)
def _reached_by(values: int, sixteens: int, rank: int) -> np.float32:
    """A number that ``rank`` of the float32[16·sixteens] at an address reach, and few more; -inf if there is none.

    By halving an interval and counting: a thousand values are counted in a twentieth of a microsecond.
    """
    most = largest_of(values, sixteens)
    width = np.float32(2.0**-4) * abs(most) + np.float32(2.0**-40)
    while True:
        least = most - width
        reached = count_reaching(values, sixteens, least)
        if reached >= rank:
            break
        width *= np.float32(2.0)
        if not width < _BEYOND:
            return -_INFINITY
    for _ in range(16):
        if reached <= rank + rank // 8:
            break
        middle = np.float32(0.5) * (least + most)
        count = count_reaching(values, sixteens, middle)
        if count >= rank:
            least, reached = middle, count
        else:
            most = middle
    return least


@njit(cache=True, nogil=True)
def _scan(
    queries: NDArray[np.float64],
    small: Int8Queries,
    table: NDArray[np.float32],
    columns: Int8Columns,
    words: NDArray[np.uint64],
    mask_of: NDArray[np.int32],
    keep: int,
    floors: NDArray[np.float32],
    reached: NDArray[np.uint64],
    keys: NDArray[np.uint64],
) -> int:
    """Scores canonically the eligible rows whose bound reaches the floor; keeps their keys, ended by NO_HIT.

    Returns the most that a query has. floors: one per place of every block. reached: scratch. A full line of ``keys``
    is cut to its best ``keep`` and the floor raised to the worst of them. Rows come in the order of slots, so a later
    row that only equals the k-th loses the tie: dropping it is exact.
    """
    queries_at, table_at = queries.ctypes.data, table.ctypes.data
    batch, dim, n_words = mask_of.shape[0], table.shape[1], words.shape[1]
    counts = np.zeros(batch, np.int64)
    worst = np.full(batch, -np.inf, np.float32)
    hits = np.empty(_BLOCK_WORDS * WORD_ROWS, np.int64)
    for begin in range(0, n_words, _BLOCK_WORDS):
        end = min(begin + _BLOCK_WORDS, n_words)
        for block in range(small.words.shape[0]):
            first = block * BLOCK_QUERIES
            last = min(first + BLOCK_QUERIES, batch)
            _mark(small, columns, floors, block, last - first, begin, end, reached)
            for b in range(first, last):
                query_at, count, least = queries_at + b * 8 * dim, counts[b], worst[b]
                found = _list(reached[b - first], words[mask_of[b]], begin, end, table, hits)
                for slot in hits[:found]:
                    exact = canonical_inner(query_at, table_at + slot * 4 * dim, dim)
                    if not least < exact < _INFINITY:
                        continue
                    if count == keys.shape[1]:
                        best = np.sort(keys[b])[:keep]
                        keys[b, :keep] = best
                        count = keep
                        lowest = np.int64(best[keep - 1] & np.uint64(0xFFFF_FFFF))
                        least = canonical_inner(query_at, table_at + lowest * 4 * dim, dim)
                        if small.lengths[b] > 0.0:
                            floors[b] = max(floors[b], np.float32(least / small.lengths[b]))
                        if not least < exact:
                            continue
                    keys[b, count] = order_key(exact, slot)
                    count += 1
                counts[b], worst[b] = count, least
    most = counts.max()
    for b in range(batch):
        keys[b, counts[b] : most] = NO_HIT
    return most


@njit(cache=True, nogil=True)
def _mark(
    small: Int8Queries,
    columns: Int8Columns,
    floors: NDArray[np.float32],
    block: int,
    n_queries: int,
    begin: int,
    end: int,
    reached: NDArray[np.uint64],
) -> None:
    """Sets the bits, in ``reached``, of the rows of words ``begin`` to ``end`` that may reach a block's floors."""
    steps = columns.packed.shape[1]
    packed_at, bias_at, scale_at = columns.packed.ctypes.data, columns.bias.ctypes.data, columns.scale.ctypes.data
    radius_at, norm_at, reached_at = columns.radius.ctypes.data, columns.norm.ctypes.data, reached.ctypes.data
    words_at = small.words.ctypes.data + block * steps * _BLOCK_BYTES
    factors_at = small.factors.ctypes.data + block * 2 * _BLOCK_BYTES
    floors_at = floors.ctypes.data + block * _BLOCK_BYTES
    if n_queries <= _ALONE:
        for j in range(n_queries):
            for w in range(end - begin):
                g = _WORD_GROUPS * (begin + w)
                reach_floor(
                    packed_at + g * steps * _LINE, steps, bias_at + g * _LINE, scale_at + g * _LINE,
                    radius_at + g * _LINE, norm_at + g * _LINE, words_at + 4 * j, factors_at + 4 * j, floors_at + 4 * j,
                    reached_at + 8 * (_BLOCK_WORDS * j + w), 0,
                )  # fmt: skip
        return
    for pair in range(_WORD_GROUPS // 2 * (end - begin)):
        g = _WORD_GROUPS * begin + 2 * pair
        reach_floors(
            packed_at + g * steps * _LINE, steps, bias_at + g * _LINE, scale_at + g * _LINE,
            radius_at + g * _LINE, norm_at + g * _LINE, words_at, factors_at, floors_at, reached_at + 4 * pair,
            8 * _BLOCK_WORDS,
        )  # fmt: skip


@njit(cache=True, nogil=True)
def _list(
    reached: NDArray[np.uint64],
    mask: NDArray[np.uint64],
    begin: int,
    end: int,
    table: NDArray[np.float32],
    hits: NDArray[np.int64],
) -> int:
    """Writes the slots that are set in both into ``hits``, ascending; returns how many.

    Listed first and scored then: the processor fetches rows while it guesses branches.
    """
    table_at, row_bytes, row_lines = table.ctypes.data, 4 * table.shape[1], -(-4 * table.shape[1] // 64)
    found = 0
    for w in range(begin, end):
        word = reached[w - begin] & mask[w]
        while word:
            slot = w * WORD_ROWS + lowest_bit(word)
            word &= word - np.uint64(1)
            prefetch_lines(table_at + slot * row_bytes, row_lines)
            hits[found] = slot
            found += 1
    return found
