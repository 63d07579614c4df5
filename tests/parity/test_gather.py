"""Gathered feature rows: reference, NumPy and GPU agree bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels import gather_gpu
from kernels.gather import gather_rows, gather_rows_reference
from tests.device import empty, get, put


@pytest.mark.parametrize(
    ("rows", "batch", "width", "features"), [(1, 1, 1, 1), (50, 3, 70, 31), (9, 5, 0, 4), (40, 2, 33, 64), (0, 2, 3, 5)]
)
def test_gathered_rows_are_those_of_the_reference(rows: int, batch: int, width: int, features: int) -> None:
    rng = np.random.default_rng(rows)
    table = rng.standard_normal((rows, features)).astype(np.float32)
    table[rng.random(table.shape) < 0.1] = np.nan  # a missing feature stays missing
    slots = rng.integers(-1, rows, (batch, width), dtype=np.int32)
    expected = gather_rows_reference(table, slots)
    np.testing.assert_array_equal(gather_rows(table, slots), expected)
    gathered = empty(expected.shape, torch.float32)
    gather_gpu.gather_rows(put(table), put(slots), gathered=gathered)
    np.testing.assert_array_equal(get(gathered), expected)


def test_a_bad_argument_is_refused_by_name() -> None:
    table, slots = np.zeros((3, 2), np.float32), np.zeros((1, 2), np.int32)
    with pytest.raises(ValueError, match=r"slots: must lie in \[-1, 3\)"):
        gather_rows(table, slots + 3)
    with pytest.raises(ValueError, match="features: must be an array of float32"):
        gather_rows(table.astype(np.float64), slots)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"gathered: must have shape \[1, 2, 2\]"):
        gather_gpu.gather_rows(put(table), put(slots), gathered=empty((1, 2, 3), torch.float32))
