"""What the sources propose to each query, put one after the other: the way into `kernels.merge`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kernels.checks import require_array

Ragged = tuple[NDArray[np.int32], NDArray[np.int64]]
"""Slots int32[T] of all queries, and offsets int64[B + 1]: query b's are offsets[b] to offsets[b + 1]."""
_VIEW, _OFFSETS = 1, 2


def join_proposals(
    views: Sequence[tuple[NDArray[np.int32], NDArray[np.uint32]]],
    view_of: NDArray[np.int32],
    limits: NDArray[np.int32],
    found: Sequence[Ragged],
    bits: Sequence[int],
) -> tuple[NDArray[np.int32], NDArray[np.uint32], NDArray[np.int64]]:
    """Every query's share of its view, then what each source found for it.

    Args:
        views: (slots int32[m], sources uint32[m]) each. view_of: int32[B], query b has views[view_of[b]].
        limits: int32[B], how much of its view a query takes at most.
        found: per source, with its bit in ``bits``.

    Returns:
        slots int32[T], sources uint32[T], offsets int64[B + 1].

    Raises:
        ValueError: an argument has the wrong dtype or shape, or view_of or offsets do not fit.

    Cost: 8 bytes written per proposal.
    """
    require_array("view_of", view_of, np.int32, (None,))
    require_array("limits", limits, np.int32, (len(view_of),))
    for slots, offsets in found:
        require_array("found", slots, np.int32, (None,))
        require_array("found", offsets, np.int64, (len(view_of) + 1,))
    view_slots, view_sources = (_joined([view[i] for view in views]) for i in (0, 1))
    starts = np.array([0, *accumulate(len(slots) for slots, _ in views)], np.int64)
    of_source = np.array([offsets for _, offsets in found], np.int64).reshape(len(found), len(view_of) + 1)
    ends = np.array([len(slots) for slots, _ in found], np.int64)
    fault, joined, sources, joined_offsets = _join(
        view_slots, view_sources, starts, view_of, limits, _joined([slots for slots, _ in found]), of_source, ends,
        np.array(bits, np.uint32),
    )  # fmt: skip
    if fault == _VIEW:
        raise ValueError(f"view_of: must lie in [0, {len(views)})")
    if fault == _OFFSETS:
        raise ValueError("found: offsets must rise from 0 to the number of slots")
    return joined, sources, joined_offsets


def _joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def join_proposals_reference(
    views: Sequence[tuple[NDArray[np.int32], NDArray[np.uint32]]],
    view_of: NDArray[np.int32],
    limits: NDArray[np.int32],
    found: Sequence[Ragged],
    bits: Sequence[int],
) -> tuple[NDArray[np.int32], NDArray[np.uint32], NDArray[np.int64]]:
    """Plain version of `join_proposals`."""
    slots: list[int] = []
    sources: list[int] = []
    offsets = [0]
    for b, v in enumerate(view_of):
        slots += views[v][0][: max(0, limits[b])].tolist()
        sources += views[v][1][: max(0, limits[b])].tolist()
        for (proposed, of_source), bit in zip(found, bits, strict=True):
            mine = proposed[of_source[b] : of_source[b + 1]].tolist()
            slots += mine
            sources += [bit] * len(mine)
        offsets.append(len(slots))
    return np.array(slots, np.int32), np.array(sources, np.uint32), np.array(offsets, np.int64)


@njit(cache=True, nogil=True)
def _join(
    view_slots: NDArray[np.int32],
    view_sources: NDArray[np.uint32],
    starts: NDArray[np.int64],
    view_of: NDArray[np.int32],
    limits: NDArray[np.int32],
    found: NDArray[np.int32],
    of_source: NDArray[np.int64],
    ends: NDArray[np.int64],
    bits: NDArray[np.uint32],
) -> tuple[int, NDArray[np.int32], NDArray[np.uint32], NDArray[np.int64]]:
    """(what does not fit, slots, sources, offsets); all sources' slots one after the other in ``found``."""
    batch, n_sources = view_of.shape[0], of_source.shape[0]
    offsets = np.zeros(batch + 1, np.int64)
    fault = 0
    for b in range(batch):
        v = view_of[b]
        if not 0 <= v < starts.shape[0] - 1:
            fault = _VIEW
            break
        offsets[b + 1] = max(0, min(np.int64(limits[b]), starts[v + 1] - starts[v]))
    for s in range(n_sources):
        if of_source[s, 0] != 0 or of_source[s, batch] != ends[s]:
            fault = _OFFSETS
        for b in range(batch):
            if of_source[s, b + 1] < of_source[s, b]:
                fault = _OFFSETS
            offsets[b + 1] += of_source[s, b + 1] - of_source[s, b]
    total = 0 if fault else offsets.sum()
    slots, sources = np.empty(total, np.int32), np.empty(total, np.uint32)
    if fault:
        return fault, slots, sources, offsets
    n = 0
    for b in range(batch):
        start = starts[view_of[b]]
        for i in range(start, start + max(0, min(np.int64(limits[b]), starts[view_of[b] + 1] - start))):
            slots[n] = view_slots[i]
            sources[n] = view_sources[i]
            n += 1
        first = 0
        for s in range(n_sources):
            bit = bits[s]
            for i in range(first + of_source[s, b], first + of_source[s, b + 1]):
                slots[n] = found[i]
                sources[n] = bit
                n += 1
            first += ends[s]
        offsets[b + 1] = n
    return 0, slots, sources, offsets
