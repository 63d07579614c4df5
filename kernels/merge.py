"""Union of candidate lists per query, with the set of sources that proposed each candidate."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kernels.checks import require_array

_EXCLUDED, _COUNTED = 0xFFFF_FFFF, 0xFFFF_FFFE
"""Places of slots that a request excludes; of those that were proposed to it all the same, and counted."""


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


class Seen:
    """Which slots a request has met, without clearing anything between requests: scratch of 8 bytes per table row.

    Owned by one thread. ``marks`` int64[n_slots]: number of the request in the high half, place in the low one.
    """

    def __init__(self, n_slots: int) -> None:
        self.marks = np.zeros(n_slots, np.int64)
        self._next = 1

    def take(self, requests: int) -> int:
        """The first of so many request numbers that no mark bears."""
        if self._next + requests >= _MOST_REQUESTS:
            self.marks[:] = 0
            self._next = 1
        first = self._next
        self._next += requests
        return first


_MOST_REQUESTS = 1 << 31


class Views(NamedTuple):
    """Candidate lists that requests share: list v is slots[starts[v] : starts[v + 1]], without duplicates.

    slots int32[T], sources uint32[T], starts int64[V + 1].
    """

    slots: NDArray[np.int32]
    sources: NDArray[np.uint32]
    starts: NDArray[np.int64]


class Proposed(NamedTuple):
    """What S sources propose to each request: slots[offsets[s, b] : offsets[s, b + 1]], attributed to bits[s].

    slots int32[U], offsets int64[S, B + 1], bits uint32[S].
    """

    slots: NDArray[np.int32]
    offsets: NDArray[np.int64]
    bits: NDArray[np.uint32]


@njit(cache=True, nogil=True)
def _merge_proposals(
    view_slots: NDArray[np.int32],
    view_sources: NDArray[np.uint32],
    view_starts: NDArray[np.int64],
    view_of: NDArray[np.int32],
    view_limits: NDArray[np.int32],
    proposed: NDArray[np.int32],
    offsets: NDArray[np.int64],
    bits: NDArray[np.uint32],
    excluded: NDArray[np.int32],
    excluded_offsets: NDArray[np.int64],
    marks: NDArray[np.int64],
    first_request: int,
) -> tuple[int, NDArray[np.int32], NDArray[np.uint32], NDArray[np.int32], NDArray[np.int32]]:
    rows, n_slots = view_of.shape[0], marks.shape[0]
    width = 1
    for b in range(rows):
        length = np.int64(view_limits[b])
        if view_of[b] < 0 or view_of[b] + 1 >= view_starts.shape[0]:
            return 1, np.empty((0, 0), np.int32), np.empty((0, 0), np.uint32), view_of, view_of
        if length < 0 or length > view_starts[view_of[b] + 1] - view_starts[view_of[b]]:
            return 2, np.empty((0, 0), np.int32), np.empty((0, 0), np.uint32), view_of, view_of
        for s in range(bits.shape[0]):
            length += offsets[s, b + 1] - offsets[s, b]
        width = max(width, int(length))
    out = np.empty((rows, width), np.int32)
    out_sources = np.empty((rows, width), np.uint32)
    counts = np.zeros(rows, np.int32)
    dropped = np.zeros(rows, np.int32)
    problem = 0
    longest = 1
    for b in range(rows):
        mine = np.int64(first_request + b) << 32
        n = gone = 0
        for e in range(excluded_offsets[b], excluded_offsets[b + 1]):
            slot = excluded[e]
            if slot >= n_slots:
                problem = 4
            elif slot >= 0:
                marks[slot] = mine | _EXCLUDED
        first = view_starts[view_of[b]]
        for i in range(first, first + view_limits[b]):
            slot = view_slots[i]
            if slot < 0 or slot >= n_slots:
                problem = 3
                continue
            if marks[slot] == mine | _EXCLUDED:
                marks[slot] = mine | _COUNTED
                gone += 1
                continue
            marks[slot] = mine | n
            out[b, n] = slot
            out_sources[b, n] = view_sources[i]
            n += 1
        for s in range(bits.shape[0]):
            for i in range(offsets[s, b], offsets[s, b + 1]):
                slot = proposed[i]
                if slot < 0:
                    continue
                if slot >= n_slots:
                    problem = 3
                    continue
                mark = marks[slot]
                if mark < mine:
                    marks[slot] = mine | n
                    out[b, n] = slot
                    out_sources[b, n] = bits[s]
                    n += 1
                elif mark == mine | _EXCLUDED:
                    marks[slot] = mine | _COUNTED
                    gone += 1
                elif mark != mine | _COUNTED:
                    out_sources[b, mark - mine] |= bits[s]
        for i in range(n, width):
            out[b, i] = -1
            out_sources[b, i] = 0
        counts[b], dropped[b] = n, gone
        longest = max(longest, n)
    if longest < width:
        narrow = np.empty((rows, longest), np.int32)
        narrow_sources = np.empty((rows, longest), np.uint32)
        for b in range(rows):
            for i in range(longest):
                narrow[b, i] = out[b, i]
                narrow_sources[b, i] = out_sources[b, i]
        return problem, narrow, narrow_sources, counts, dropped
    return problem, out, out_sources, counts, dropped


def merge_proposals(
    views: Views,
    view_of: NDArray[np.int32],
    view_limits: NDArray[np.int32],
    proposed: Proposed,
    excluded: NDArray[np.int32],
    excluded_offsets: NDArray[np.int64],
    seen: Seen,
) -> tuple[NDArray[np.int32], NDArray[np.uint32], NDArray[np.int32], NDArray[np.int32]]:
    """What `merge_candidates` returns for the head of each request's view, then the proposals of each source.

    Args:
        view_of: int32[B], the list of ``views`` that request b takes its first ``view_limits`` int32[B] slots of.
        proposed: -1 among the slots is ignored.
        excluded: int32[X] slots (-1: unknown stream, ignored), ragged by ``excluded_offsets`` int64[B + 1].
        seen: scratch; all slots are below its length.

    Raises:
        ValueError: an argument has the wrong dtype, shape or range; the message names it.

    Cost: O(proposals), 8 bytes written per proposal and 8 bytes of scratch touched for each.
    """
    batch = len(view_of)
    require_array("views", views.slots, np.int32, (None,))
    require_array("views", views.sources, np.uint32, views.slots.shape)
    require_array("views", views.starts, np.int64, (None,))
    require_array("view_of", view_of, np.int32, (None,))
    require_array("view_limits", view_limits, np.int32, (batch,))
    require_array("proposed", proposed.slots, np.int32, (None,))
    require_array("proposed", proposed.bits, np.uint32, (None,))
    require_array("proposed", proposed.offsets, np.int64, (len(proposed.bits), batch + 1))
    require_array("excluded", excluded, np.int32, (None,))
    require_array("excluded_offsets", excluded_offsets, np.int64, (batch + 1,))
    problem, *merged = _merge_proposals(
        *views, view_of, view_limits, *proposed, excluded, excluded_offsets, seen.marks, seen.take(batch)
    )
    if problem:
        raise ValueError(
            {
                1: f"view_of: 0 to {len(views.starts) - 2} allowed",
                2: "view_limits: 0 to the length of the view allowed",
                3: f"slots: below {len(seen.marks)} allowed",
                4: f"excluded: below {len(seen.marks)} allowed",
            }[problem]
        )
    slots, sources, counts, dropped = merged
    return slots, sources, counts, dropped


def merge_proposals_reference(
    views: Views,
    view_of: NDArray[np.int32],
    view_limits: NDArray[np.int32],
    proposed: Proposed,
    excluded: NDArray[np.int32],
    excluded_offsets: NDArray[np.int64],
    seen: Seen,
) -> tuple[NDArray[np.int32], NDArray[np.uint32], NDArray[np.int32], NDArray[np.int32]]:
    """Plain version of `merge_proposals`: everything in one list."""
    slots, sources, lengths = [np.zeros(0, np.int32)], [np.zeros(0, np.uint32)], []
    for b, (v, limit) in enumerate(zip(view_of, view_limits, strict=True)):
        head = slice(views.starts[v], views.starts[v] + limit)
        parts = [(views.slots[head], views.sources[head])]
        for offsets, bit in zip(proposed.offsets, proposed.bits, strict=True):
            mine = proposed.slots[offsets[b] : offsets[b + 1]]
            parts.append((mine, np.full(len(mine), bit, np.uint32)))
        slots += [part for part, _ in parts]
        sources += [bits for _, bits in parts]
        lengths.append(sum(len(part) for part, _ in parts))
    return merge_candidates_reference(
        np.concatenate(slots), np.concatenate(sources), np.cumsum([0, *lengths]), excluded, excluded_offsets,
        len(seen.marks),
    )  # fmt: skip
