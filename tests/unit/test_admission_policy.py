"""Limit, quality factor and gate on a clock of the test, with simulated servers."""

from __future__ import annotations

from collections import Counter, deque
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.admission.gate import MAX_RETRY_MS, MIN_RETRY_MS, ROOM_FOR_OTHERS, Admission, ShedReason
from server.admission.limit import ROUND_MS, AdaptiveLimit
from server.admission.quality import QualityFactor
from server.batching.base import Priority, Waiting
from server.config import AdmissionSettings
from server.errors import Overloaded

INTERACTIVE, BATCH = Priority.INTERACTIVE, Priority.BATCH


class Time:
    """Owns the time."""

    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


# --- the limit --------------------------------------------------------------------------------


def simulate(limit: AdaptiveLimit, time: Time, served_per_s: float, offered_per_s: float, seconds: float) -> float:
    """A server that answers first come, first served; mean wait over the second half, ms."""
    queue: deque[float] = deque()
    waits: list[float] = []
    step_s, begun_s = 0.001, time.now_s
    arrivals = served = 0.0
    while (passed_s := time.now_s - begun_s) < seconds:
        time.now_s += step_s
        arrivals += offered_per_s * step_s
        while arrivals >= 1.0:
            arrivals -= 1.0
            limit.in_flight(len(queue) + 1)
            if len(queue) < limit.value:
                queue.append(time.now_s)
        served += served_per_s * step_s
        while served >= 1.0 and queue:
            served -= 1.0
            arrived_s = queue.popleft()
            wait_ms = (time.now_s - arrived_s) * 1000
            limit.waited(1, wait_ms, 0.0)
            if passed_s > seconds / 2:
                waits.append(wait_ms)
        served = min(served, 1.0)
    return sum(waits) / len(waits)


@pytest.mark.parametrize("served_per_s", [300.0, 3_000.0])
def test_under_overload_the_limit_settles_where_the_wait_is_near_its_target(served_per_s: float) -> None:
    time = Time()
    limit = AdaptiveLimit(50.0, 8, 4096, time)
    wait_ms = simulate(limit, time, served_per_s, 10 * served_per_s, 8.0)
    assert 25.0 <= wait_ms <= 60.0
    assert limit.value == pytest.approx(served_per_s * 0.05, rel=0.5), "Little's law"


def judged(
    limit: AdaptiveLimit, time: Time, peak: int, wait_ms: float, served: int = 1, batch_ms: float = 0.0
) -> float:
    """The limit after one round."""
    limit.in_flight(peak)
    time.now_s += ROUND_MS / 1000
    limit.waited(served, served * wait_ms, batch_ms)
    return limit.value


def test_the_first_cut_starts_from_what_was_in_flight_not_from_a_limit_nobody_reached() -> None:
    time = Time()
    limit = AdaptiveLimit(50.0, 8, 4096, time)
    judged(limit, time, peak=300, wait_ms=62.5)
    assert judged(limit, time, peak=100, wait_ms=62.5) == pytest.approx(80.0)


def test_a_single_stall_cuts_nothing_and_two_bad_rounds_in_a_row_do() -> None:
    time = Time()
    limit = AdaptiveLimit(50.0, 8, 128, time)
    for _ in range(5):
        assert judged(limit, time, peak=64, wait_ms=300.0) == 128.0
        assert judged(limit, time, peak=64, wait_ms=10.0) == 128.0
    judged(limit, time, peak=64, wait_ms=300.0)
    assert judged(limit, time, peak=64, wait_ms=300.0) == 32.0


def test_what_a_cut_took_too_much_is_back_in_half_a_second() -> None:
    time = Time()
    limit = AdaptiveLimit(50.0, 8, 128, time)
    for _ in range(2):
        judged(limit, time, peak=64, wait_ms=300.0)
    assert limit.value == 32.0
    for _ in range(4):
        judged(limit, time, peak=64, wait_ms=20.0)
    assert limit.value >= 64.0
    before = limit.value
    judged(limit, time, peak=128, wait_ms=40.0)
    assert limit.value < before + 3, "near the target it grows slowly"


def test_waits_from_before_a_cut_do_not_cut_below_what_the_rate_can_serve_in_time() -> None:
    time = Time()
    limit = AdaptiveLimit(50.0, 8, 4096, time)
    for _ in range(20):
        value = judged(limit, time, peak=1_000, wait_ms=900.0, served=40)
    assert value == pytest.approx(20.0), "400 a second for 50 ms"


def test_a_limit_that_is_not_reached_does_not_grow_and_one_that_is_does() -> None:
    time = Time()
    limit = AdaptiveLimit(50.0, 8, 4096, time)
    judged(limit, time, peak=16, wait_ms=100.0)
    cut = judged(limit, time, peak=16, wait_ms=100.0)
    assert cut == 8.0
    assert judged(limit, time, peak=7, wait_ms=1.0) == cut
    assert judged(limit, time, peak=8, wait_ms=40.0) == cut + 1
    assert judged(limit, time, peak=9, wait_ms=1.0) == (cut + 1) * 1.25


def test_waiting_for_the_batch_in_hand_is_no_overload() -> None:
    time = Time()
    limit = AdaptiveLimit(50.0, 8, 100, time)
    assert judged(limit, time, peak=40, wait_ms=150.0, batch_ms=120.0) == 100
    judged(limit, time, peak=40, wait_ms=200.0, batch_ms=110.0)
    assert judged(limit, time, peak=40, wait_ms=200.0, batch_ms=110.0) == pytest.approx(32.0)


# --- the quality factor -----------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 64), st.integers(0, 64)), max_size=50), st.floats(0.05, 1.0))
def test_the_factor_stays_in_its_bounds(answers: list[tuple[int, int]], floor: float) -> None:
    quality = QualityFactor(floor, 0.01, 95.0, 1_000.0, Time())
    for in_time, too_late in answers:
        quality.answered(in_time, too_late)
        assert floor <= quality.value <= 1.0
        assert quality.at_floor == (quality.value == floor)


def test_the_factor_settles_where_the_wanted_share_is_in_time() -> None:
    quality = QualityFactor(0.05, 0.002, 90.0, 1_000.0, Time())
    late: list[bool] = []
    for i in range(40_000):
        late.append((i * 0.618034) % 1.0 < quality.value * 0.2)  # more candidates, more often late
        quality.answered(*((0, 1) if late[-1] else (1, 0)))
    assert sum(late[20_000:]) / 20_000 == pytest.approx(0.10, abs=0.01)
    assert quality.value == pytest.approx(0.5, abs=0.1)


def test_requests_in_time_that_were_bought_by_shedding_raise_nothing() -> None:
    time = Time()
    quality = QualityFactor(0.25, 0.01, 95.0, 1_000.0, time)
    quality.answered(0, 100)
    assert quality.at_floor
    quality.hold()
    quality.answered(1_000, 0)
    assert quality.at_floor
    time.now_s += 1.0
    quality.answered(10, 0)
    assert quality.value == pytest.approx(0.35)


# --- the gate ---------------------------------------------------------------------------------


class Gate:
    """An admission, and what it shed."""

    def __init__(self, most_calls: int = 100, **changes: Any) -> None:
        self.time, self.shed = Time(), Counter[tuple[ShedReason, Priority]]()
        self.settings = AdmissionSettings(**changes)
        self.admission = Admission(self.settings, 100, most_calls, lambda r, p: self.shed.update([(r, p)]), self.time)

    def call(self, priority: Priority = INTERACTIVE, interactive: int = 0, batch: int = 0) -> Overloaded | None:
        """Asks for a place while so many calls are in the server, each of the caller's own; leaves at once."""
        self.admission._in_hand = {INTERACTIVE: interactive, BATCH: batch}
        self.admission._clients = Counter({"c": interactive} if interactive else {})
        try:
            return self.admission.enter("c", priority)
        finally:
            self.admission._in_hand = dict.fromkeys(Priority, 0)
            self.admission._clients.clear()

    def answer(self, took_ms: float, calls: int = 1, priority: Priority = INTERACTIVE, wait_ms: float = 0.0) -> None:
        came_s = self.time.now_s
        self.time.now_s += took_ms / 1000
        items: list[Waiting[int]] = [
            Waiting([0], "c", priority, came_s, came_s + 10, 0, Future()) for _ in range(calls)
        ]
        self.admission.answered(items, came_s + wait_ms / 1000)

    def to_floor(self, limit: int) -> None:
        """Overloads it until quality is at its floor and the limit at about ``limit``."""
        wait_ms = (self.settings.target_wait_ms + 1_000) / 0.8
        for _ in range(2):  # rounds
            self.call(interactive=round(limit / 0.8) - 1)
            self.answer(wait_ms + 1_000, calls=8, wait_ms=wait_ms)
        assert self.admission.quality == self.settings.quality_floor
        assert self.admission.limit == pytest.approx(limit, abs=1)


def test_nothing_is_shed_while_quality_can_still_be_lowered() -> None:
    gate = Gate()
    gate.answer(1_000, calls=2, wait_ms=900)
    assert 0.25 < gate.admission.quality < 1.0
    assert gate.call(interactive=99) is None and gate.call(BATCH, interactive=99) is None
    assert not gate.shed


def test_calls_beyond_the_limit_lower_quality_at_once_before_their_lateness_is_measured() -> None:
    gate = Gate(most_calls=1_000)
    refused = [gate.call(interactive=100 + i) is not None for i in range(20)]
    assert gate.admission.quality == gate.settings.quality_floor
    assert refused.index(True) < 12 and all(refused[12:15]), "a dozen more came in, not hundreds"


def test_at_the_floor_batch_is_shed_before_interactive_and_then_both() -> None:
    gate = Gate()
    gate.to_floor(limit=20)
    assert gate.call(BATCH, interactive=2) is None
    assert gate.call(BATCH, interactive=15) is not None and gate.call(interactive=15) is None
    assert gate.call(interactive=30) is not None
    assert gate.shed == {(ShedReason.BATCH_FIRST, BATCH): 1, (ShedReason.LIMIT, INTERACTIVE): 1}


def test_the_bound_of_the_queue_holds_at_any_quality() -> None:
    gate = Gate(most_calls=10)
    assert gate.admission.quality == 1.0
    assert gate.call(interactive=9) is None
    assert gate.call(interactive=10) is not None and gate.call(BATCH, batch=10) is not None


def test_batch_says_nothing_about_load() -> None:
    gate = Gate()
    gate.answer(60_000, calls=64, priority=BATCH, wait_ms=59_000)
    assert gate.admission.quality == 1.0 and gate.admission.limit == 100


def test_shedding_batch_does_not_keep_the_quality_of_others_down() -> None:
    gate = Gate()
    gate.to_floor(limit=20)
    assert gate.call(BATCH, interactive=15) is not None
    gate.answer(10, calls=20)
    assert gate.admission.quality > gate.settings.quality_floor


def test_over_the_limit_a_client_with_less_than_its_share_gets_a_place_and_one_with_more_does_not() -> None:
    gate = Gate()
    gate.to_floor(limit=10)
    enter = gate.admission.enter
    for _ in range(10):
        assert enter("flood", INTERACTIVE) is None
    assert isinstance(enter("flood", INTERACTIVE), Overloaded)
    assert enter("quiet", INTERACTIVE) is None
    assert enter("quiet", INTERACTIVE) is None
    assert isinstance(enter("flood", INTERACTIVE), Overloaded)
    for client in ("flood",) * 10 + ("quiet",) * 2:
        gate.admission.leave(client, INTERACTIVE)
    assert enter("flood", INTERACTIVE) is None
    assert gate.shed == {(ShedReason.LIMIT, INTERACTIVE): 1, (ShedReason.CLIENT_SHARE, INTERACTIVE): 1}


def test_clients_with_less_than_their_share_get_a_bounded_number_of_places_beyond_the_limit() -> None:
    gate = Gate(min_limit=50)
    gate.to_floor(limit=50)
    for _ in range(50):
        assert gate.admission.enter("flood", INTERACTIVE) is None
    let_in = [gate.admission.enter(f"new{i}", INTERACTIVE) is None for i in range(30)]
    assert sum(let_in) == ROOM_FOR_OTHERS


def test_the_hint_fits_the_backlog_and_differs_from_call_to_call() -> None:
    gate = Gate(most_calls=10)
    gate.answer(10, calls=100)
    gate.time.now_s += 1.0
    gate.answer(10, calls=1)  # 100 a second were served
    hints = [error.retry_ms for _ in range(50) if (error := gate.call(interactive=50))]
    assert len(hints) == 50 and len(set(hints)) > 20
    assert all(0.7 * 500 <= hint <= 1.3 * 500 for hint in hints), "50 wait, 100 a second are served"


@given(st.integers(0, 10**6), st.integers(0, 300))
def test_hints_are_bounded(waiting: int, served: int) -> None:
    gate = Gate(most_calls=1)
    gate.answer(1_100, calls=served)
    error = gate.admission.full(waiting, BATCH)
    assert MIN_RETRY_MS <= error.retry_ms <= MAX_RETRY_MS
