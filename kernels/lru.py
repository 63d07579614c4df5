"""A bounded table of 64-bit keys: key → row, and when there is no room the least recently used one gives way.

Rows are handed out in ascending order until all are in use, so that memory that was never used stays untouched. Open
addressing with linear probing, as in `kernels.idmap`; recency is a linked list through the rows. Everything is a
function of the sequence of keys that were taken.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

NEWEST, OLDEST, ROWS = 0, 1, 2
"""Places of ``Lru.ends``."""


class Lru(NamedTuple):
    """The columns of such a table of N rows; changed in place by whoever takes keys.

    key uint64[N] (0: the row was never used); newer, older int32[N]: the rows used just after and just before it, -1
    at the ends; ends int32[3]: newest and oldest row (-1: none), rows in use. buckets int32[2^m]: 1 + row, 0 empty.
    """

    key: NDArray[np.uint64]
    newer: NDArray[np.int32]
    older: NDArray[np.int32]
    ends: NDArray[np.int32]
    buckets: NDArray[np.int32]


def allocate_lru(capacity: int) -> Lru:
    """An empty table of ``capacity`` rows. Zeroed memory only, so rows that are never used cost nothing."""
    size = 1 << max(4, (2 * capacity - 1).bit_length())  # load factor at most 1/2
    return Lru(
        np.zeros(capacity, np.uint64), np.zeros(capacity, np.int32), np.zeros(capacity, np.int32),
        np.array([-1, -1, 0], np.int32), np.zeros(size, np.int32),
    )  # fmt: skip


@njit(cache=True, nogil=True)
def mixed(h: np.uint64) -> np.uint64:
    """The splitmix64 finaliser: every bit of the result depends on every bit of ``h``."""
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


@njit(cache=True, nogil=True)
def find(lru: Lru, key: np.uint64) -> int:
    """Row of a key, -1 when it is not there. Changes nothing."""
    mask = np.uint64(lru.buckets.shape[0] - 1)
    at = mixed(key) & mask
    while lru.buckets[at] != 0:
        row = lru.buckets[at] - 1
        if lru.key[row] == key:
            return row
        at = (at + np.uint64(1)) & mask
    return -1


@njit(cache=True, nogil=True)
def _insert(lru: Lru, row: int) -> None:
    mask = np.uint64(lru.buckets.shape[0] - 1)
    at = mixed(lru.key[row]) & mask
    while lru.buckets[at] != 0:
        at = (at + np.uint64(1)) & mask
    lru.buckets[at] = row + 1


@njit(cache=True, nogil=True)
def _delete(lru: Lru, row: int) -> None:
    """Takes a row's key, which is there, out of the buckets; the probe run is closed up."""
    mask = np.uint64(lru.buckets.shape[0] - 1)
    hole = mixed(lru.key[row]) & mask
    while lru.buckets[hole] != row + 1:
        hole = (hole + np.uint64(1)) & mask
    at = hole
    while True:
        lru.buckets[hole] = 0
        while True:
            at = (at + np.uint64(1)) & mask
            if lru.buckets[at] == 0:
                return
            home = mixed(lru.key[lru.buckets[at] - 1]) & mask
            if ((at - home) & mask) >= ((at - hole) & mask):
                break
        lru.buckets[hole] = lru.buckets[at]
        hole = at


@njit(cache=True, nogil=True)
def _unlink(lru: Lru, row: int) -> None:
    newer, older = lru.newer[row], lru.older[row]
    if newer >= 0:
        lru.older[newer] = older
    else:
        lru.ends[NEWEST] = older
    if older >= 0:
        lru.newer[older] = newer
    else:
        lru.ends[OLDEST] = newer


@njit(cache=True, nogil=True)
def _link_newest(lru: Lru, row: int) -> None:
    newest = lru.ends[NEWEST]
    lru.newer[row], lru.older[row] = -1, newest
    if newest >= 0:
        lru.newer[newest] = row
    else:
        lru.ends[OLDEST] = row
    lru.ends[NEWEST] = row


@njit(cache=True, nogil=True)
def take(lru: Lru, key: np.uint64) -> tuple[int, bool]:
    """Row of a key (not 0), which is now the newest; True when it was not there and whatever the row held is gone."""
    row = find(lru, key)
    if row >= 0:
        if lru.ends[NEWEST] != row:
            _unlink(lru, row)
            _link_newest(lru, row)
        return row, False
    if lru.ends[ROWS] < lru.key.shape[0]:
        row = lru.ends[ROWS]
        lru.ends[ROWS] += 1
    else:
        row = lru.ends[OLDEST]
        _delete(lru, row)
        _unlink(lru, row)
    lru.key[row] = key
    _insert(lru, row)
    _link_newest(lru, row)
    return row, True


@njit(cache=True, nogil=True)
def _insert_all(lru: Lru) -> None:
    for row in range(lru.ends[ROWS]):
        _insert(lru, row)


@njit(cache=True, nogil=True)
def _is_list(lru: Lru) -> bool:
    rows = lru.ends[ROWS]
    at, newer, n = lru.ends[NEWEST], -1, 0
    while at >= 0 and n < rows:
        if at >= rows or lru.newer[at] != newer:
            return False
        newer, at = at, lru.older[at]
        n += 1
    return at == -1 and n == rows and lru.ends[OLDEST] == newer


def restore_lru(lru: Lru, key: NDArray[np.uint64], newer: NDArray[np.int32], older: NDArray[np.int32]) -> None:
    """Puts R rows, as they were read from a table of any size, into an empty one of at least R rows.

    Raises:
        ValueError: the rows are no such table: a key 0 or twice, or links that are no list of all rows.
    """
    rows = len(key)
    if lru.ends[ROWS] or rows > len(lru.key):
        raise ValueError(f"key: an empty table and at most {len(lru.key)} rows wanted, got {rows}")
    if len(newer) != rows or len(older) != rows or (key == 0).any() or len(np.unique(key)) != rows:
        raise ValueError("key: every row once and with its links wanted")
    newest, oldest = np.flatnonzero(newer == -1), np.flatnonzero(older == -1)
    lru.key[:rows], lru.newer[:rows], lru.older[:rows] = key, newer, older
    lru.ends[:] = (int(newest[0]) if len(newest) else -1, int(oldest[0]) if len(oldest) else -1, rows)
    if not _is_list(lru):
        lru.ends[:] = (-1, -1, 0)
        lru.key[:rows] = 0
        raise ValueError("newer, older: no list of all rows")
    _insert_all(lru)
