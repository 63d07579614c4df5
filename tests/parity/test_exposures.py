"""Counting what was shown: fast and reference agree, and a wrong slot counts nothing."""

from __future__ import annotations

import numpy as np
import pytest

from kernels.exposures import count_exposures, count_exposures_reference


@pytest.mark.parametrize(("rows", "width"), [(0, 0), (1, 0), (1, 1), (5, 7), (64, 50)])
def test_fast_and_reference_agree(rows: int, width: int) -> None:
    rng = np.random.default_rng(rows)
    slots = rng.integers(-1, 9, (rows, width)).astype(np.int32)  # few rows: the same one many times
    fast = np.full(9, 2**32 - 2, np.uint32)
    slow = fast.copy()
    count_exposures(fast, slots)
    count_exposures_reference(slow, slots)
    np.testing.assert_array_equal(fast, slow)


def test_a_slot_beyond_the_table_is_refused_before_anything_is_counted() -> None:
    exposures = np.zeros(4, np.uint32)
    with pytest.raises(ValueError, match="slots: must be below 4"):
        count_exposures(exposures, np.array([[1, 4]], np.int32))
    assert not exposures.any()
