"""Schedules and percentiles of the load tools: arithmetic that every figure rests on."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.bench.load import nearest_rank
from loadtest.bench.openloop import UNSENT, open_loop_at
from loadtest.load.record import seconds, totals
from loadtest.load.schedule import Schedule, Segment
from tests.unit.test_bench_load import FakeServer

rates = st.floats(0.0, 300.0)
segments = st.builds(Segment, st.floats(0.05, 5.0), rates, rates)
schedules = st.lists(segments, min_size=1, max_size=5).map(Schedule)


@given(schedules)
@settings(max_examples=200)
def test_arrivals_ascend_within_the_schedule_and_are_as_many_as_its_area(schedule: Schedule) -> None:
    due_s = schedule.due_s()
    area = sum(s.duration_s * (s.begin_per_s + s.end_per_s) / 2 for s in schedule.segments)
    assert len(due_s) == schedule.count and abs(len(due_s) - area) <= 1
    assert np.all(np.diff(due_s) >= 0)
    assert not len(due_s) or (due_s[0] >= 0 and due_s[-1] <= schedule.duration_s + 1e-9)


@given(schedules, st.floats(0.0, 1.0))
@settings(max_examples=200)
def test_what_is_due_by_a_time_is_what_is_due_before_it(schedule: Schedule, share: float) -> None:
    t_s = share * schedule.duration_s
    counted = schedule.due_by(t_s)
    due_s = schedule.due_s()
    assert np.searchsorted(due_s, t_s - 1e-6) - 1 <= counted <= np.searchsorted(due_s, t_s + 1e-6, side="right") + 1
    assert schedule.due_by(schedule.duration_s) == schedule.count and schedule.due_by(-1.0) == 0


@given(st.floats(0.1, 500.0), st.floats(0.1, 5.0))
def test_a_constant_rate_is_due_at_i_over_the_rate(rate: float, duration_s: float) -> None:
    due_s = Schedule.constant(rate, duration_s).due_s()
    np.testing.assert_allclose(due_s, np.arange(len(due_s)) / rate, atol=1e-9)


def test_a_ramp_has_few_arrivals_at_its_low_end_and_many_at_its_high_end() -> None:
    up, down = Schedule([Segment(10.0, 0.0, 100.0)]), Schedule([Segment(10.0, 100.0, 0.0)])
    assert up.count == down.count == 500
    assert np.count_nonzero(up.due_s() < 5.0) == 125 and np.count_nonzero(down.due_s() < 5.0) == 375
    assert (up.rate_at(2.5), down.rate_at(2.5), up.rate_at(10.0)) == (25.0, 75.0, 0.0)


def test_a_pause_has_no_arrivals_and_those_after_it_come_after_it() -> None:
    schedule = Schedule([Segment(1.0, 10.0, 10.0), Segment(2.0, 0.0, 0.0), Segment(1.0, 5.0, 5.0)])
    due_s = schedule.due_s()
    assert len(due_s) == 15 and not np.any((due_s > 1.0) & (due_s < 3.0)) and due_s[10] == 3.0


@pytest.mark.parametrize("wrong", [(0.0, 1.0, 1.0), (1.0, -1.0, 1.0), (1.0, 1.0, math.inf), (math.nan, 1.0, 1.0)])
def test_a_segment_out_of_range_is_refused(wrong: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="wanted, got"):
        Segment(*wrong)


def test_a_stall_on_a_rising_rate_counts_for_every_call_that_became_due_meanwhile() -> None:
    server = FakeServer(0.0001, stalls_at=100)
    due_s = Schedule([Segment(4.0, 100.0, 900.0)]).due_s()
    seen = open_loop_at(lambda i: server.ask(b""), due_s, callers=1, clock=server.clock, wait=server.wait)
    stalled_from_s = due_s[100]
    meanwhile = np.count_nonzero((due_s >= stalled_from_s) & (due_s < stalled_from_s + 0.9))
    slow = np.flatnonzero(seen.latency_s > 0.1)
    assert slow[0] == 100 and len(slow) >= meanwhile > 200
    assert seen.late_s[101] == pytest.approx(1.0001 - (due_s[101] - due_s[100]))
    assert not seen.awaited[101 : 101 + meanwhile].any(), "the only caller was waiting for its reply"
    assert seen.awaited[:100].all() and seen.late_s[:100].max() < 1e-9
    # The second in which they were due shows it, not the one in which they were answered.
    columns = seconds(seen.due_s, seen.latency_s, seen.outcome != 0)
    assert columns["max_ms"][int(stalled_from_s)] == pytest.approx(1000.1, abs=0.1)
    assert columns["p50_ms"][3] < 1.0


def test_calls_given_up_are_named_and_count_as_infinitely_slow() -> None:
    server = FakeServer(0.5)
    due_s = Schedule.constant(10.0, 1.0).due_s()
    seen = open_loop_at(lambda i: None, due_s, callers=1, clock=server.clock, wait=server.wait)
    assert seen.report().unsent == 0
    seen = open_loop_at(
        lambda i: server.ask(b""), due_s, callers=1, overrun_s=1.0, clock=server.clock, wait=server.wait
    )
    report = seen.report()
    assert report.unsent == np.count_nonzero(seen.outcome == UNSENT) > 0
    assert math.isfinite(report.p99_ms) and report.promised_ms(99) == math.inf
    assert report.promised_ms(10) == report.latencies_s[0] * 1000


def test_what_is_looked_at_in_a_reply_is_not_part_of_its_latency() -> None:
    server = FakeServer(0.001)
    looked: list[tuple[int, object]] = []

    def look(number: int, answer: object) -> None:
        looked.append((number, answer))
        server.now_s += 0.004

    due_s = Schedule.constant(100.0, 1.0).due_s()
    seen = open_loop_at(
        lambda i: server.ask(b"%d" % i), due_s, callers=1, look=look, clock=server.clock, wait=server.wait
    )
    assert seen.report().percentile_ms(100) == pytest.approx(1.0)
    assert looked == [(i, b"%d" % i) for i in range(100)]


def test_a_schedule_that_does_not_ascend_is_refused() -> None:
    for wrong in ([], [1.0, 0.5], [-1.0, 0.0]):
        with pytest.raises(ValueError, match="due_s"):
            open_loop_at(lambda i: None, np.array(wrong))


latencies = st.lists(st.floats(0.0, 10.0), max_size=60).map(lambda values: np.sort(np.array(values, np.float64)))


@given(latencies, st.integers(0, 30), st.floats(0.1, 100.0), st.floats(0.1, 100.0))
def test_a_percentile_is_a_measured_value_and_grows_with_its_share_and_with_failures(
    values: np.ndarray, failed: int, q: float, r: float
) -> None:
    low, high = sorted((q, r))
    if len(values) + failed == 0:
        assert math.isnan(nearest_rank(values, failed, q))
        return
    at_low, at_high = nearest_rank(values, failed, low), nearest_rank(values, failed, high)
    assert at_low <= at_high <= nearest_rank(values, failed + 1, high)
    assert at_low in values or at_low == math.inf
    exceeding = np.count_nonzero(values > at_low) + (failed if at_low < math.inf else 0)
    assert exceeding <= (1 - low / 100) * (len(values) + failed) + 1e-6
    assert (nearest_rank(values, failed, 100.0) == math.inf) == (failed > 0)


@given(latencies.filter(len), st.sampled_from([1.0, 25.0, 50.0, 90.0, 99.0, 100.0]))
def test_without_failures_a_percentile_is_that_of_numpy(values: np.ndarray, q: float) -> None:
    assert nearest_rank(values, 0, q) == np.percentile(values, q, method="inverted_cdf")


def test_totals_are_plain_and_failures_reach_the_upper_percentiles_only() -> None:
    latency_s = np.array([0.001] * 95 + [math.nan] * 5)
    entry = totals(latency_s)
    assert (entry["due"], entry["answered"], entry["failed"]) == (100, 95, 5)
    assert entry["p50_ms"] == entry["p90_ms"] == 1.0 and entry["p99_ms"] is None and entry["max_ms"] is None
    assert entry["curve"]["q"][-1] == 100.0 and 99.9 not in entry["curve"]["q"], "too few calls to tell"
    assert totals(np.empty(0))["p50_ms"] is None
    assert seconds(np.empty(0), np.empty(0), np.empty(0, np.bool_))["t_s"] == []


def test_a_second_without_calls_is_there_and_empty() -> None:
    columns = seconds(np.array([0.5, 2.5]), np.array([0.001, math.nan]), np.array([False, True]))
    assert columns["t_s"] == [0.0, 1.0, 2.0] and columns["due"] == [1, 0, 1] and columns["failed"] == [0, 0, 1]
    assert columns["p50_ms"] == [1.0, None, None]
