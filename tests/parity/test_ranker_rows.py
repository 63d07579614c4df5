"""What a ranker is asked and what its answer adds: fast and reference agree bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kernels.ranker_rows import (
    StreamRows,
    add_heads,
    add_heads_reference,
    best_of_rows,
    best_of_rows_reference,
    gather_streams,
    gather_streams_reference,
)

FLOATS = st.sampled_from([0.0, -0.0, 1.0, 1.5, -2.0, np.nan, np.inf, -np.inf])  # many equal ones
SHAPES = st.tuples(st.integers(0, 5), st.integers(0, 40))


@settings(max_examples=200, deadline=None)
@given(st.data(), SHAPES, st.integers(0, 45))
def test_the_best_of_each_row_are_those_of_the_reference(data: Any, shape: tuple[int, int], most: int) -> None:
    utility = data.draw(hnp.arrays(np.float32, shape, elements=FLOATS))
    slots = data.draw(hnp.arrays(np.int32, shape, elements=st.integers(-1, 3)))
    asked = data.draw(hnp.arrays(np.bool_, shape[:1]))
    rows, columns = best_of_rows(utility, slots, asked, most)
    expected = best_of_rows_reference(utility, slots, asked, most)
    np.testing.assert_array_equal(rows, expected[0])
    np.testing.assert_array_equal(columns, expected[1])
    assert (slots[rows, columns] >= 0).all() and asked[rows].all()
    wanted = np.minimum((slots >= 0).sum(axis=1), most) * asked
    np.testing.assert_array_equal(np.bincount(rows, minlength=shape[0]), wanted)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(0, 60), st.integers(0, 40), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_gathered_streams_are_those_of_the_reference(streams: int, rows: int, f: int, dim: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    of = StreamRows(
        rng.standard_normal((streams, f)).astype(np.float32), rng.integers(0, 3, (streams, f)).astype(np.uint8),
        rng.standard_normal((streams, dim)).astype(np.float32), rng.integers(0, 9, (streams, 3)),
    )  # fmt: skip
    slots = rng.integers(0, streams, rows).astype(np.int32)
    for found, expected in zip(gather_streams(slots, of), gather_streams_reference(slots, of), strict=True):
        assert found.dtype == expected.dtype and found.flags.c_contiguous
        np.testing.assert_array_equal(found, expected)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(1, 30), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_heads_add_up_as_in_the_reference_and_change_nothing_else(b: int, k: int, h: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    utility = rng.standard_normal((b, k)).astype(np.float32)
    before = utility.copy()
    rows, columns = map(np.ascontiguousarray, np.nonzero(rng.random((b, k)) < 0.5))
    heads = rng.random((len(rows), h), np.float32)
    weights = rng.standard_normal((b, h)).astype(np.float32)
    found = add_heads(utility, rows, columns, heads, weights)
    np.testing.assert_array_equal(found, add_heads_reference(utility, rows, columns, heads, weights))
    np.testing.assert_array_equal(utility, before)


def test_what_is_out_of_range_is_refused_by_name() -> None:
    of = StreamRows(np.zeros((2, 1), np.float32), np.zeros((2, 1), np.uint8), np.zeros((2, 1), np.float32),
                    np.zeros((2, 3), np.int64))  # fmt: skip
    utility, heads, weights = np.zeros((1, 2), np.float32), np.zeros((1, 4), np.float32), np.zeros((1, 4), np.float32)
    for gather in (gather_streams, gather_streams_reference):
        for slot in (-1, 2):
            with pytest.raises(ValueError, match=r"slots: must be in \[0, 2\)"):
                gather(np.array([0, slot], np.int32), of)
    for add in (add_heads, add_heads_reference):
        for row, column in ((1, 0), (0, 2), (-1, 0), (0, -1)):
            with pytest.raises(ValueError, match=r"rows, columns: must be within \(1, 2\)"):
                add(utility, np.array([row]), np.array([column]), heads, weights)
    with pytest.raises(ValueError, match="most: must be at least 0, got -1"):
        best_of_rows(utility, np.zeros((1, 2), np.int32), np.ones(1, np.bool_), -1)
