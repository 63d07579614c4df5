"""The total order: score descending, non-finite last, ties by id."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.scoring.order import rank_rows

SCORES = st.sampled_from([0.0, -0.0, 0.25, 0.5, 0.5000001, 1.0, math.nan, math.inf, -math.inf])
IDS = st.binary(min_size=1, max_size=6).map(lambda raw: raw.replace(b"\0", b"a"))


def naive(scores: list[float], slots: list[int], ids: list[bytes] | None) -> list[int]:
    def key(row: int) -> tuple[float, bytes | int, int]:
        score = float(np.float32(scores[row]))
        return (-score if math.isfinite(score) else math.inf, ids[row] if ids else slots[row], slots[row])

    return [slots[row] for row in sorted(range(len(scores)), key=key)]


@given(
    rows=st.lists(st.tuples(SCORES | st.floats(width=32), IDS), max_size=80, unique_by=lambda row: row[1]),
    with_ids=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_order_equals_the_naive_reference(rows: list[tuple[float, bytes]], with_ids: bool, seed: int) -> None:
    slots = np.random.default_rng(seed).permutation(1000)[: len(rows)].astype(np.int32)
    scores = np.array([score for score, _ in rows], dtype=np.float32)
    ids = np.array([name for _, name in rows], dtype="S64") if with_ids else None
    before = scores.copy()
    order = rank_rows(scores, slots, ids)
    assert order.dtype == np.int32
    names = [name for _, name in rows] if with_ids else None
    assert order.tolist() == naive([score for score, _ in rows], slots.tolist(), names)
    np.testing.assert_array_equal(scores, before)


@pytest.mark.parametrize("score", [0.5, math.nan])
def test_a_constant_model_ranks_a_large_table_by_id(score: float) -> None:
    rows = 20_000
    numbers = np.random.default_rng(3).permutation(rows)
    ids = np.array([b"id-%06d" % number for number in numbers], dtype="S64")
    order = rank_rows(np.full(rows, score, np.float32), np.arange(rows, dtype=np.int32), ids)
    assert numbers[order].tolist() == list(range(rows))


def test_order_does_not_depend_on_the_order_of_rows() -> None:
    random = np.random.default_rng(5)
    rows = 5_000
    scores = random.integers(0, 50, rows).astype(np.float32) / 50
    slots = np.arange(rows, dtype=np.int32)
    ids = np.array([b"%d" % number for number in random.permutation(rows)], dtype="S64")
    shuffled = random.permutation(rows)
    expected = rank_rows(scores, slots, ids)
    np.testing.assert_array_equal(rank_rows(scores[shuffled], slots[shuffled], ids[shuffled]), expected)
