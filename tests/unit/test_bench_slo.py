"""The search for the highest rate that holds, against servers whose capacity is known."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.bench.slo import Trial, find_rate


def server(capacity_rps: float, disturbed: frozenset[int] = frozenset()):
    """Holds every rate up to its capacity; the trials of ``disturbed`` numbers tell the opposite."""
    numbers = itertools.count()

    def measure(rate_rps: float) -> Trial:
        return Trial(rate_rps, (rate_rps <= capacity_rps) != (next(numbers) in disturbed))

    return measure


@given(st.floats(20.0, 40_000.0), st.floats(10.0, 2_000.0))
def test_the_capacity_is_found_within_the_precision(capacity_rps: float, start_rps: float) -> None:
    found = find_rate(server(capacity_rps), start_rps, 50_000.0, precision=0.05)
    if capacity_rps < start_rps / 64:
        assert found.rate_rps <= capacity_rps
        return
    assert found.rate_rps <= capacity_rps < found.ceiling_rps
    assert found.ceiling_rps <= found.rate_rps * 1.05 + 1e-6 and found.why == "found"
    assert len(found.tried) <= 2 * (17 + 6)  # doublings, then halvings of a gap of two


@given(st.floats(100.0, 10_000.0), st.integers(0, 12))
def test_one_disturbed_trial_changes_nothing(capacity_rps: float, disturbed: int) -> None:
    calm = find_rate(server(capacity_rps), 50.0, 50_000.0)
    assert find_rate(server(capacity_rps, frozenset({disturbed})), 50.0, 50_000.0).rate_rps == calm.rate_rps


def test_a_server_that_holds_everything_is_asked_no_more_than_allowed() -> None:
    found = find_rate(server(1e9), 100.0, 1_000.0)
    assert found.rate_rps == 1_000.0 and found.ceiling_rps is None and "still holds" in found.why
    assert max(trial.rate_rps for trial in found.tried) == 1_000.0


def test_a_server_that_holds_nothing_is_given_up() -> None:
    found = find_rate(server(0.0), 100.0, 1_000.0)
    assert found.rate_rps == 0.0 and found.ceiling_rps is not None and "small rate" in found.why


def test_when_time_is_up_the_best_so_far_is_the_answer() -> None:
    left = iter([True] * 7)
    found = find_rate(server(1_000.0), 100.0, 50_000.0, time_left=lambda: next(left, False))
    assert found.rate_rps == 400.0 and len(found.tried) == 7 and found.why == "time is up"


@pytest.mark.parametrize("wrong", [(0.0, 1.0, 0.05), (2.0, 1.0, 0.05), (1.0, 2.0, 0.0)])
def test_numbers_out_of_range_are_refused(wrong: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="wanted"):
        find_rate(server(1.0), *wrong)
