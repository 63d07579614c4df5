"""Rows and queries as small integers, with a proof of how far off they are.

A row x becomes x̂ = scale·n, n int8, and of what was lost the length is kept: radius >= |x - x̂|. With a query q that
became q̂ likewise, Cauchy and Schwarz say

    |q·x - q̂·x̂| <= |q|·|x - x̂| + |q - q̂|·|x̂|

so that q̂·x̂, an integer sum, bounds q·x from both sides, for this row and this query. Everything is divided by |q|; what
rounding may add on the way is allowed for in the factor of |x̂|, more than ten times over.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kernels.checks import require_array
from kernels.lines import zeros_in_lines
from kernels.vectors import BLOCK_QUERIES, GROUP_ROWS

LARGEST = 127
WORD_ROWS = 64
_SLACK = 2.0**-18
"""Of |x̂|·|q|: float32 evaluates the bound with a dozen roundings of 2**-24, the canonical score has one more."""
_ROUND_UP = 1.0 + 2.0**-20
_SMALLEST, _GREATEST = 1e-15, 1e15
"""Longest components that are turned into integers: squares and products of such stay inside float32."""


class Int8Columns(NamedTuple):
    """Rows in groups of sixteen; see `kernels.vectors` for packed and bias.

    scale, radius, norm float32[G, 16]: of x̂; radius -inf: the row is not finite, so nothing finds it; inf: too short or
    too long for integers, so nothing is known of its scores.
    """

    packed: NDArray[np.int8]
    bias: NDArray[np.int32]
    scale: NDArray[np.float32]
    radius: NDArray[np.float32]
    norm: NDArray[np.float32]


class Int8Queries(NamedTuple):
    """B queries in blocks of eight, the last one filled up with zeros.

    words uint8[blocks, steps, 8, 4] as `kernels.vectors` has them; factors float32[blocks, 2, 8]: scale of q̂ and
    |q - q̂| with the slack, both divided by |q|; lengths float64[B]: |q|. A query without a usable length has the
    factors 0 and inf: nothing is known of its scores.
    """

    words: NDArray[np.uint8]
    factors: NDArray[np.float32]
    lengths: NDArray[np.float64]


class Int8Rows:
    """The int8 copy of ``capacity`` rows of ``dim`` float32, all zero at first.

    Takes D + 16 bytes per row, D and rows rounded up to 4 and 64. Owned by one thread.
    """

    def __init__(self, capacity: int, dim: int) -> None:
        if capacity < 1 or dim < 1:
            raise ValueError(f"capacity, dim: must be at least 1, got {capacity}, {dim}")
        groups = -(-capacity // WORD_ROWS) * (WORD_ROWS // GROUP_ROWS)
        self.capacity, self.dim = capacity, dim
        self.columns = Int8Columns(
            zeros_in_lines((groups, -(-dim // 4), GROUP_ROWS, 4), np.int8),
            zeros_in_lines((groups, GROUP_ROWS), np.int32),
            *(zeros_in_lines((groups, GROUP_ROWS), np.float32) for _ in range(3)),
        )

    def write(self, slots: NDArray[np.int32], table: NDArray[np.float32]) -> None:
        """Takes over rows ``slots`` int32[n] of table float32[N, D], N <= capacity.

        Raises ValueError naming the argument. Cost: about 10·D + D bytes per row.
        """
        require_array("slots", slots, np.int32, (None,))
        require_array("table", table, np.float32, (None, self.dim))
        if slots.size and not (slots.min() >= 0 and slots.max() < min(self.capacity, table.shape[0])):
            raise ValueError(f"slots: 0 to {min(self.capacity, table.shape[0]) - 1} allowed")
        _write(slots, table, self.columns)


def quantise_queries(queries: NDArray[np.float32]) -> Int8Queries:
    """Queries float32[B, D] as integers. Raises ValueError naming the argument."""
    require_array("queries", queries, np.float32, (None, None))
    batch, dim = queries.shape
    blocks = -(-batch // BLOCK_QUERIES)
    out = Int8Queries(
        np.full((blocks, -(-dim // 4), BLOCK_QUERIES, 4), LARGEST + 1, np.uint8),
        np.zeros((blocks, 2, BLOCK_QUERIES), np.float32),
        np.zeros(batch, np.float64),
    )
    _quantise(queries, out)
    return out


@njit(cache=True, nogil=True)
def _scale_of(row: NDArray[np.float32]) -> tuple[np.float32, np.float32]:
    """Largest |component| (NaN if one is no number) and the scale: 0 where the row cannot be made integers."""
    most = np.float32(0.0)
    for value in row:
        size = abs(value)
        if not size <= most:
            most = size
            if most != most:
                break
    scale = np.float32(most / np.float32(LARGEST)) if _SMALLEST <= most <= _GREATEST else np.float32(0.0)
    return most, scale


@njit(cache=True, nogil=True)
def _write(slots: NDArray[np.int32], table: NDArray[np.float32], columns: Int8Columns) -> None:
    packed, bias, scales, radii, norms = columns
    dim = table.shape[1]
    for slot in slots:
        row = table[slot]
        g, lane = slot // GROUP_ROWS, slot % GROUP_ROWS
        most, scale = _scale_of(row)
        lost, kept, total = 0.0, 0.0, 0
        for d in range(dim):
            number = 0
            if scale > 0.0:
                number = int(np.rint(row[d] / scale))
                number = max(-LARGEST, min(LARGEST, number))
                near = np.float64(scale) * number
                lost += (row[d] - near) ** 2
                kept += near * near
            packed[g, d // 4, lane, d % 4] = number
            total += number
        bias[g, lane] = -(LARGEST + 1) * total
        scales[g, lane] = scale
        norms[g, lane] = np.sqrt(kept) * _ROUND_UP
        if not most < np.inf:
            radii[g, lane] = -np.inf
        elif scale == 0.0 and most > 0.0:
            radii[g, lane] = np.inf
        else:
            radii[g, lane] = np.sqrt(lost) * _ROUND_UP


@njit(cache=True, nogil=True)
def _quantise(queries: NDArray[np.float32], out: Int8Queries) -> None:
    words, factors, lengths = out
    for b in range(queries.shape[0]):
        block, j = b // BLOCK_QUERIES, b % BLOCK_QUERIES
        query = queries[b]
        _, scale = _scale_of(query)
        if scale == 0.0:
            factors[block, 1, j] = np.inf
            continue
        lost, length = 0.0, 0.0
        for d in range(query.shape[0]):
            number = int(np.rint(query[d] / scale))
            number = max(-LARGEST, min(LARGEST, number))
            words[block, d // 4, j, d % 4] = number + LARGEST + 1
            lost += (query[d] - np.float64(scale) * number) ** 2
            length += np.float64(query[d]) ** 2
        lengths[b] = np.sqrt(length)
        factors[block, 0, j] = scale / lengths[b]
        factors[block, 1, j] = (np.sqrt(lost) / lengths[b] + _SLACK) * _ROUND_UP
