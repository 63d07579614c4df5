"""Counts of a ranked batch for the metrics: one pass over its arrays."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kernels.checks import require_array

MOST_SOURCES, OUTCOMES, DROPS = 32, 7, 9


class Counts(NamedTuple):
    """proposed, served: int64[32], candidates and shown streams per source bit. outcomes int64[7] by
    `kernels.slate.Outcome`, drops int64[9] by `kernels.eligibility.Drop`. totals int64[3]: streams shown, how many of
    these were drawn by chance, and candidates that requests exclude."""

    proposed: NDArray[np.int64]
    served: NDArray[np.int64]
    outcomes: NDArray[np.int64]
    drops: NDArray[np.int64]
    totals: NDArray[np.int64]


@njit(cache=True, nogil=True)
def _count(
    proposed_sources: NDArray[np.uint32],
    outcome: NDArray[np.uint8],
    pick_slots: NDArray[np.int32],
    drops: NDArray[np.uint8],
    slots: NDArray[np.int32],
    sources: NDArray[np.uint32],
    exploration: NDArray[np.float32],
    excluded: NDArray[np.int32],
    counts: NDArray[np.int64],
) -> None:
    for b in range(proposed_sources.shape[0]):
        used = np.uint32(0)
        for i in range(proposed_sources.shape[1]):
            used |= proposed_sources[b, i]
        for bit in range(MOST_SOURCES):
            if used >> np.uint32(bit) & np.uint32(1):
                total = 0
                for i in range(proposed_sources.shape[1]):
                    total += int((proposed_sources[b, i] >> np.uint32(bit)) & np.uint32(1))
                counts[bit] += total
    for b in range(outcome.shape[0]):
        for code in range(OUTCOMES):
            total = 0
            for i in range(outcome.shape[1]):
                total += int(outcome[b, i] == code)
            counts[2 * MOST_SOURCES + code] += total
    for b in range(pick_slots.shape[0]):
        for i in range(pick_slots.shape[1]):
            if pick_slots[b, i] >= 0:
                counts[2 * MOST_SOURCES + OUTCOMES + drops[b, i]] += 1
    shown = by_chance = 0
    for b in range(slots.shape[0]):
        for i in range(slots.shape[1]):
            if slots[b, i] < 0:
                continue
            shown += 1
            by_chance += exploration[b, i] > 0
            left = np.int64(sources[b, i])
            bit = 0
            while left:
                counts[MOST_SOURCES + bit] += left & 1
                left >>= 1
                bit += 1
    counts[2 * MOST_SOURCES + OUTCOMES + DROPS] = shown
    counts[2 * MOST_SOURCES + OUTCOMES + DROPS + 1] = by_chance
    for b in range(excluded.shape[0]):
        counts[2 * MOST_SOURCES + OUTCOMES + DROPS + 2] += excluded[b]


def count_batch(
    proposed_sources: NDArray[np.uint32],
    outcome: NDArray[np.uint8],
    pick_slots: NDArray[np.int32],
    drops: NDArray[np.uint8],
    slots: NDArray[np.int32],
    sources: NDArray[np.uint32],
    exploration: NDArray[np.float32],
    excluded: NDArray[np.int32],
) -> Counts:
    """Counts of a batch.

    Args:
        proposed_sources: uint32[B, K], 0 in padding; outcome: uint8[B, K], below 7. Both [0, 0] where nothing was
            proposed.
        pick_slots: int32[B, P], -1: no pick. drops: uint8[B, P], below 9.
        slots: int32[B, L], -1: nothing shown. sources: uint32[B, L]. exploration: float32[B, L].
        excluded: int32[B], candidates dropped because the request excludes them.

    Raises:
        ValueError: an argument has the wrong dtype or shape; the message names it.

    Cost: about 6 passes over 5 bytes per candidate, in vectors.
    """
    _check(proposed_sources, outcome, pick_slots, drops, slots, sources, exploration, excluded)
    counts = np.zeros(2 * MOST_SOURCES + OUTCOMES + DROPS + 3, np.int64)
    _count(proposed_sources, outcome, pick_slots, drops, slots, sources, exploration, excluded, counts)
    first, second, third = 2 * MOST_SOURCES, 2 * MOST_SOURCES + OUTCOMES, 2 * MOST_SOURCES + OUTCOMES + DROPS
    return Counts(
        counts[:MOST_SOURCES], counts[MOST_SOURCES:first], counts[first:second], counts[second:third], counts[third:]
    )


def count_batch_reference(
    proposed_sources: NDArray[np.uint32],
    outcome: NDArray[np.uint8],
    pick_slots: NDArray[np.int32],
    drops: NDArray[np.uint8],
    slots: NDArray[np.int32],
    sources: NDArray[np.uint32],
    exploration: NDArray[np.float32],
    excluded: NDArray[np.int32],
) -> Counts:
    """What :func:`count_batch` returns, count by count."""
    _check(proposed_sources, outcome, pick_slots, drops, slots, sources, exploration, excluded)
    shown = slots >= 0
    bits = [np.uint32(1 << bit) for bit in range(MOST_SOURCES)]
    return Counts(
        np.array([np.count_nonzero(proposed_sources & bit) for bit in bits], np.int64),
        np.array([np.count_nonzero(sources[shown] & bit) for bit in bits], np.int64),
        np.array([np.count_nonzero(outcome == code) for code in range(OUTCOMES)], np.int64),
        np.array([np.count_nonzero(drops[pick_slots >= 0] == code) for code in range(DROPS)], np.int64),
        np.array([np.count_nonzero(shown), np.count_nonzero(shown & (exploration > 0)), excluded.sum()], np.int64),
    )


def _check(
    proposed_sources: NDArray[np.uint32],
    outcome: NDArray[np.uint8],
    pick_slots: NDArray[np.int32],
    drops: NDArray[np.uint8],
    slots: NDArray[np.int32],
    sources: NDArray[np.uint32],
    exploration: NDArray[np.float32],
    excluded: NDArray[np.int32],
) -> None:
    require_array("proposed_sources", proposed_sources, np.uint32, (None, None))
    require_array("outcome", outcome, np.uint8, proposed_sources.shape)
    require_array("pick_slots", pick_slots, np.int32, (None, None))
    require_array("drops", drops, np.uint8, pick_slots.shape)
    require_array("slots", slots, np.int32, (None, None))
    require_array("sources", sources, np.uint32, slots.shape)
    require_array("exploration", exploration, np.float32, slots.shape)
    require_array("excluded", excluded, np.int32, (None,))
