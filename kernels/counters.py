"""Exponentially decayed counters with forward decay.

Forward decay (Cormode, Shkapenyuk, Srivastava, Xu: "Forward Decay: A Practical Time Decay
Model for Streaming Systems", ICDE 2009): an event of weight w at time t_i adds
``w * 2^((t_i - L) / h)`` to the counter of half-life h, with L a landmark common to the whole
table. The decayed sum at time t is ``counter * 2^(-(t - L) / h)``: reading is one multiply,
and nothing has to be swept as time passes. Before ``2^((t - L) / h)`` grows too large the
landmark moves by a multiple of every half-life, which multiplies the counters by exact
powers of two: moving it never rounds, so *when* it is moved does not change a bit.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

HALF_LIVES_MS: tuple[int, ...] = (60_000, 300_000, 1_800_000)
LANDMARK_STEP_MS = 1_800_000
"""Common multiple of all half-lives."""
RELANDMARK_AFTER_MS = 2 * LANDMARK_STEP_MS
"""2^(60 min / 1 min) = 2^60; times a weight of 2^50 this stays inside float32 (2^127)."""

COUNTERS: tuple[str, ...] = (
    "viewers",        # sum of reported viewer counts
    "viewer_reports",  # number of reports, so that viewers / viewer_reports is their mean
    "joined",
    "left",
    "watched",        # seconds
    "chatted",
    "liked",
    "followed",
    "shared",
    "bid",
    "bid_value",      # reference currency
    "purchased",
    "purchase_value",
    "reported",
)  # fmt: skip
N_COUNTERS = len(COUNTERS)


HALF_LIVES: NDArray[np.int64] = np.array(HALF_LIVES_MS, dtype=np.int64)
"""The same, as kernels take them."""
_CHUNK_EVENTS = 2048
"""What the CPU grows before it adds: stays in its cache."""


class Grown(NamedTuple):
    """What events add, m entries in the order of the events: an event adds to no, one or two counters.

    keys: int32[m], ``slot * N_COUNTERS + counter``. amounts: float32[m, 3], weight times growth per half-life.
    """

    keys: NDArray[np.int32]
    amounts: NDArray[np.float32]


@njit(cache=True, nogil=True)
def _grow(
    slots: NDArray[np.int32],
    first: NDArray[np.int8],
    first_weight: NDArray[np.float64],
    second: NDArray[np.int8],
    second_weight: NDArray[np.float64],
    time_ms: NDArray[np.int64],
    landmark_ms: int,
    half_lives_ms: NDArray[np.int64],
    keys: NDArray[np.int32],
    amounts: NDArray[np.float32],
) -> int:
    m = 0
    for i in range(slots.shape[0]):
        has_first, has_second = first[i] >= 0, second[i] >= 0
        if not (has_first or has_second):
            continue
        at_second = m + 1 if has_first else m
        for h in range(half_lives_ms.shape[0]):
            grown = 2.0 ** ((time_ms[i] - landmark_ms) / half_lives_ms[h])
            if has_first:
                amounts[m, h] = np.float32(first_weight[i] * grown)
            if has_second:
                amounts[at_second, h] = np.float32(second_weight[i] * grown)
        if has_first:
            keys[m] = slots[i] * N_COUNTERS + first[i]
        if has_second:
            keys[at_second] = slots[i] * N_COUNTERS + second[i]
        m = at_second + 1 if has_second else m + 1
    return m


def grow_events(
    slots: NDArray[np.int32],
    first: NDArray[np.int8],
    first_weight: NDArray[np.float64],
    second: NDArray[np.int8],
    second_weight: NDArray[np.float64],
    time_ms: NDArray[np.int64],
    landmark_ms: int,
) -> Grown:
    """Works out what n events add to which counter; the arguments are those of `scatter_decayed`.

    The one place where growth is computed, whatever device adds it up: a float64 power may differ in its last
    bit between a CPU and a GPU, a float32 sum in the same order does not.

    Raises:
        ValueError: a column's length differs from that of ``slots``.

    Cost: 3 exp2 per event that counts at all; 16 bytes written per entry.
    """
    _check_lengths(slots, first, first_weight, second, second_weight, time_ms)
    n = slots.shape[0]
    keys, amounts = np.empty(2 * n, np.int32), np.empty((2 * n, len(HALF_LIVES_MS)), np.float32)
    m = _grow(
        slots, first, first_weight, second, second_weight, time_ms, landmark_ms, HALF_LIVES, keys, amounts
    )  # fmt: skip
    return Grown(keys[:m], amounts[:m])


def _check_lengths(slots: NDArray[np.int32], *columns: NDArray[Any]) -> None:
    for name, column in zip(("first", "first_weight", "second", "second_weight", "time_ms"), columns, strict=True):
        if column.shape != slots.shape:
            raise ValueError(f"{name}: shape {slots.shape} wanted, got {column.shape}")


@njit(cache=True, nogil=True)
def _add(cells: NDArray[np.float32], keys: NDArray[np.int32], amounts: NDArray[np.float32], m: int) -> None:
    for i in range(m):
        cell, amount = cells[keys[i]], amounts[i]
        for h in range(amount.shape[0]):
            cell[h] += amount[h]


def scatter_decayed(
    counters: NDArray[np.float32],
    slots: NDArray[np.int32],
    first: NDArray[np.int8],
    first_weight: NDArray[np.float64],
    second: NDArray[np.int8],
    second_weight: NDArray[np.float64],
    time_ms: NDArray[np.int64],
    landmark_ms: int,
) -> None:
    """Adds n events to ``counters`` float32[C, N_COUNTERS, 3], in order (hence deterministic).

    Args:
        slots: int32[n], in range.
        first, second: int8[n], counter numbers, -1 for none; weights float64[n].
        time_ms: int64[n], event times, at most RELANDMARK_AFTER_MS + some minutes past the landmark.

    Raises:
        ValueError: shapes differ, a slot is outside the table, or ``counters`` is not C-contiguous.

    Cost: 3 exp2 and at most 6 float adds per event, 24 bytes touched per counter.
    """
    if len(slots) and not (int(slots.min()) >= 0 and int(slots.max()) < counters.shape[0]):
        raise ValueError(f"slots: 0 to {counters.shape[0] - 1} allowed")
    _check_lengths(slots, first, first_weight, second, second_weight, time_ms)
    if not counters.flags.c_contiguous:
        raise ValueError("counters: must be C-contiguous")
    cells = counters.reshape(-1, len(HALF_LIVES_MS))
    most = 2 * min(len(slots), _CHUNK_EVENTS)
    keys, amounts = np.empty(most, np.int32), np.empty((most, len(HALF_LIVES_MS)), np.float32)
    for start in range(0, len(slots), _CHUNK_EVENTS):
        part = slice(start, start + _CHUNK_EVENTS)
        m = _grow(
            slots[part], first[part], first_weight[part], second[part], second_weight[part], time_ms[part],
            landmark_ms, HALF_LIVES, keys, amounts,
        )  # fmt: skip
        _add(cells, keys, amounts, m)


def scatter_decayed_reference(
    counters: NDArray[np.float32],
    slots: NDArray[np.int32],
    first: NDArray[np.int8],
    first_weight: NDArray[np.float64],
    second: NDArray[np.int8],
    second_weight: NDArray[np.float64],
    time_ms: NDArray[np.int64],
    landmark_ms: int,
) -> None:
    """Plain version of `scatter_decayed`."""
    for i, slot in enumerate(slots):
        for h, half_life in enumerate(HALF_LIVES_MS):
            grown = math.pow(2.0, (int(time_ms[i]) - landmark_ms) / half_life)
            if first[i] >= 0:
                counters[slot, first[i], h] += np.float32(first_weight[i] * grown)
            if second[i] >= 0:
                counters[slot, second[i], h] += np.float32(second_weight[i] * grown)


def decay_factors(now_ms: int, landmark_ms: int) -> NDArray[np.float32]:
    """float32[3]: what stored counters are multiplied with to be read at ``now_ms``.

    The division is done in float64 and rounded once, so every row sees the same factor.
    """
    return np.array([2.0 ** (-(now_ms - landmark_ms) / h) for h in HALF_LIVES_MS], dtype=np.float32)


MIN_AGE_MS = 10_000


@njit(cache=True, nogil=True)
def _saturation(age_ms: NDArray[np.int64], half_lives_ms: NDArray[np.int64]) -> NDArray[np.float32]:
    out = np.empty((half_lives_ms.shape[0], age_ms.shape[0]), dtype=np.float32)
    for h in range(half_lives_ms.shape[0]):
        for i in range(age_ms.shape[0]):
            age = max(age_ms[i], MIN_AGE_MS)
            out[h, i] = np.float32(1.0 - 2.0 ** (-age / half_lives_ms[h]))
    return out


def saturation(age_ms: NDArray[np.int64]) -> NDArray[np.float32]:
    """How full the decayed windows of streams of this age are, float32[3, n] in (0, 1].

    After the time a, a steady rate has filled 1 - 2^(-a / h) of what it fills in the end. Dividing by it
    makes the rates of young streams unbiased; without it every new stream looks as if it accelerated,
    because short windows fill first. Ages below 10 s count as 10 s, or one event would be a huge rate.
    Evaluated row by row: a vectorised power may round differently at the end of an array.
    """
    return np.asarray(_saturation(age_ms, np.array(HALF_LIVES_MS, dtype=np.int64)))


def next_landmark(now_ms: int, landmark_ms: int) -> int:
    """The landmark that should be in use at ``now_ms``; equal to ``landmark_ms`` most of the time."""
    if now_ms - landmark_ms < RELANDMARK_AFTER_MS:
        return landmark_ms
    return now_ms - (now_ms - landmark_ms) % LANDMARK_STEP_MS


def move_landmark(counters: NDArray[np.float32], old_ms: int, new_ms: int) -> None:
    """Rescales ``counters`` float32[C, N_COUNTERS, 3] in place, by exact powers of two.

    Raises:
        ValueError: the move is not a positive multiple of LANDMARK_STEP_MS.
    """
    step = new_ms - old_ms
    if step <= 0 or step % LANDMARK_STEP_MS:
        raise ValueError(f"new_ms: a positive multiple of {LANDMARK_STEP_MS} after old_ms, not {step}")
    for h, half_life in enumerate(HALF_LIVES_MS):
        counters[:, :, h] = np.ldexp(counters[:, :, h], -(step // half_life))
