"""What is believed of a model's pace."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.scoring.pace import Pace

SECONDS = st.floats(1e-6, 10.0)


def test_nothing_is_ruled_out_before_the_first_call_nor_after_forgetting() -> None:
    pace = Pace()
    assert pace.rows_in(0.001) > 10**6
    pace.took(10, 1.0)
    assert pace.rows_in(0.5) == 5
    pace.forget()
    assert pace.rows_in(0.001) > 10**6


@given(st.lists(st.tuples(st.integers(1, 10_000), SECONDS), min_size=1, max_size=20))
def test_it_stays_between_the_slowest_and_the_quickest_call(calls: list[tuple[int, float]]) -> None:
    pace = Pace()
    for rows, seconds in calls:
        pace.took(rows, seconds)
    per_row_s = [seconds / rows for rows, seconds in calls]
    assert int(1.0 / max(per_row_s) * 0.999) <= pace.rows_in(1.0) <= 1.0 / min(per_row_s) * 1.001


def test_a_model_that_gets_slower_or_quicker_is_followed_within_some_calls() -> None:
    pace = Pace()
    pace.took(100, 0.1)
    for per_row_s in (0.01, 0.0001):
        for _ in range(25):
            pace.took(100, 100 * per_row_s)
        assert pace.rows_in(1.0) == pytest.approx(1.0 / per_row_s, rel=0.2)


def test_a_call_that_was_stopped_counts_as_a_longer_one() -> None:
    took, stopped = Pace(), Pace()
    took.took(100, 0.025)
    stopped.stopped(100, 0.025)
    assert stopped.rows_in(1.0) < took.rows_in(1.0)
