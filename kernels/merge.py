"""Union of candidate lists per query, with the set of sources that proposed each candidate."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray


@njit(cache=True, nogil=True)
def _merge(
    slots: NDArray[np.int32],
    sources: NDArray[np.uint32],
    offsets: NDArray[np.int64],
    excluded: NDArray[np.int32],
    excluded_offsets: NDArray[np.int64],
    n_slots: int,
    width: int,
) -> tuple[NDArray[np.int32], NDArray[np.uint32], NDArray[np.int32], NDArray[np.int32]]:
    b_rows = offsets.shape[0] - 1
    out = np.full((b_rows, width), -1, dtype=np.int32)
    bits = np.zeros((b_rows, width), dtype=np.uint32)
    counts = np.zeros(b_rows, dtype=np.int32)
    dropped = np.zeros(b_rows, dtype=np.int32)
    # place[s] = 1 + column of slot s in this row; stamped so that it needs no clearing per row
    stamp = np.full(n_slots, -1, dtype=np.int32)
    place = np.zeros(n_slots, dtype=np.int32)
    for b in range(b_rows):
        for e in range(excluded_offsets[b], excluded_offsets[b + 1]):
            if excluded[e] >= 0:
                stamp[excluded[e]] = b
                place[excluded[e]] = -1
        n = 0
        for i in range(offsets[b], offsets[b + 1]):
            s = slots[i]
            if s < 0:
                continue
            if stamp[s] == b:
                if place[s] < 0:
                    if place[s] == -1:
                        dropped[b] += 1
                        place[s] = -2  # counted once
                else:
                    bits[b, place[s]] |= sources[i]
                continue
            stamp[s] = b
            place[s] = n
            out[b, n] = s
            bits[b, n] = sources[i]
            n += 1
        counts[b] = n
    return out, bits, counts, dropped


def merge_candidates(
    slots: NDArray[np.int32],
    sources: NDArray[np.uint32],
    offsets: NDArray[np.int64],
    excluded: NDArray[np.int32],
    excluded_offsets: NDArray[np.int64],
    n_slots: int,
) -> tuple[NDArray[np.int32], NDArray[np.uint32], NDArray[np.int32], NDArray[np.int32]]:
    """Merges each query's proposals, in order of first proposal, dropping what the query excludes.

    Args:
        slots: int32[T], proposals of all queries one after the other, -1 ignored; sources uint32[T]
            says who proposed each (one bit per source).
        offsets: int64[B + 1], query b's proposals are offsets[b] to offsets[b + 1].
        excluded: int32[X] slots (-1: unknown stream, ignored), ragged by ``excluded_offsets`` int64[B + 1].
        n_slots: all slots are below it.

    Returns:
        slots int32[B, K] padded with -1, sources uint32[B, K], counts int32[B], and how many distinct
        proposals were dropped as excluded int32[B]. kept + dropped = distinct proposals.

    Raises:
        ValueError: a slot is out of range, or the offsets do not fit.

    Cost: O(T + X), 8 bytes of scratch per table row.
    """
    if slots.shape != sources.shape or (len(offsets) and int(offsets[-1]) != len(slots)):
        raise ValueError("offsets: must end at the number of slots, and sources must match slots")
    if len(excluded_offsets) != len(offsets) or int(excluded_offsets[-1]) != len(excluded):
        raise ValueError("excluded_offsets: must match offsets and end at the number of excluded slots")
    for name, column in (("slots", slots), ("excluded", excluded)):
        if len(column) and int(column.max()) >= n_slots:
            raise ValueError(f"{name}: below {n_slots} allowed, got {int(column.max())}")
    width = int(np.diff(offsets).max()) if len(offsets) > 1 else 0
    out, bits, counts, dropped = _merge(slots, sources, offsets, excluded, excluded_offsets, n_slots, max(width, 1))
    used = max(1, int(counts.max(initial=0)))
    return np.ascontiguousarray(out[:, :used]), np.ascontiguousarray(bits[:, :used]), counts, dropped


def merge_candidates_reference(
    slots: NDArray[np.int32],
    sources: NDArray[np.uint32],
    offsets: NDArray[np.int64],
    excluded: NDArray[np.int32],
    excluded_offsets: NDArray[np.int64],
    n_slots: int,
) -> tuple[NDArray[np.int32], NDArray[np.uint32], NDArray[np.int32], NDArray[np.int32]]:
    """Plain version of `merge_candidates`."""
    rows: list[dict[int, int]] = []
    dropped = []
    for b in range(len(offsets) - 1):
        gone = set(excluded[excluded_offsets[b] : excluded_offsets[b + 1]].tolist())
        merged: dict[int, int] = {}
        for i in range(offsets[b], offsets[b + 1]):
            if slots[i] >= 0:
                merged[int(slots[i])] = merged.get(int(slots[i]), 0) | int(sources[i])
        dropped.append(len(merged.keys() & gone))
        rows.append({s: bits for s, bits in merged.items() if s not in gone})
    width = max([1, *(len(r) for r in rows)])
    out = np.full((len(rows), width), -1, np.int32)
    out_bits = np.zeros((len(rows), width), np.uint32)
    for b, row in enumerate(rows):
        out[b, : len(row)] = list(row.keys())
        out_bits[b, : len(row)] = list(row.values())
    return out, out_bits, np.array([len(r) for r in rows], np.int32), np.array(dropped, np.int32)
