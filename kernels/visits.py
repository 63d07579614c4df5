"""What viewers did, event by event: each viewer's last streams, what came of them, and when.

A visit is one viewer in one session of one stream. It holds the stream's 64-bit hash and its epoch folded to 32 bits,
so it outlives the stream's row; what the model needs of the stream (embedding, codes) is kept once per session in a
table of visited sessions, where a visit finds it by both.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kernels import fence
from kernels.checks import require_array
from kernels.idmap import FNV_BASIS, FNV_PRIME, ID_BYTES, finish_hash
from kernels.lru import ROWS, Lru, find, mixed, take

CLICKED, WATCHED, ENGAGED, PURCHASED, REPORTED, NEGATIVE = 1, 2, 4, 8, 16, 32
"""Outcome bits (numbers of `server.scoring.ranker_schema.Outcome`, which a test holds against these)."""

_LEFT, _WATCHED = 64, 128  # not bits of an outcome: what else an event of the kind does

_DOES = np.zeros(256, np.uint8)
_DOES[fence.JOINED] = CLICKED
_DOES[fence.LEFT] = _LEFT
_DOES[fence.WATCHED] = CLICKED | _WATCHED
_DOES[[fence.CHATTED, fence.LIKED, fence.FOLLOWED, fence.SHARED, fence.BID]] = CLICKED | ENGAGED
_DOES[fence.PURCHASED] = CLICKED | ENGAGED | PURCHASED
_DOES[fence.REPORTED] = REPORTED
IS_VISIT: NDArray[np.bool_] = _DOES != 0
"""bool[256]: the kinds of event that say something about a visit."""

_MAX_U32 = 0xFFFFFFFF
_CHUNK_EVENTS = 128
"""Whose memory is touched before they are applied; what that brings in must stay in the cache until then."""


class Visits(NamedTuple):
    """The last S visits of V viewers, in no order; changed in place.

    stream uint64[V, S] (hash of the id; 0: no visit), epoch uint32[V, S] (`fold_epoch`), seen_s uint32[V, S] (newest
    event, Unix seconds), watch_ms uint32[V, S], outcome uint8[V, S].
    """

    stream: NDArray[np.uint64]
    epoch: NDArray[np.uint32]
    seen_s: NDArray[np.uint32]
    watch_ms: NDArray[np.uint32]
    outcome: NDArray[np.uint8]


class Applied(NamedTuple):
    """What a batch did. rows int32[m], slots int32[m]: rows of visited sessions that were taken, in order, and the
    live table's slot of each (the last word on a row counts). forgotten: viewers that gave way."""

    rows: NDArray[np.int32]
    slots: NDArray[np.int32]
    forgotten: int


def fold_epoch(epoch: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Epochs int64[n] as 32 bits; two of one stream meet with a probability of 2^-32."""
    wide = epoch.view(np.uint64) if epoch.flags.c_contiguous else epoch.astype(np.uint64)
    return ((wide ^ (wide >> np.uint64(32))) & np.uint64(_MAX_U32)).astype(np.uint32)


@njit(cache=True, nogil=True)
def _folded(epoch: int) -> np.uint32:
    """`fold_epoch` of one."""
    wide = np.uint64(epoch)
    return np.uint32((wide ^ (wide >> np.uint64(32))) & np.uint64(_MAX_U32))


@njit(cache=True, nogil=True)
def _session_key(stream: np.uint64, epoch: np.uint32) -> np.uint64:
    key = mixed(stream ^ (np.uint64(0x9E3779B97F4A7C15) * (np.uint64(epoch) + np.uint64(1))))
    return key if key != np.uint64(0) else np.uint64(1)


@njit(cache=True, nogil=True)
def _place(visits: Visits, viewer: int, stream: np.uint64, epoch: np.uint32, seen_s: int) -> int:
    """Where a visit stands or may stand: its own place, a free one, or that of the oldest; -1: it is older than all."""
    oldest = 0
    for s in range(visits.stream.shape[1]):
        if visits.stream[viewer, s] == 0:
            return s
        if visits.stream[viewer, s] == stream and visits.epoch[viewer, s] == epoch:
            return s
        if visits.seen_s[viewer, s] < visits.seen_s[viewer, oldest]:
            oldest = s
    return oldest if visits.seen_s[viewer, oldest] <= seen_s else -1


@njit(cache=True, nogil=True)
def _touch(viewers: Lru, visits: Visits, keys: NDArray[np.uint64], m: int) -> np.uint64:
    """Reads what the visits of m viewers will need. No read waits for another's value, so their misses overlap; in
    `_apply`, where each event depends on the one before, they would be waited for one by one. Returns a sum of it all:
    what is not used is not read."""
    mask, sum_ = np.uint64(viewers.buckets.shape[0] - 1), np.uint64(0)
    for j in range(m):
        sum_ += np.uint64(viewers.buckets[mixed(keys[j]) & mask])
    for j in range(m):
        row = viewers.buckets[mixed(keys[j]) & mask] - 1
        if row >= 0:
            sum_ += viewers.key[row]
    last = visits.stream.shape[1] - 1
    for j in range(m):
        row = find(viewers, keys[j])
        if row >= 0:
            sum_ += np.uint64(viewers.newer[row]) + np.uint64(viewers.older[row]) + np.uint64(visits.outcome[row, 0])
            sum_ += visits.stream[row, 0] + visits.stream[row, last] + np.uint64(visits.watch_ms[row, 0])
            sum_ += np.uint64(visits.seen_s[row, 0]) + np.uint64(visits.epoch[row, 0])
    return sum_


@njit(cache=True, nogil=True)
def _apply(
    viewers: Lru,
    visits: Visits,
    sessions: Lru,
    counted: NDArray[np.bool_],
    viewer_hash: NDArray[np.uint64],
    ids: NDArray[np.uint8],
    id_lengths: NDArray[np.uint8],
    kinds: NDArray[np.uint8],
    time_ms: NDArray[np.int64],
    value: NDArray[np.float64],
    slots: NDArray[np.int32],
    row_epochs: NDArray[np.int64],
    watched_ms: int,
    bounce_ms: int,
) -> tuple[NDArray[np.int32], NDArray[np.int32], int, np.uint64]:
    rows, taken, fresh, forgotten = np.empty(len(slots), np.int32), np.empty(len(slots), np.int32), 0, 0
    chosen, keys = np.empty(_CHUNK_EVENTS, np.int64), np.empty(_CHUNK_EVENTS, np.uint64)
    end, touched = 0, np.uint64(0)
    while end < len(slots):
        m = 0
        while end < len(slots) and m < _CHUNK_EVENTS:
            if counted[end] and viewer_hash[end] != 0 and _DOES[kinds[end]] != 0:
                chosen[m], keys[m] = end, viewer_hash[end]
                m += 1
            end += 1
        touched += _touch(viewers, visits, keys, m)
        for j in range(m):
            i, key = chosen[j], keys[j]
            does = _DOES[kinds[i]]
            is_left = does & 64 != 0
            if is_left and find(viewers, key) < 0:
                continue
            full = viewers.ends[ROWS] == viewers.key.shape[0]
            viewer, is_new = take(viewers, key)
            if is_new:
                forgotten += full
                visits.stream[viewer] = 0
            stream, epoch = FNV_BASIS, _folded(row_epochs[slots[i]])
            for k in range(id_lengths[i]):  # as `hash_ids` does it; a call that takes an array would cost more
                stream = (stream ^ np.uint64(ids[i, k])) * FNV_PRIME
            stream = max(finish_hash(stream), np.uint64(1))
            seen_s = time_ms[i] // 1000
            s = _place(visits, viewer, stream, epoch, seen_s)
            if s < 0:
                continue
            known = visits.stream[viewer, s] == stream and visits.epoch[viewer, s] == epoch
            if not known:
                if is_left:
                    continue
                visits.stream[viewer, s], visits.epoch[viewer, s] = stream, epoch
                visits.seen_s[viewer, s], visits.watch_ms[viewer, s], visits.outcome[viewer, s] = 0, 0, 0
            at, is_new = take(sessions, _session_key(stream, epoch))
            if is_new:
                rows[fresh], taken[fresh] = at, slots[i]
                fresh += 1
            outcome = visits.outcome[viewer, s] | (does & 63)
            if does & 128 != 0:
                watch_ms = visits.watch_ms[viewer, s] + np.int64(value[i] * 1000.0 + 0.5)
                visits.watch_ms[viewer, s] = min(watch_ms, np.int64(0xFFFFFFFF))
            if visits.watch_ms[viewer, s] >= watched_ms:
                outcome |= 2
            if is_left and outcome == 1 and (seen_s - visits.seen_s[viewer, s]) * 1000 < bounce_ms:
                outcome |= 32
            if visits.watch_ms[viewer, s] >= bounce_ms:
                outcome &= ~32
            visits.outcome[viewer, s] = outcome
            if seen_s > visits.seen_s[viewer, s]:
                visits.seen_s[viewer, s] = seen_s
    return rows[:fresh].copy(), taken[:fresh].copy(), forgotten, touched


def apply_visits(
    viewers: Lru,
    visits: Visits,
    sessions: Lru,
    *,
    counted: NDArray[np.bool_],
    viewer_hash: NDArray[np.uint64],
    ids: NDArray[np.uint8],
    id_lengths: NDArray[np.uint8],
    kind: NDArray[np.uint8],
    time_ms: NDArray[np.int64],
    value: NDArray[np.float64],
    slots: NDArray[np.int32],
    row_epochs: NDArray[np.int64],
    watched_ms: int,
    bounce_ms: int,
) -> Applied:
    """Takes those of n events that are ``counted``, have a viewer and are `IS_VISIT`, in order, into the visits.

    A stream that is new to a viewer who has S visits takes the place of the one seen longest ago, unless it was itself
    seen before that one. A viewer or session for which there is no room takes the place of the least recently used.
    A `LEFT` changes a visit that is known and makes none.

    Args:
        counted: bool[n]. viewer_hash: uint64[n], 0 nobody. ids: uint8[n, 64] and id_lengths: uint8[n], of streams.
        kind: uint8[n]. time_ms: int64[n], event time. value: float64[n], seconds of a WATCHED.
        slots: int32[n], in range where counted; handed back for sessions that are new.
        row_epochs: int64[C], the epoch of each slot's session.
        watched_ms: total from which a visit counts as watched. bounce_ms: a visitor who did nothing and leaves so soon
            after the last sign of life is NEGATIVE, until the time watched says otherwise.

    Raises:
        ValueError: a column has another type or length.

    Cost: O(n · S). Cache misses of different events overlap, see `_touch`.
    """
    n = len(slots)
    for name, column, dtype in (
        ("counted", counted, np.bool_), ("viewer_hash", viewer_hash, np.uint64), ("id_lengths", id_lengths, np.uint8),
        ("kind", kind, np.uint8), ("time_ms", time_ms, np.int64), ("value", value, np.float64),
        ("slots", slots, np.int32),
    ):  # fmt: skip
        require_array(name, column, dtype, (n,))
    require_array("ids", ids, np.uint8, (n, ID_BYTES))
    require_array("row_epochs", row_epochs, np.int64, (None,))
    rows, taken, forgotten, _ = _apply(
        viewers, visits, sessions, counted, viewer_hash, ids, id_lengths, kind, time_ms, value, slots, row_epochs,
        watched_ms, bounce_ms,
    )  # fmt: skip
    return Applied(rows, taken, int(forgotten))


@njit(cache=True, nogil=True)
def _read(
    viewers: Lru, visits: Visits, sessions: Lru, viewer_hash: NDArray[np.uint64]
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    width = visits.stream.shape[1]
    rows = np.full(len(viewer_hash), -1, np.int32)
    places = np.full((len(viewer_hash), width), -1, np.int32)
    at = np.full((len(viewer_hash), width), -1, np.int32)
    for b in range(len(viewer_hash)):
        if viewer_hash[b] == 0:
            continue
        row = find(viewers, viewer_hash[b])
        rows[b] = row
        if row < 0:
            continue
        n = 0
        while n < width and visits.stream[row, n] != 0:
            s = n  # insertion sort, newest first; the lower place wins a tie
            while s > 0 and visits.seen_s[row, places[b, s - 1]] < visits.seen_s[row, n]:
                places[b, s] = places[b, s - 1]
                s -= 1
            places[b, s] = n
            n += 1
        for s in range(n):
            p = places[b, s]
            at[b, s] = find(sessions, _session_key(visits.stream[row, p], visits.epoch[row, p]))
    return rows, places, at


def read_visits(
    viewers: Lru, visits: Visits, sessions: Lru, viewer_hash: NDArray[np.uint64]
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Where the visits of B viewers stand, newest first. Changes nothing, not even who was used last.

    Args:
        viewer_hash: uint64[B]; 0: nobody.

    Returns:
        rows int32[B] (-1: not known), places int32[B, S] within the row (-1: no more visits), at int32[B, S]: row of
        the visited session (-1: it gave way, or padding).
    """
    require_array("viewer_hash", viewer_hash, np.uint64, (None,))
    rows, places, at = _read(viewers, visits, sessions, viewer_hash)
    return rows, places, at
