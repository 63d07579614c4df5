"""What a model viewer x stream is asked about a batch, and what its answer adds: one pass over the candidates each."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kernels.checks import require_array
from kernels.vectors import prefetch_lines

COMPILED_WITH = "f45d6cc95d0dae3c"  # vectors.py; see there
_AHEAD = 8
"""Rows that are asked of memory before they are copied."""
_LINE_BYTES = 64


class StreamRows(NamedTuple):
    """What is known of C streams, as columns of the table: values float32[C, F] and states uint8[C, F] of features,
    embedding float32[C, D], codes int64[C, 3]. All contiguous."""

    values: NDArray[np.float32]
    states: NDArray[np.uint8]
    embedding: NDArray[np.float32]
    codes: NDArray[np.int64]


class Gathered(NamedTuple):
    """Of R rows: values float32[R, F], missing float32[R, F] (1 where the state is not 0), embedding float32[R, D],
    codes int64[R, 3]."""

    values: NDArray[np.float32]
    missing: NDArray[np.float32]
    embedding: NDArray[np.float32]
    codes: NDArray[np.int64]


def best_of_rows(
    utility: NDArray[np.float32], slots: NDArray[np.int32], asked: NDArray[np.bool_], most: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows int64[R] and columns int64[R], ascending, of at most ``most`` candidates of each row that is asked about:
    those of the highest utility, of equal ones the earlier; what is not finite is the lowest.

    Args:
        utility: float32[B, K]. slots: int32[B, K], negative ones are padding. asked: bool[B]. most: >= 0.

    Raises:
        ValueError: an argument has the wrong dtype, shape or range; the message names it.
    """
    _check_best(utility, slots, asked, most)
    rows, columns = np.empty(slots.size, np.int64), np.empty(slots.size, np.int64)
    n = _best_of_rows(utility, slots, asked, most, rows, columns, np.empty(slots.shape[1], np.float32))
    return rows[:n], columns[:n]


def best_of_rows_reference(
    utility: NDArray[np.float32], slots: NDArray[np.int32], asked: NDArray[np.bool_], most: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What :func:`best_of_rows` does."""
    _check_best(utility, slots, asked, most)
    wanted = (slots >= 0) & asked[:, None]
    worth = np.where(np.isfinite(utility), utility, -np.inf)
    order = np.lexsort((np.broadcast_to(np.arange(slots.shape[1]), slots.shape), -worth, ~wanted), axis=1)
    among = np.zeros(slots.shape, np.bool_)
    np.put_along_axis(among, order[:, :most], True, axis=1)
    rows, columns = np.nonzero(among & wanted)
    return rows, columns


def gather_streams(slots: NDArray[np.int32], of: StreamRows) -> Gathered:
    """Copies the rows of streams ``slots`` int32[R], each in [0, C).

    Raises:
        ValueError: an argument has the wrong dtype, shape or range; the message names it.

    Cost: reads and writes 9·F + 4·D + 24 bytes per row, from anywhere in memory.
    """
    _check_gather(slots, of)
    n, features, dim = len(slots), of.values.shape[1], of.embedding.shape[1]
    into = Gathered(
        np.empty((n, features), np.float32), np.empty((n, features), np.float32), np.empty((n, dim), np.float32),
        np.empty((n, of.codes.shape[1]), np.int64),
    )  # fmt: skip
    if not _gather(slots, *of, *into):
        raise ValueError(f"slots: must be in [0, {len(of.values)})")
    return into


def gather_streams_reference(slots: NDArray[np.int32], of: StreamRows) -> Gathered:
    """What :func:`gather_streams` does."""
    _check_gather(slots, of)
    if len(slots) and not 0 <= slots.min() <= slots.max() < len(of.values):
        raise ValueError(f"slots: must be in [0, {len(of.values)})")
    missing = (of.states[slots] != 0).astype(np.float32)
    return Gathered(of.values[slots], missing, of.embedding[slots], of.codes[slots])


def add_heads(
    utility: NDArray[np.float32],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    heads: NDArray[np.float32],
    weights: NDArray[np.float32],
) -> NDArray[np.float32]:
    """``utility`` float32[B, K], and at each (row, column) the heads' weighted sum on top.

    Args:
        rows, columns: int64[R], each pair once. heads: float32[R, H]. weights: float32[B, H].

    Summed in float32 in the order of the heads, so that equal heads give equal sums.

    Raises:
        ValueError: an argument has the wrong dtype, shape or range; the message names it.
    """
    _check_add(utility, rows, columns, heads, weights)
    total = utility.copy()
    if not _add_heads(total, rows, columns, heads, weights):
        raise ValueError(f"rows, columns: must be within {utility.shape}")
    return total


def add_heads_reference(
    utility: NDArray[np.float32],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    heads: NDArray[np.float32],
    weights: NDArray[np.float32],
) -> NDArray[np.float32]:
    """What :func:`add_heads` does."""
    _check_add(utility, rows, columns, heads, weights)
    if len(rows) and not (
        0 <= rows.min() <= rows.max() < utility.shape[0] and 0 <= columns.min() <= columns.max() < utility.shape[1]
    ):
        raise ValueError(f"rows, columns: must be within {utility.shape}")
    value = np.zeros(len(heads), np.float32)
    for head in range(heads.shape[1]):
        value += weights[rows, head] * heads[:, head]
    total = utility.copy()
    total[rows, columns] += value
    return total


def _check_best(utility: NDArray[np.float32], slots: NDArray[np.int32], asked: NDArray[np.bool_], most: int) -> None:
    require_array("slots", slots, np.int32, (None, None))
    require_array("utility", utility, np.float32, slots.shape)
    require_array("asked", asked, np.bool_, slots.shape[:1])
    if most < 0:
        raise ValueError(f"most: must be at least 0, got {most}")


def _check_gather(slots: NDArray[np.int32], of: StreamRows) -> None:
    require_array("slots", slots, np.int32, (None,))
    require_array("values", of.values, np.float32, (None, None))
    require_array("states", of.states, np.uint8, of.values.shape)
    require_array("embedding", of.embedding, np.float32, (len(of.values), None))
    require_array("codes", of.codes, np.int64, (len(of.values), None))


def _check_add(
    utility: NDArray[np.float32],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    heads: NDArray[np.float32],
    weights: NDArray[np.float32],
) -> None:
    require_array("utility", utility, np.float32, (None, None))
    require_array("rows", rows, np.int64, (None,))
    require_array("columns", columns, np.int64, rows.shape)
    require_array("heads", heads, np.float32, (len(rows), None))
    require_array("weights", weights, np.float32, (len(utility), heads.shape[1]))


@njit(cache=True, nogil=True)
def _best_of_rows(
    utility: NDArray[np.float32],
    slots: NDArray[np.int32],
    asked: NDArray[np.bool_],
    most: int,
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    worth: NDArray[np.float32],
) -> int:
    """Fills rows and columns; returns how many. worth: float32[K], scratch."""
    n = 0
    for b in range(slots.shape[0]):
        if not asked[b]:
            continue
        there = 0
        for k in range(slots.shape[1]):
            if slots[b, k] >= 0:
                worth[there] = utility[b, k] if np.isfinite(utility[b, k]) else np.float32(-np.inf)
                there += 1
        least, equal = np.float32(-np.inf), there
        if there > most:
            if most == 0:
                continue
            least = np.partition(worth[:there], there - most)[there - most]
            equal = most  # places for those that are just enough
            for i in range(there):
                equal -= int(worth[i] > least)
        at = 0
        for k in range(slots.shape[1]):
            if slots[b, k] < 0:
                continue
            if worth[at] > least or (worth[at] == least and equal > 0):
                equal -= int(worth[at] == least)
                rows[n], columns[n] = b, k
                n += 1
            at += 1
    return n


@njit(cache=True, nogil=True)
def _gather(
    slots: NDArray[np.int32],
    values: NDArray[np.float32],
    states: NDArray[np.uint8],
    embedding: NDArray[np.float32],
    codes: NDArray[np.int64],
    values_to: NDArray[np.float32],
    missing_to: NDArray[np.float32],
    embedding_to: NDArray[np.float32],
    codes_to: NDArray[np.int64],
) -> bool:
    """Fills the last four; False when a slot is out of range."""
    n = len(slots)
    for slot in slots:
        if slot < 0 or slot >= len(values):
            return False
    values_bytes, states_bytes, embedding_bytes = 4 * values.shape[1], states.shape[1], 4 * embedding.shape[1]
    values_at, states_at, embedding_at = values.ctypes.data, states.ctypes.data, embedding.ctypes.data
    for i in range(n):
        if i + _AHEAD < n:
            ahead = np.int64(slots[i + _AHEAD])
            prefetch_lines(values_at + ahead * values_bytes, values_bytes // _LINE_BYTES + 1)
            prefetch_lines(states_at + ahead * states_bytes, states_bytes // _LINE_BYTES + 1)
            prefetch_lines(embedding_at + ahead * embedding_bytes, embedding_bytes // _LINE_BYTES + 1)
        slot = slots[i]
        for f in range(values.shape[1]):
            values_to[i, f] = values[slot, f]
            missing_to[i, f] = np.float32(states[slot, f] != 0)
        for d in range(embedding.shape[1]):
            embedding_to[i, d] = embedding[slot, d]
        for c in range(codes.shape[1]):
            codes_to[i, c] = codes[slot, c]
    return True


@njit(cache=True, nogil=True)
def _add_heads(
    total: NDArray[np.float32],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    heads: NDArray[np.float32],
    weights: NDArray[np.float32],
) -> bool:
    """False when a place is out of range."""
    for i in range(len(rows)):
        row, column = rows[i], columns[i]
        if row < 0 or row >= total.shape[0] or column < 0 or column >= total.shape[1]:
            return False
        value = np.float32(0.0)
        for head in range(heads.shape[1]):
            value += weights[row, head] * heads[i, head]
        total[row, column] += value
    return True
