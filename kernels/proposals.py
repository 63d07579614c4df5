"""What the sources propose to each query, put one after the other: the way into `kernels.merge`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kernels.checks import require_array

Ragged = tuple[NDArray[np.int32], NDArray[np.int64]]
"""Slots int32[T] of all queries, and offsets int64[B + 1]: query b's are offsets[b] to offsets[b + 1]."""


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
    batch = len(view_of)
    require_array("view_of", view_of, np.int32, (None,))
    require_array("limits", limits, np.int32, (batch,))
    if batch and not (int(view_of.min()) >= 0 and int(view_of.max()) < len(views)):
        raise ValueError(f"view_of: must lie in [0, {len(views)})")
    for slots, offsets in found:
        require_array("found", slots, np.int32, (None,))
        require_array("found", offsets, np.int64, (batch + 1,))
        if int(offsets[0]) != 0 or int(offsets[-1]) != len(slots) or (np.diff(offsets) < 0).any():
            raise ValueError("found: offsets must rise from 0 to the number of slots")
    lengths = np.array([len(slots) for slots, _ in views], np.int64)
    takes = np.maximum(np.minimum(limits, lengths[view_of]), 0) if batch else np.zeros(0, np.int64)
    offsets = np.zeros(batch + 1, np.int64)
    np.cumsum(takes, out=offsets[1:])
    for _, of_source in found:
        offsets += of_source
    slots, sources = np.empty(int(offsets[-1]), np.int32), np.empty(int(offsets[-1]), np.uint32)
    if batch == 0:
        return slots, sources, offsets
    heads = offsets[:-1].copy()
    _copy_views(
        np.concatenate([view[0] for view in views]), np.concatenate([view[1] for view in views]),
        np.cumsum(lengths) - lengths, view_of, takes, heads, slots, sources,
    )  # fmt: skip
    for (proposed, of_source), bit in zip(found, bits, strict=True):
        if len(proposed):
            _copy_found(proposed, of_source, np.uint32(bit), heads, slots, sources)
    return slots, sources, offsets


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
def _copy_views(
    view_slots: NDArray[np.int32],
    view_sources: NDArray[np.uint32],
    starts: NDArray[np.int64],
    view_of: NDArray[np.int32],
    takes: NDArray[np.int64],
    heads: NDArray[np.int64],
    slots: NDArray[np.int32],
    sources: NDArray[np.uint32],
) -> None:
    """Writes each query's share of its view at its head, and moves the head behind it."""
    for b in range(view_of.shape[0]):
        start, head = starts[view_of[b]], heads[b]
        for i in range(takes[b]):
            slots[head + i] = view_slots[start + i]
            sources[head + i] = view_sources[start + i]
        heads[b] = head + takes[b]


@njit(cache=True, nogil=True)
def _copy_found(
    proposed: NDArray[np.int32],
    offsets: NDArray[np.int64],
    bit: np.uint32,
    heads: NDArray[np.int64],
    slots: NDArray[np.int32],
    sources: NDArray[np.uint32],
) -> None:
    for b in range(heads.shape[0]):
        head, start = heads[b], offsets[b]
        n = offsets[b + 1] - start
        for i in range(n):
            slots[head + i] = proposed[start + i]
            sources[head + i] = bit
        heads[b] = head + n
