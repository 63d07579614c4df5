"""Unit length: compiled and plain agree, whatever the scale."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.unit import to_unit, to_unit_reference


@settings(deadline=None)  # the first call compiles
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=100))
def test_a_vector_gets_length_one_and_its_norm_is_told(values: list[float]) -> None:
    fast, plain = np.array(values, np.float32), np.array(values, np.float32)
    assert to_unit(fast) == pytest.approx(to_unit_reference(plain), rel=1e-12)
    np.testing.assert_allclose(fast, plain, rtol=1e-6, atol=1e-38)
    if any(values):
        assert float(np.linalg.norm(fast.astype(np.float64))) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_a_vector_that_is_not_finite_has_a_norm_that_is_not_finite(odd: float) -> None:
    assert not math.isfinite(to_unit(np.array([1.0, odd, 2.0], np.float32)))


def test_other_arrays_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match="vector: float32"):
        to_unit(np.zeros(4))  # type: ignore[arg-type]
