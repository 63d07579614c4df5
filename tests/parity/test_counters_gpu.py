"""The GPU's counters, gauges and sketches against the CPU's: bit for bit where order is kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kernels import counters as host
from kernels import counters_gpu as device
from kernels import sessions
from tests.device import DEVICE, empty, get, put

LANDMARK_MS = 1_700_000_000_000


def random_events(rng: np.random.Generator, n: int, rows: int) -> tuple[NDArray[np.generic], ...]:
    """Arguments of ``scatter_decayed`` after the counters; a few rows get most events, as in life."""
    return (
        np.minimum(rng.geometric(0.3, n) - 1, rows - 1).astype(np.int32),
        rng.integers(-1, host.N_COUNTERS, n).astype(np.int8),
        rng.exponential(5.0, n),
        rng.integers(-1, host.N_COUNTERS, n).astype(np.int8),
        np.ones(n),
        LANDMARK_MS + rng.integers(0, 3_600_000, n),
    )


@pytest.mark.parametrize(("n", "rows"), [(0, 1), (1, 1), (9, 1), (128, 7), (700, 40)])
def test_sums_in_order_equal_the_cpu_bit_for_bit(n: int, rows: int) -> None:
    rng = np.random.default_rng(n)
    events = random_events(rng, n, rows)
    expected = rng.random((rows, host.N_COUNTERS, 3)).astype(np.float32)
    counters = put(expected)
    host.scatter_decayed(expected, *events, LANDMARK_MS)
    grown = host.grow_events(*events, LANDMARK_MS)
    device.scatter_decayed(counters, put(grown.keys), put(grown.amounts), deterministic=True)
    assert get(counters).tobytes() == expected.tobytes()


def test_one_counter_that_a_whole_batch_meets_is_summed_in_order_across_programs() -> None:
    rng = np.random.default_rng(0)
    amounts = (10.0 ** rng.uniform(-6, 6, (300, 3))).astype(np.float32)
    counters = put(np.zeros((3, host.N_COUNTERS, 3), np.float32))
    keys = np.full(300, host.N_COUNTERS + 2, np.int32)
    device.scatter_decayed(counters, put(keys), put(amounts), deterministic=True)
    expected = np.zeros(3, np.float32)
    for amount in amounts:
        expected += amount
    assert get(counters)[1, 2].tobytes() == expected.tobytes()
    assert np.count_nonzero(get(counters)) == 3
    assert expected.tobytes() != amounts[::-1].cumsum(axis=0, dtype=np.float32)[-1].tobytes(), "order must matter here"


@pytest.mark.parametrize("n", [0, 1, 700])
def test_sums_in_any_order_are_off_by_rounding_only(n: int) -> None:
    events = random_events(np.random.default_rng(n), n, 12)
    expected = np.zeros((12, host.N_COUNTERS, 3), np.float32)
    counters = put(expected)
    host.scatter_decayed(expected, *events, LANDMARK_MS)
    grown = host.grow_events(*events, LANDMARK_MS)
    device.scatter_decayed(counters, put(grown.keys), put(grown.amounts), deterministic=False)
    np.testing.assert_allclose(get(counters), expected, rtol=1e-5)


class Observed:
    """The columns that `observe` changes, on both sides."""

    def __init__(self, rows: int) -> None:
        self.host = {
            "last_event_ms": np.zeros(rows, np.int64),
            "viewers_now": np.zeros(rows, np.float32),
            "viewers_ms": np.zeros(rows, np.int64),
            "viewer_registers": np.zeros((rows, 128), np.uint8),
            "chatter_registers": np.zeros((rows, 128), np.uint8),
        }
        self.device = {name: put(column) for name, column in self.host.items()}
        self.winner = put(np.full(rows, -1, np.int32))

    def observe(self, *events: NDArray[np.generic]) -> None:
        slots, time_ms, viewers, hashes, chat = events
        sessions.observe(slots, time_ms, viewers, hashes, chat, *self.host.values())
        device.observe(
            put(slots), put(time_ms), put(viewers.astype(np.float32)), put(hashes), put(chat), **self.device,
            winner=self.winner,
        )  # fmt: skip

    def check(self) -> None:
        for name, column in self.host.items():
            assert get(self.device[name]).tobytes() == column.tobytes(), name
        assert (get(self.winner) == -1).all(), "left as it was found"


def hashes_of(rng: np.random.Generator, n: int) -> NDArray[np.uint64]:
    """Random 64-bit hashes, some none, some with the top bit, some with very many zeros."""
    found = rng.integers(0, 1 << 64, n, dtype=np.uint64)
    found[rng.random(n) < 0.2] = 0
    deep = rng.random(n) < 0.2
    found[deep] &= np.uint64(0x7F) | (np.uint64(0xFFFF) << np.uint64(48))
    found[rng.random(n) < 0.05] = 5  # nothing but the register's number: as many zeros as there can be
    return found


@pytest.mark.parametrize(("n", "rows"), [(0, 1), (1, 1), (300, 3), (500, 200)])
def test_gauges_and_sketches_equal_the_cpu_bit_for_bit_batch_after_batch(n: int, rows: int) -> None:
    rng = np.random.default_rng(n)
    both = Observed(rows)
    for _ in range(2):
        both.observe(
            rng.integers(0, rows, n).astype(np.int32),
            LANDMARK_MS + rng.integers(0, 5, n),  # few moments: most are shared
            np.where(rng.random(n) < 0.5, -1.0, rng.integers(0, 1000, n)),
            hashes_of(rng, n),
            rng.random(n) < 0.5,
        )
        both.check()


_EVENT = st.tuples(
    st.integers(0, 2), st.integers(1, 4), st.integers(-1, 9), st.integers(0, (1 << 64) - 1), st.booleans()
)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(_EVENT, min_size=1, max_size=12), min_size=1, max_size=3))
def test_any_history_leaves_the_same_gauges_and_sketches(batches: list[list[tuple[int, int, int, int, bool]]]) -> None:
    both = Observed(3)
    for batch in batches:
        slots, times, viewers, hashes, chat = zip(*batch)
        both.observe(
            np.array(slots, np.int32), np.array(times, np.int64), np.array(viewers, np.float64),
            np.array(hashes, np.uint64), np.array(chat, np.bool_),
        )  # fmt: skip
    both.check()


def test_every_distinct_estimate_is_the_cpus() -> None:
    rng = np.random.default_rng(0)
    registers = np.minimum(rng.geometric(0.5, (150, 128)), 51).astype(np.uint8)
    registers[:100] *= (rng.random((100, 128)) < np.linspace(0, 1, 100)[:, None]).astype(np.uint8)
    registers[100] = 51  # full
    out = empty((150,), torch.float32)
    device.estimate_distinct(put(registers), out=out)
    np.testing.assert_allclose(get(out), sessions.estimate_distinct(registers), rtol=1e-6)
    assert get(out)[0] == 0.0


@pytest.mark.parametrize("steps", [1, 2, 5, 9, 48, 2000])
def test_moving_the_landmark_equals_the_cpu_bit_for_bit_down_to_denormals(steps: int) -> None:
    rng = np.random.default_rng(steps)
    expected = (10.0 ** rng.uniform(-45, 38, (30, host.N_COUNTERS, 3))).astype(np.float32)
    counters = put(expected)
    with np.errstate(under="ignore"):
        host.move_landmark(expected, LANDMARK_MS, LANDMARK_MS + steps * host.LANDMARK_STEP_MS)
    device.move_landmark(counters, LANDMARK_MS, LANDMARK_MS + steps * host.LANDMARK_STEP_MS)
    assert get(counters).tobytes() == expected.tobytes()


def test_a_landmark_moved_by_anything_else_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 1800000"):
        device.move_landmark(put(np.zeros((1, host.N_COUNTERS, 3), np.float32)), 0, 1_000)


@pytest.mark.parametrize("listed", [[], [3], [0, 39, 3, 3], list(range(40))])
def test_cleared_rows_hold_nothing_and_others_everything(listed: list[int]) -> None:
    rows = 40
    columns = {
        "last_event_ms": np.full(rows, 7, np.int64),
        "viewers": np.full(rows, 7, np.float32),
        "viewers_ms": np.full(rows, 7, np.int64),
        "counters": np.full((rows, host.N_COUNTERS, 3), 7, np.float32),
        "viewer_registers": np.full((rows, 128), 7, np.uint8),
        "chatter_registers": np.full((rows, 128), 7, np.uint8),
    }
    tensors = {name: put(column) for name, column in columns.items()}
    device.clear_rows(put(np.array(listed, np.int32)), **tensors)
    for name, column in columns.items():
        column[listed] = 0
        assert np.array_equal(get(tensors[name]), column), name


def test_an_argument_of_the_wrong_type_is_named() -> None:
    counters = torch.zeros((2, host.N_COUNTERS, 3), device=DEVICE)
    with pytest.raises(ValueError, match=r"keys: must be a tensor of torch\.int32"):
        device.scatter_decayed(counters, torch.zeros(1), torch.zeros((1, 3)), deterministic=True)
    keys = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=r"amounts: must have shape \[2, 3\]"):
        device.scatter_decayed(counters, keys, torch.zeros((1, 3), device=DEVICE), deterministic=True)
