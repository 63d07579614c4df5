"""Forward-decayed counters: equal to the reference, and to decay worked out event by event."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import counters as k
from kernels import sessions

N = k.N_COUNTERS


def random_events(rng: np.random.Generator, n: int, slots: int, span_ms: int) -> tuple[np.ndarray, ...]:
    return (
        rng.integers(0, slots, n).astype(np.int32),
        rng.integers(-1, N, n).astype(np.int8),
        rng.exponential(5.0, n),
        rng.integers(-1, N, n).astype(np.int8),
        np.ones(n),
        np.sort(rng.integers(0, span_ms, n)).astype(np.int64),
    )


@pytest.mark.parametrize("n", [0, 1, 7, 1000, 5000])
def test_fast_scatter_equals_the_reference_bit_for_bit(n: int) -> None:
    events = random_events(np.random.default_rng(n), n, 9, 3_600_000)
    fast, plain = np.zeros((9, N, 3), np.float32), np.zeros((9, N, 3), np.float32)
    k.scatter_decayed(fast, *events, 0)
    k.scatter_decayed_reference(plain, *events, 0)
    assert np.array_equal(fast, plain)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3_600_000), st.floats(0, 1e6)), min_size=1, max_size=20))
def test_reading_gives_the_exponentially_decayed_sum(events: list[tuple[int, float]]) -> None:
    now_ms = 3_600_000  # what the landmark allows at most
    table = np.zeros((1, N, 3), np.float32)
    n = len(events)
    times = np.array([t for t, _ in events], np.int64)
    weights = np.array([w for _, w in events])
    zero, none = np.zeros(n, np.int32), np.full(n, -1, np.int8)
    k.scatter_decayed(table, zero, np.zeros(n, np.int8), weights, none, weights, times, 0)
    read = table[0, 0] * k.decay_factors(now_ms, 0)
    for h, half_life in enumerate(k.HALF_LIVES_MS):
        expected = math.fsum(w * 2.0 ** (-(now_ms - t) / half_life) for t, w in events)
        assert read[h] == pytest.approx(expected, rel=1e-4, abs=1e-20)


@given(st.integers(0, 10**8), st.integers(0, 10**8))
def test_moving_the_landmark_never_rounds(start_ms: int, later_ms: int) -> None:
    """So it does not matter when it is moved: values stay bit-equal after undoing the power of two."""
    now_ms = start_ms + later_ms
    moved = k.next_landmark(now_ms, start_ms)
    assert 0 <= now_ms - moved < k.RELANDMARK_AFTER_MS
    if moved == start_ms:
        return
    before = np.random.default_rng(later_ms).random((2, N, 3)).astype(np.float32)
    after = before.copy()
    k.move_landmark(after, start_ms, moved)
    step = moved - start_ms
    for h, half_life in enumerate(k.HALF_LIVES_MS):
        if step // half_life < 120:  # beyond, float32 rightly underflows
            assert np.array_equal(np.ldexp(after[:, :, h], step // half_life), before[:, :, h])


def test_a_landmark_moved_by_anything_else_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 1800000"):
        k.move_landmark(np.zeros((1, N, 3), np.float32), 0, 1_000)


def test_counters_that_would_be_copied_are_refused_instead_of_losing_the_sums() -> None:
    events = random_events(np.random.default_rng(0), 3, 2, 1000)
    with pytest.raises(ValueError, match="counters: must be C-contiguous"):
        k.scatter_decayed(np.zeros((4, N, 3), np.float32)[::2], *events, 0)


def test_a_slot_outside_the_table_is_refused() -> None:
    events = random_events(np.random.default_rng(0), 3, 9, 1000)
    with pytest.raises(ValueError, match="slots: 0 to 1 allowed"):
        k.scatter_decayed(np.zeros((2, N, 3), np.float32), np.array([0, 5, 1], np.int32), *events[1:], 0)


@pytest.mark.parametrize("distinct", [0, 1, 10, 100, 1_000, 50_000])
def test_distinct_estimates_are_within_four_standard_errors(distinct: int) -> None:
    rng = np.random.default_rng(distinct)
    hashes = np.unique(rng.integers(1, 1 << 63, distinct, dtype=np.uint64))
    hashes = np.concatenate([hashes, hashes])  # seen twice, counted once
    n = len(hashes)
    registers, chatters = np.zeros((1, 128), np.uint8), np.zeros((1, 128), np.uint8)
    sessions.observe(
        np.zeros(n, np.int32), np.zeros(n, np.int64), np.full(n, -1.0), hashes, np.zeros(n, bool),
        np.zeros(1, np.int64), np.zeros(1, np.float32), np.zeros(1, np.int64), registers, chatters,
    )  # fmt: skip
    estimate = float(sessions.estimate_distinct(registers)[0])
    assert estimate == pytest.approx(float(sessions.estimate_distinct_reference(registers)[0]), rel=1e-6)
    assert abs(estimate - distinct) <= 4 * 1.04 / math.sqrt(128) * distinct + 0.5
    assert not chatters.any()


def test_the_viewer_gauge_keeps_the_latest_event_time_not_the_latest_arrival() -> None:
    viewers, at = np.zeros(1, np.float32), np.zeros(1, np.int64)
    times = np.array([3_000, 1_000], np.int64)
    sessions.observe(
        np.zeros(2, np.int32), times, np.array([30.0, 10.0]), np.zeros(2, np.uint64), np.zeros(2, bool),
        np.zeros(1, np.int64), viewers, at, np.zeros((1, 128), np.uint8), np.zeros((1, 128), np.uint8),
    )  # fmt: skip
    assert viewers[0] == 30.0 and at[0] == 3_000
