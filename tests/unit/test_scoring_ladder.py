"""The breaker and the choice of level."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.scoring.ladder import Ladder, Level

FAILURES, OPEN_MS, AGE_MS = 3, 2_000, 15_000


def ladder() -> Ladder:
    return Ladder(FAILURES, OPEN_MS, AGE_MS)


def test_before_any_answer_the_formula_ranks_and_says_why() -> None:
    assessment = ladder().assess(0, None)
    assert assessment.level is Level.FORMULA
    assert assessment.reasons == ("no model answer yet",)


def test_a_good_call_means_no_degradation_and_no_reasons() -> None:
    subject = ladder()
    subject.succeeded(5, "trendiness/7")
    assert subject.assess(5, 5) == subject.assess(10**9, 5)
    assert subject.assess(5, 5).level is Level.NONE
    assert subject.assess(5, 5).reasons == ()
    assert subject.model_version == "trendiness/7"


@pytest.mark.parametrize(
    ("age_ms", "level"), [(0, Level.LAST_GOOD), (AGE_MS, Level.LAST_GOOD), (AGE_MS + 1, Level.FORMULA)]
)
def test_last_good_scores_serve_until_their_maximum_age(age_ms: int, level: Level) -> None:
    subject = ladder()
    subject.succeeded(0, "m/1")
    subject.failed(10, "timeout: too slow")
    assessment = subject.assess(age_ms, 0)
    assert assessment.level is level
    assert assessment.reasons[0] == "timeout: too slow"


def test_without_last_good_scores_a_failure_means_formula() -> None:
    subject = ladder()
    subject.failed(0, "unavailable: down")
    assert subject.assess(0, None).level is Level.FORMULA


def test_breaker_opens_after_failures_in_a_row_only() -> None:
    subject = ladder()
    for _ in range(FAILURES - 1):
        subject.failed(0, "x")
    subject.succeeded(0, "m/1")
    for _ in range(FAILURES - 1):
        subject.failed(0, "x")
        assert subject.may_call(0)
        assert not subject.is_open
    subject.failed(0, "x")
    assert subject.is_open
    assert not subject.may_call(0)
    assert any("breaker open after 3 failures" in reason for reason in subject.assess(0, 0).reasons)


def opened_at(now_ms: int) -> Ladder:
    subject = ladder()
    for _ in range(FAILURES):
        subject.failed(now_ms, "x")
    return subject


def test_open_breaker_lets_one_trial_through_after_its_time() -> None:
    subject = opened_at(1_000)
    assert not subject.may_call(1_000 + OPEN_MS - 1)
    assert subject.may_call(1_000 + OPEN_MS)
    assert not subject.may_call(1_000 + OPEN_MS)


def test_a_good_trial_closes_the_breaker() -> None:
    subject = opened_at(0)
    assert subject.may_call(OPEN_MS)
    subject.succeeded(OPEN_MS + 5, "m/1")
    assert not subject.is_open
    assert subject.may_call(OPEN_MS + 5)
    assert subject.may_call(OPEN_MS + 5)
    assert subject.assess(OPEN_MS + 5, OPEN_MS).level is Level.NONE


def test_a_failed_trial_opens_the_breaker_for_its_full_time_again() -> None:
    subject = opened_at(0)
    assert subject.may_call(OPEN_MS)
    subject.failed(OPEN_MS + 500, "x")
    assert not subject.may_call(2 * OPEN_MS + 499)
    assert subject.may_call(2 * OPEN_MS + 500)


def test_a_trial_that_never_reports_does_not_block_the_next_for_ever() -> None:
    subject = opened_at(0)
    assert subject.may_call(OPEN_MS)
    assert not subject.may_call(2 * OPEN_MS - 1)
    assert subject.may_call(2 * OPEN_MS)


@given(
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 3_000)), max_size=60),
    failures=st.integers(1, 5),
    open_ms=st.integers(1, 4_000),
)
def test_an_open_breaker_never_allows_two_calls_within_its_time(
    steps: list[tuple[bool, int]], failures: int, open_ms: int
) -> None:
    subject = Ladder(failures, open_ms, AGE_MS)
    now_ms, in_a_row, last_failure_ms = 0, 0, 0
    for is_good, later_ms in steps:
        now_ms += later_ms
        allowed = subject.may_call(now_ms)
        assert allowed == (in_a_row < failures or now_ms >= last_failure_ms + open_ms)
        if not allowed:
            continue
        if is_good:
            subject.succeeded(now_ms, "m/1")
            in_a_row = 0
        else:
            subject.failed(now_ms, "x")
            in_a_row, last_failure_ms = in_a_row + 1, now_ms
        assert (subject.assess(now_ms, now_ms).level is Level.NONE) == is_good
