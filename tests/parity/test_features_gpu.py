"""Features on the GPU against `FeatureSet.compute`, for the shipped declaration and for one of every kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kernels.counters import COUNTERS, HALF_LIVES_MS
from kernels.features_gpu import FeatureColumns, compute
from server.config import TableSettings
from server.live.columns import Columns
from server.live.features import Features, FeatureSet, State
from tests.device import empty, get, put

NOW_MS = 1_760_000_000_000
LANDMARK_MS = NOW_MS - 2_400_000
SHIPPED = FeatureSet.load(TableSettings().features_file)
SECONDS = [h // 1000 for h in HALF_LIVES_MS]


def every_kind() -> FeatureSet:
    """All kinds, with all counters and half-lives somewhere, and stand-ins that are seen."""
    declared: list[dict[str, Any]] = [
        {"kind": "age"}, {"kind": "staleness"}, {"kind": "gauge", "of": "viewers", "stale_after_s": 0.5},
        {"kind": "gauge", "of": "viewers", "stale_after_s": 1e300}, {"kind": "unique", "of": "viewers"},
        {"kind": "unique", "of": "chatters"},
    ]  # fmt: skip
    declared += [{"kind": "attribute", "of": name} for name in ("age_rating", "language", "category")]
    for i, counter in enumerate(c for c in COUNTERS if c != "viewer_reports"):
        fast, mid, slow = (SECONDS[(i + k) % 3] for k in range(3))
        level = "mean" if counter == "viewers" else "rate"
        declared.append({"kind": level, "of": counter, "half_life_s": fast})
        declared.append({"kind": "velocity", "of": counter, "fast_s": fast, "slow_s": slow})
        declared.append({"kind": "acceleration", "of": counter, "fast_s": fast, "mid_s": mid, "slow_s": slow})
        declared.append({"kind": "difference", "of": counter, "fast_s": mid, "slow_s": fast})
        declared.append({"kind": "ratio", "of": counter, "per": "joined", "half_life_s": slow, "prior": 2.5})
        if counter != "viewers":
            declared.append({"kind": "per_viewer", "of": counter, "half_life_s": mid, "prior": 7.0})
    return FeatureSet([{"name": f"f{i}", "missing": -1.5 - i, **d} for i, d in enumerate(declared)])


def random_columns(rng: np.random.Generator, rows: int) -> Columns:
    """Rows in every condition: new, old, silent, without a report, overflown, never used."""
    c = Columns.allocate(rows, np.zeros((rows, 4), np.float32))
    c.started_ms[:] = NOW_MS - rng.choice([-500, 0, 3_000, 9_999, 10_001, 600_000, 7_200_000], rows)
    c.last_event_ms[:] = np.where(rng.random(rows) < 0.2, 0, NOW_MS - rng.integers(-100, 500_000, rows))
    c.viewers_ms[:] = np.where(rng.random(rows) < 0.2, 0, NOW_MS - rng.choice([0, 500, 501, 180_000, 180_001], rows))
    c.viewers[:] = rng.pareto(1.0, rows) * 20
    c.counters[:] = 10.0 ** rng.uniform(-12, 8, c.counters.shape) * (rng.random(c.counters.shape) < 0.8)
    c.counters[rng.random(rows) < 0.1] = 0.0
    if rows > 3:
        c.counters[1], c.counters[2], c.counters[3] = np.inf, np.nan, 3e38
        c.started_ms[0] = c.last_event_ms[0] = 0
    for registers in (c.viewer_registers, c.chatter_registers):
        registers[:] = rng.geometric(0.5, registers.shape) * (rng.random((rows, 1)) < rng.random((1, 128)))
    c.age_rating[:] = rng.integers(0, 19, rows)
    c.language[:], c.category[:] = rng.integers(0, 1 << 20, rows), rng.integers(0, 1 << 30, rows)
    return c


def on_device(
    features: FeatureSet, columns: Columns, slots: NDArray[np.int32] | None, n: int, landmark_ms: int = LANDMARK_MS
) -> Features:
    tensors = FeatureColumns(*(put(getattr(columns, name)) for name in FeatureColumns._fields))
    codes, numbers = features.program()
    values, states = empty((n, len(features)), torch.float32), empty((n, len(features)), torch.uint8)
    compute(
        tensors, None if slots is None else put(slots), put(codes), put(numbers),
        now_ms=NOW_MS, landmark_ms=landmark_ms, values=values, states=states,
    )  # fmt: skip
    return Features(get(values), get(states))


def assert_same(found: Features, expected: Features) -> None:
    assert np.array_equal(found.states, expected.states)
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-6)


@pytest.mark.parametrize("features", [SHIPPED, every_kind()], ids=["shipped", "every kind"])
@pytest.mark.parametrize("rows", [1, 150])
@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")
def test_all_rows_equal_the_cpu(features: FeatureSet, rows: int) -> None:
    columns = random_columns(np.random.default_rng(rows), rows)
    slots = np.arange(rows, dtype=np.int32)
    expected = features.compute(columns, slots, NOW_MS, LANDMARK_MS)
    assert_same(on_device(features, columns, None, rows), expected)
    if rows > 1 and features is SHIPPED:
        assert {*np.unique(expected.states)} == {*State}, "every state must have been met"


@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")
def test_some_rows_in_any_order_and_twice_equal_the_cpu() -> None:
    columns = random_columns(np.random.default_rng(7), 60)
    slots = np.array([59, 0, 3, 3, 17], np.int32)
    expected = SHIPPED.compute(columns, slots, NOW_MS, LANDMARK_MS)
    assert_same(on_device(SHIPPED, columns, slots, len(slots)), expected)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")
def test_the_first_rows_of_a_larger_table_are_computed_alone() -> None:
    columns = random_columns(np.random.default_rng(8), 40)
    expected = SHIPPED.compute(columns, np.arange(13, dtype=np.int32), NOW_MS, NOW_MS)
    assert_same(on_device(SHIPPED, columns, None, 13, landmark_ms=NOW_MS), expected)


def test_no_rows_are_no_work() -> None:
    assert on_device(SHIPPED, random_columns(np.random.default_rng(0), 5), np.zeros(0, np.int32), 0).values.size == 0


def test_more_rows_than_the_table_has_are_refused() -> None:
    with pytest.raises(ValueError, match="at most the table's 5 rows, got 6"):
        on_device(SHIPPED, random_columns(np.random.default_rng(0), 5), None, 6)
