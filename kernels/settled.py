"""What a batch comes to once `kernels.fence` has decided about its events, and when time will change the rows next."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kernels.fence import APPLIED, ENDED, IMPRESSION, LIVE, MODERATED_BLOCKED, SUSPECT, LivenessColumns

NEVER_MS = (1 << 63) - 1


class Settled(NamedTuple):
    """What a fenced batch comes to.

    current: bool[n], applied events that count for the session their row now has; impressions count for none.
    touched: int32[m], the rows of applied events, each once. by_kind, current_by_kind: int64[32], applied events and
    those of them that are current. by_code: int64[32], all events.
    """

    current: NDArray[np.bool_]
    touched: NDArray[np.int32]
    by_kind: NDArray[np.int64]
    current_by_kind: NDArray[np.int64]
    by_code: NDArray[np.int64]


@njit(cache=True, nogil=True)
def _settle(
    codes: NDArray[np.uint8],
    slots: NDArray[np.int32],
    kinds: NDArray[np.uint8],
    epochs: NDArray[np.int64],
    row_epochs: NDArray[np.int64],
    mark: NDArray[np.bool_],
) -> tuple[NDArray[np.bool_], NDArray[np.int32], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    n = codes.shape[0]
    current, touched = np.zeros(n, np.bool_), np.empty(n, np.int32)
    by_kind, current_by_kind, by_code = np.zeros(32, np.int64), np.zeros(32, np.int64), np.zeros(32, np.int64)
    m = 0
    for i in range(n):
        by_code[codes[i]] += 1
        if codes[i] != APPLIED:
            continue
        by_kind[kinds[i]] += 1
        s = slots[i]
        if not mark[s]:
            mark[s] = True
            touched[m] = s
            m += 1
        if kinds[i] != IMPRESSION and (epochs[i] == 0 or epochs[i] == row_epochs[s]):
            current[i] = True
            current_by_kind[kinds[i]] += 1
    for j in range(m):
        mark[touched[j]] = False
    return current, touched[:m].copy(), by_kind, current_by_kind, by_code


def settle(
    codes: NDArray[np.uint8],
    slots: NDArray[np.int32],
    kinds: NDArray[np.uint8],
    epochs: NDArray[np.int64],
    row_epochs: NDArray[np.int64],
    mark: NDArray[np.bool_],
) -> Settled:
    """Sums up what `kernels.fence.fence_events` decided about n events.

    Args:
        codes: its verdicts. slots, kinds, epochs: as it took them. row_epochs: int64[C], as it left them.
        mark: bool[C], all False, now and afterwards.

    Raises:
        ValueError: a column's length differs from that of ``codes``, or one of the table's from the other's.

    Cost: one pass, one random row of 9 bytes per event.
    """
    for name, column in (("slots", slots), ("kinds", kinds), ("epochs", epochs)):
        if column.shape != codes.shape:
            raise ValueError(f"{name}: shape {codes.shape} wanted, got {column.shape}")
    if mark.shape != row_epochs.shape:
        raise ValueError(f"mark: shape {row_epochs.shape} wanted, got {mark.shape}")
    return Settled(*_settle(codes, slots, kinds, epochs, row_epochs, mark))


def settle_reference(
    codes: NDArray[np.uint8],
    slots: NDArray[np.int32],
    kinds: NDArray[np.uint8],
    epochs: NDArray[np.int64],
    row_epochs: NDArray[np.int64],
    mark: NDArray[np.bool_],
) -> Settled:
    """Plain version of `settle`; its rows come in another order."""
    ok = codes == APPLIED
    current = ok & (kinds != IMPRESSION)
    current[ok] &= (epochs[ok] == 0) | (epochs[ok] == row_epochs[slots[ok]])
    by_kind, current_by_kind = np.bincount(kinds[ok], minlength=32), np.bincount(kinds[current], minlength=32)
    return Settled(current, np.unique(slots[ok]), by_kind, current_by_kind, np.bincount(codes, minlength=32))


@njit(cache=True, nogil=True)
def _next_change_ms(
    state: NDArray[np.uint8],
    lease_expires_ms: NDArray[np.int64],
    ended_ms: NDArray[np.int64],
    moderation: NDArray[np.uint8],
    slots: NDArray[np.int32],
    rows: int,
    grace_ms: int,
    tombstone_ms: int,
) -> int:
    earliest = NEVER_MS
    for i in range(max(rows, slots.shape[0])):
        s = i if rows > 0 else np.int64(slots[i])
        if state[s] == LIVE:
            earliest = min(earliest, lease_expires_ms[s])
        elif state[s] == SUSPECT:
            earliest = min(earliest, lease_expires_ms[s] + grace_ms)
        elif state[s] == ENDED and not moderation[s] & MODERATED_BLOCKED:
            earliest = min(earliest, ended_ms[s] + tombstone_ms)
    return earliest


def next_change_ms(
    columns: LivenessColumns, slots: NDArray[np.int32] | int, *, grace_ms: int, tombstone_ms: int
) -> int:
    """When the passing of time changes one of these rows at the earliest; NEVER_MS when it changes none.

    slots: int32[m] in range, or how many of the first rows. Cost: one pass; 10 bytes per row.
    """
    some, rows = (np.zeros(0, np.int32), slots) if isinstance(slots, int) else (slots, 0)
    c = columns
    return int(
        _next_change_ms(c.state, c.lease_expires_ms, c.ended_ms, c.moderation, some, rows, grace_ms, tombstone_ms)
    )
