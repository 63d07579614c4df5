"""Candidates in the order in which a slate is chosen: utility descending, then id."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

OK, BAD_LIMIT, BAD_EXPLORE_SLOTS, BAD_CREATOR_CAP, BAD_CATEGORY_CAP, BAD_DIVERSITY, BAD_SLOT = range(7)

PADDED = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
"""Key of no candidate: behind all others."""
HALF, LOW = np.uint64(32), np.uint64(0xFFFF_FFFF)
_SIGN, _NOT_SIGN = np.uint64(0x8000_0000), np.uint64(0x7FFF_FFFF)
_EXPONENT, _MINUS_INFINITY = np.uint64(0x7F80_0000), np.uint64(0xFF80_0000)


@njit(cache=True, nogil=True)
def rank_candidates(
    slots: NDArray[np.int32],
    utility: NDArray[np.float32],
    n_rows: int,
    limits: NDArray[np.int32],
    explore_slots: NDArray[np.int32],
    creator_caps: NDArray[np.int32],
    category_caps: NDArray[np.int32],
    diversity: NDArray[np.float32],
    keys: NDArray[np.uint64],
) -> int:
    """Fills ``keys`` uint64[B, K]: ascending ones are utility descending, then candidate, which the low half holds.

    Returns the first problem with the values, or OK.
    """
    bits = utility.view(np.uint32)
    problem = OK
    for b in range(slots.shape[0]):
        lowest, highest = np.int32(0), np.int32(-1)
        for i in range(slots.shape[1]):
            lowest, highest = min(lowest, slots[b, i]), max(highest, slots[b, i])
            value = np.uint64(bits[b, i])
            if value & _EXPONENT == _EXPONENT:
                value = _MINUS_INFINITY
            elif value == _SIGN:  # -0.0 equals 0.0
                value = np.uint64(0)
            descending = value if value & _SIGN else value ^ _NOT_SIGN
            key = (descending << HALF) | np.uint64(i)
            keys[b, i] = key if slots[b, i] >= 0 else PADDED
        if lowest < -1 or highest >= n_rows:
            problem = BAD_SLOT
    for b in range(limits.shape[0]):
        if not (diversity[b] >= 0 and diversity[b] < np.inf):
            problem = BAD_DIVERSITY
        if category_caps[b] < 1:
            problem = BAD_CATEGORY_CAP
        if creator_caps[b] < 1:
            problem = BAD_CREATOR_CAP
        if explore_slots[b] < 0:
            problem = BAD_EXPLORE_SLOTS
        if limits[b] < 0:
            problem = BAD_LIMIT
    return problem


@njit(cache=True, nogil=True, forceinline=True)
def id_before(ids: NDArray[np.uint8], one: int, other: int) -> bool:
    for i in range(ids.shape[1]):
        if ids[one, i] != ids[other, i]:
            return bool(ids[one, i] < ids[other, i])
    return False


@njit(cache=True, nogil=True, forceinline=True)
def order_ties_by_id(
    order: NDArray[np.int32],
    worth: NDArray[np.float32],
    slots: NDArray[np.int32],
    b: int,
    ids: NDArray[np.uint8],
    n: int,
) -> None:
    """Binary insertion within each run of equal worth."""
    start = 0
    for p in range(1, n):
        if worth[p] != worth[start]:
            start = p
            continue
        low, high, moved = start, p, order[p]
        while low < high:
            middle = (low + high) // 2
            if id_before(ids, slots[b, moved], slots[b, order[middle]]):
                high = middle
            else:
                low = middle + 1
        for i in range(p, low, -1):
            order[i] = order[i - 1]
        order[low] = moved
