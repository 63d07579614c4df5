"""What happens in the session of each row, event by event: decayed counters, gauges, sketches of distinct viewers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kernels.counters import HALF_LIVES, scatter_decayed_reference


@njit(cache=True, nogil=True)
def observe(
    slots: NDArray[np.int32],
    time_ms: NDArray[np.int64],
    viewers: NDArray[np.float64],
    viewer_hash: NDArray[np.uint64],
    is_chat: NDArray[np.bool_],
    last_event_ms: NDArray[np.int64],
    viewers_now: NDArray[np.float32],
    viewers_ms: NDArray[np.int64],
    viewer_registers: NDArray[np.uint8],
    chatter_registers: NDArray[np.uint8],
) -> None:
    """Per event: last-event time, viewer gauge (latest event time wins), distinct-count sketches.

    slots int32[n], time_ms int64[n], viewers float64[n] (-1: not a viewer count),
    viewer_hash uint64[n] (0: none), is_chat bool[n]; the rest are table columns:
    int64[C], float32[C], int64[C], uint8[C, M], uint8[C, M] with M a power of two.

    HyperLogLog update (Flajolet et al., 2007): low bits choose the register, the position of
    the first set bit of the rest is its candidate value.
    """
    m = np.uint64(viewer_registers.shape[1])
    shift = np.uint64(0)
    while (np.uint64(1) << shift) < m:
        shift += np.uint64(1)
    for i in range(slots.shape[0]):
        slot = slots[i]
        last_event_ms[slot] = max(last_event_ms[slot], time_ms[i])
        if viewers[i] >= 0.0 and time_ms[i] >= viewers_ms[slot]:
            viewers_now[slot] = np.float32(viewers[i])
            viewers_ms[slot] = time_ms[i]
        if viewer_hash[i] != 0:
            register = viewer_hash[i] & (m - np.uint64(1))
            rest = viewer_hash[i] >> shift
            rank = 1
            while rank <= 50 and (rest & np.uint64(1)) == 0:
                rest >>= np.uint64(1)
                rank += 1
            if rank > viewer_registers[slot, register]:
                viewer_registers[slot, register] = rank
            if is_chat[i] and rank > chatter_registers[slot, register]:
                chatter_registers[slot, register] = rank


class Sessions(NamedTuple):
    """What happened in the session of each of C rows; changed in place.

    counters float32[C, N_COUNTERS, 3], last_event_ms int64[C], viewers float32[C], viewers_ms int64[C],
    viewer_registers, chatter_registers uint8[C, M], M a power of two.
    """

    counters: NDArray[np.float32]
    last_event_ms: NDArray[np.int64]
    viewers: NDArray[np.float32]
    viewers_ms: NDArray[np.int64]
    viewer_registers: NDArray[np.uint8]
    chatter_registers: NDArray[np.uint8]


@njit(cache=True, nogil=True)
def _count_events(
    sessions: Sessions,
    slots: NDArray[np.int32],
    kinds: NDArray[np.uint8],
    values: NDArray[np.float64],
    time_ms: NDArray[np.int64],
    viewer_hash: NDArray[np.uint64],
    counted: NDArray[np.bool_],
    landmark_ms: int,
    first_counter: NDArray[np.int8],
    second_counter: NDArray[np.int8],
    half_lives_ms: NDArray[np.int64],
    gauge: int,
    chat: int,
) -> None:
    counters, last_event_ms = sessions.counters, sessions.last_event_ms
    viewers, viewers_ms = sessions.viewers, sessions.viewers_ms
    viewer_registers, chatter_registers = sessions.viewer_registers, sessions.chatter_registers
    m = np.uint64(viewer_registers.shape[1])
    shift = np.uint64(0)
    while (np.uint64(1) << shift) < m:
        shift += np.uint64(1)
    n_half_lives = half_lives_ms.shape[0]
    grown, grown_ms = np.empty(n_half_lives, np.float64), np.int64(-1)
    for i in range(slots.shape[0]):
        if not counted[i]:
            continue
        s, kind, at_ms, value = slots[i], kinds[i], time_ms[i], values[i]
        first, second = first_counter[kind], second_counter[kind]
        if first >= 0:
            if at_ms != grown_ms:
                grown_ms = at_ms
                for h in range(n_half_lives):
                    grown[h] = 2.0 ** ((at_ms - landmark_ms) / half_lives_ms[h])
            for h in range(n_half_lives):
                counters[s, first, h] += np.float32(value * grown[h])
            if second >= 0:
                for h in range(n_half_lives):
                    counters[s, second, h] += np.float32(grown[h])
        last_event_ms[s] = max(last_event_ms[s], at_ms)
        if kind == gauge and at_ms >= viewers_ms[s]:
            viewers[s] = np.float32(value)
            viewers_ms[s] = at_ms
        if viewer_hash[i] != 0:
            register = viewer_hash[i] & (m - np.uint64(1))
            rest = viewer_hash[i] >> shift
            rank = 1
            while rank <= 50 and (rest & np.uint64(1)) == 0:
                rest >>= np.uint64(1)
                rank += 1
            if rank > viewer_registers[s, register]:
                viewer_registers[s, register] = rank
            if kind == chat and rank > chatter_registers[s, register]:
                chatter_registers[s, register] = rank


def count_events(
    sessions: Sessions,
    slots: NDArray[np.int32],
    kinds: NDArray[np.uint8],
    values: NDArray[np.float64],
    time_ms: NDArray[np.int64],
    viewer_hash: NDArray[np.uint64],
    counted: NDArray[np.bool_],
    landmark_ms: int,
    *,
    first_counter: NDArray[np.int8],
    second_counter: NDArray[np.int8],
    gauge: int,
    chat: int,
) -> None:
    """`scatter_decayed` and `observe` in one pass, for those of n events that are ``counted``, in order.

    Args:
        slots: int32[n], in range where counted. kinds: uint8[n]; values float64[n], >= 0. viewer_hash: uint64[n],
            0 none.
        first_counter, second_counter: int8[256], the counters to which a kind adds its value and 1, -1 none; none adds
            to the second alone. gauge, chat: the kinds that report viewers, and whose viewers are chatters.

    Raises:
        ValueError: a column's length differs from that of ``slots``, a counted slot is outside the table, or
        ``counters`` is not C-contiguous.

    Cost: 3 exp2 per event whose time differs from that of the one before, at most 6 float adds; 3 cache lines touched.
    """
    for name, column in (
        ("kinds", kinds), ("values", values), ("time_ms", time_ms), ("viewer_hash", viewer_hash), ("counted", counted),
    ):  # fmt: skip
        if column.shape != slots.shape:
            raise ValueError(f"{name}: shape {slots.shape} wanted, got {column.shape}")
    if len(slots) and int(slots.max()) >= sessions.counters.shape[0]:
        raise ValueError(f"slots: 0 to {sessions.counters.shape[0] - 1} allowed")
    if not sessions.counters.flags.c_contiguous:
        raise ValueError("counters: must be C-contiguous")
    _count_events(
        sessions, slots, kinds, values, time_ms, viewer_hash, counted, landmark_ms, first_counter, second_counter,
        HALF_LIVES, gauge, chat,
    )  # fmt: skip


def count_events_reference(
    sessions: Sessions,
    slots: NDArray[np.int32],
    kinds: NDArray[np.uint8],
    values: NDArray[np.float64],
    time_ms: NDArray[np.int64],
    viewer_hash: NDArray[np.uint64],
    counted: NDArray[np.bool_],
    landmark_ms: int,
    *,
    first_counter: NDArray[np.int8],
    second_counter: NDArray[np.int8],
    gauge: int,
    chat: int,
) -> None:
    """Plain version of `count_events`."""
    at, kind, value, ms = slots[counted], kinds[counted], values[counted], time_ms[counted]
    scatter_decayed_reference(
        sessions.counters, at, first_counter[kind], value, second_counter[kind], np.ones(len(at)), ms, landmark_ms
    )
    observe(at, ms, np.where(kind == gauge, value, -1.0), viewer_hash[counted], kind == chat, *sessions[1:])


@njit(cache=True, nogil=True)
def _estimate(registers: NDArray[np.uint8]) -> NDArray[np.float32]:
    m = registers.shape[1]
    power = np.empty(64, dtype=np.float64)
    for r in range(64):
        power[r] = 2.0**-r
    out = np.empty(registers.shape[0], dtype=np.float32)
    for i in range(registers.shape[0]):
        total, zeros = 0.0, 0
        for j in range(m):
            total += power[registers[i, j]]
            zeros += registers[i, j] == 0
        estimate = (0.7213 / (1.0 + 1.079 / m)) * m * m / total
        if estimate <= 2.5 * m and zeros > 0:
            estimate = m * np.log(m / zeros)
        out[i] = estimate
    return out


def estimate_distinct(registers: NDArray[np.uint8]) -> NDArray[np.float32]:
    """HyperLogLog estimates float32[n] of registers uint8[n, M], M >= 128; standard error 1.04/sqrt(M).

    With the small-range correction (linear counting) of the original paper. Cost: M bytes per row.
    """
    return np.asarray(_estimate(registers))


def estimate_distinct_reference(registers: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Plain version of `estimate_distinct`."""
    m = registers.shape[1]
    raw = (0.7213 / (1.0 + 1.079 / m)) * m * m / np.exp2(-registers.astype(np.float64)).sum(axis=1)
    zeros = np.count_nonzero(registers == 0, axis=1)
    small = (raw <= 2.5 * m) & (zeros > 0)
    linear = m * np.log(m / np.maximum(zeros, 1))
    return np.where(small, linear, raw).astype(np.float32)
