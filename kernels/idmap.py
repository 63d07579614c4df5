"""Stream id → slot, for whole columns of ids at once (open addressing, linear probing).

Ids travel as zero-padded bytes: ``ids uint8[n, 64]`` with ``lengths uint8[n]`` (1..64).
The map stores slots only; an id's bytes live in the table's own ``ids`` column, so there
is one copy of every id. Deleting leaves no tombstone: the probe run is closed up.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit
from numpy.typing import NDArray

ID_BYTES = 64
_EMPTY = np.int32(-1)


def pack_ids(ids: Sequence[bytes]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Packs byte strings into ``(uint8[n, 64], lengths uint8[n])``.

    Raises:
        ValueError: an id is longer than 64 bytes.
    """
    n = len(ids)
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=n)
    if n and int(lengths.max()) > ID_BYTES:
        raise ValueError(f"ids: at most {ID_BYTES} bytes each, found {int(lengths.max())}")
    packed = np.array(ids, dtype=f"S{ID_BYTES}").view(np.uint8).reshape(n, ID_BYTES)
    return packed, lengths.astype(np.uint8)


def id_words(ids: NDArray[np.uint8]) -> NDArray[np.int64]:
    """ids uint8[n, 64] as eight signed words each, int64[n, 8], whose order word by word is that of the bytes."""
    words = np.ascontiguousarray(ids).view(">u8").astype(np.uint64)
    return (words ^ np.uint64(1 << 63)).view(np.int64)


FNV_BASIS, FNV_PRIME = np.uint64(14695981039346656037), np.uint64(1099511628211)


@njit(cache=True, nogil=True)
def finish_hash(h: np.uint64) -> np.uint64:
    """The splitmix64 finaliser: FNV's low bits alone cluster."""
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


@njit(cache=True, nogil=True)
def _hash_row(row: NDArray[np.uint8], length: int) -> np.uint64:
    """FNV-1a over the bytes, finished."""
    h = FNV_BASIS
    for i in range(length):
        h = (h ^ np.uint64(row[i])) * FNV_PRIME
    return finish_hash(h)


@njit(cache=True, nogil=True)
def _hash_ids(ids: NDArray[np.uint8], lengths: NDArray[np.uint8]) -> NDArray[np.uint64]:
    out = np.zeros(ids.shape[0], dtype=np.uint64)
    for i in range(ids.shape[0]):
        if lengths[i] > 0:
            out[i] = max(_hash_row(ids[i], lengths[i]), np.uint64(1))
    return out


def hash_ids(ids: NDArray[np.uint8], lengths: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """64-bit hashes of ids; 0 for an empty id and only for it. uint8[n, 64], uint8[n] → uint64[n]."""
    _check_ids(ids, lengths)
    return np.asarray(_hash_ids(ids, lengths))


@njit(cache=True, nogil=True)
def _lookup(
    buckets: NDArray[np.int32],
    table_ids: NDArray[np.uint8],
    table_lengths: NDArray[np.uint8],
    ids: NDArray[np.uint8],
    lengths: NDArray[np.uint8],
) -> NDArray[np.int32]:
    # Hashes and compares in place, as `_hash_row` does: a call that takes an array would cost more than its work.
    mask = np.uint64(buckets.shape[0] - 1)
    out = np.full(ids.shape[0], _EMPTY, dtype=np.int32)
    words, table_words = ids.view(np.uint64), table_ids.view(np.uint64)
    for i in range(ids.shape[0]):
        h, length = FNV_BASIS, lengths[i]
        for k in range(length):
            h = (h ^ np.uint64(ids[i, k])) * FNV_PRIME
        at = finish_hash(h) & mask
        n_words = (np.int64(length) + 7) >> 3
        while buckets[at] != _EMPTY:
            slot = buckets[at]
            if table_lengths[slot] == length:
                k = 0
                while k < n_words and words[i, k] == table_words[slot, k]:  # ids are padded with zeros
                    k += 1
                if k == n_words:
                    out[i] = slot
                    break
            at = (at + np.uint64(1)) & mask
    return out


@njit(cache=True, nogil=True)
def _lookup_hashes(
    buckets: NDArray[np.int32],
    table_ids: NDArray[np.uint8],
    table_lengths: NDArray[np.uint8],
    hashes: NDArray[np.uint64],
) -> NDArray[np.int32]:
    mask = np.uint64(buckets.shape[0] - 1)
    out = np.full(hashes.shape[0], _EMPTY, dtype=np.int32)
    for i in range(hashes.shape[0]):
        at = hashes[i] & mask
        while hashes[i] != 0 and buckets[at] != _EMPTY:
            slot = buckets[at]
            if _hash_row(table_ids[slot], table_lengths[slot]) == hashes[i]:
                out[i] = slot
                break
            at = (at + np.uint64(1)) & mask
    return out


@njit(cache=True, nogil=True)
def _insert(
    buckets: NDArray[np.int32],
    table_ids: NDArray[np.uint8],
    table_lengths: NDArray[np.uint8],
    slot: int,
) -> None:
    mask = np.uint64(buckets.shape[0] - 1)
    at = _hash_row(table_ids[slot], table_lengths[slot]) & mask
    while buckets[at] != _EMPTY:
        at = (at + np.uint64(1)) & mask
    buckets[at] = slot


@njit(cache=True, nogil=True)
def _insert_all(
    buckets: NDArray[np.int32],
    table_ids: NDArray[np.uint8],
    table_lengths: NDArray[np.uint8],
    rows: int,
) -> None:
    for slot in range(rows):
        if table_lengths[slot] > 0:
            _insert(buckets, table_ids, table_lengths, slot)


@njit(cache=True, nogil=True)
def _delete(
    buckets: NDArray[np.int32],
    table_ids: NDArray[np.uint8],
    table_lengths: NDArray[np.uint8],
    slot: int,
) -> bool:
    mask = np.uint64(buckets.shape[0] - 1)
    hole = _hash_row(table_ids[slot], table_lengths[slot]) & mask
    while buckets[hole] != slot:
        if buckets[hole] == _EMPTY:
            return False
        hole = (hole + np.uint64(1)) & mask
    # Backward-shift deletion: pull later members of the run into the hole when
    # their home bucket does not lie between the hole and where they stand.
    at = hole
    while True:
        buckets[hole] = _EMPTY
        while True:
            at = (at + np.uint64(1)) & mask
            if buckets[at] == _EMPTY:
                return True
            home = _hash_row(table_ids[buckets[at]], table_lengths[buckets[at]]) & mask
            if ((at - home) & mask) >= ((at - hole) & mask):
                break
        buckets[hole] = buckets[at]
        hole = at


class IdMap:
    """Maps ids to slots of a table of ``capacity`` rows whose id columns it is given.

    Args:
        table_ids: uint8[C, 64], owned by the table; row s is the id of slot s.
        table_lengths: uint8[C].
    """

    def __init__(self, table_ids: NDArray[np.uint8], table_lengths: NDArray[np.uint8]) -> None:
        _check_ids(table_ids, table_lengths)
        size = 1 << max(4, (2 * table_ids.shape[0] - 1).bit_length())  # load factor at most 1/2
        self._buckets = np.full(size, _EMPTY, dtype=np.int32)
        self._ids = table_ids
        self._lengths = table_lengths

    def lookup(self, ids: NDArray[np.uint8], lengths: NDArray[np.uint8]) -> NDArray[np.int32]:
        """Slots int32[n] of ids uint8[n, 64]; -1 where unknown. O(n) expected, no Python per id."""
        _check_ids(ids, lengths)
        return np.asarray(_lookup(self._buckets, self._ids, self._lengths, np.ascontiguousarray(ids), lengths))

    def lookup_hashes(self, hashes: NDArray[np.uint64]) -> NDArray[np.int32]:
        """Slots int32[n] of ids given by `hash_ids` of them, uint64[n]; -1 where unknown, and for 0."""
        return np.asarray(_lookup_hashes(self._buckets, self._ids, self._lengths, hashes))

    def insert(self, slot: int) -> None:
        """Adds ``slot``, whose id already stands in the table's columns and is not in the map."""
        _insert(self._buckets, self._ids, self._lengths, slot)

    def insert_all(self, rows: int) -> None:
        """Adds every slot below ``rows`` that has an id, to an empty map."""
        _insert_all(self._buckets, self._ids, self._lengths, rows)

    def delete(self, slot: int) -> None:
        """Removes ``slot``; its id must still stand in the table's columns.

        Raises:
            KeyError: the slot is not in the map.
        """
        if not _delete(self._buckets, self._ids, self._lengths, slot):
            raise KeyError(f"slot {slot} is not in the id map")


def _check_ids(ids: NDArray[np.uint8], lengths: NDArray[np.uint8]) -> None:
    if ids.ndim != 2 or ids.shape[1] != ID_BYTES or ids.dtype != np.uint8:
        raise ValueError(f"ids: uint8[n, {ID_BYTES}] wanted, got {ids.dtype}{list(ids.shape)}")
    if lengths.shape != (ids.shape[0],) or lengths.dtype != np.uint8:
        raise ValueError(f"lengths: uint8[{ids.shape[0]}] wanted, got {lengths.dtype}{list(lengths.shape)}")
