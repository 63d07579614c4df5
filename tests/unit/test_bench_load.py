"""The benches' load drivers on a clock of the test: what counts as latency, what bounds a run, what is told."""

from __future__ import annotations

import json
import threading

import grpc
import numpy as np
import pytest

from loadtest.bench.load import LoadReport, closed_loop
from loadtest.bench.openloop import open_loop

STALL_S = 1.0


class Refusal(grpc.RpcError):
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.RESOURCE_EXHAUSTED


class FakeServer:
    """Answers after ``service_s``, but stalls for a second at call number ``stalls_at``. Owns the time."""

    def __init__(self, service_s: float, stalls_at: int = -1, refuses_from: int | None = None) -> None:
        self.now_s, self.calls = 0.0, 0
        self._service_s, self._stalls_at, self._refuses_from = service_s, stalls_at, refuses_from

    def clock(self) -> float:
        return self.now_s

    def wait(self, seconds: float) -> None:
        assert seconds > 0
        self.now_s += seconds

    def ask(self, request: bytes) -> bytes:
        number, self.calls = self.calls, self.calls + 1
        self.now_s += self._service_s + (STALL_S if number == self._stalls_at else 0.0)
        if self._refuses_from is not None and number >= self._refuses_from:
            raise Refusal
        return request


def drive(server: FakeServer, rate_per_s: float, seconds: float, **options: float) -> LoadReport:
    """One caller, so that the fake time passes in one order."""
    return open_loop(
        server.ask,
        [b"a", b"b"],
        rate_per_s,
        seconds,
        callers=1,
        clock=server.clock,
        wait=server.wait,
        **options,  # type: ignore[arg-type]
    )


def slow(report: LoadReport) -> int:
    """Calls that took more than 0.1 s."""
    return int(np.count_nonzero(report.latencies_s > 0.1))


def test_a_stall_counts_for_every_request_that_became_due_meanwhile() -> None:
    report = drive(FakeServer(0.0005, stalls_at=100), 1_000, 4.0)
    # 1 s of arrivals is late, and a backlog of 1 s shrinks by half a millisecond per call until it is 0.1 s.
    assert slow(report) == pytest.approx(1_800, abs=5)
    assert report.percentile_ms(100) == pytest.approx(1_000.5)
    assert report.worst_send_delay_s == pytest.approx(0.9995)
    assert report.answered == 4_000


def test_the_closed_loop_sees_the_same_stall_once() -> None:
    server = FakeServer(0.0005, stalls_at=100)
    report = closed_loop(server.ask, [b"a"], 1, 4.0, clock=server.clock)
    assert slow(report) == 1 and report.p99_ms == pytest.approx(0.5)


def test_an_idle_server_is_asked_at_the_constant_rate_and_latency_is_its_own() -> None:
    server = FakeServer(0.002)
    report = drive(server, 100, 2.0)
    assert (report.answered, report.unsent, report.errors) == (200, 0, {})
    assert report.wall_s == pytest.approx(1.992)  # the last request was due at 1.99 s
    assert report.p50_ms == report.p99_ms == pytest.approx(2.0)
    assert report.worst_send_delay_s == pytest.approx(0.0, abs=1e-9)


def test_requests_go_out_without_waiting_for_earlier_replies() -> None:
    both = threading.Barrier(2)
    report = open_loop(lambda _: both.wait(10.0), [b"a"], 1_000, 0.002, callers=2)
    assert report.answered == 2


def test_failed_calls_are_counted_by_code_and_are_not_latencies() -> None:
    report = drive(FakeServer(0.001, refuses_from=30), 100, 1.0)
    assert report.answered == 30 and report.errors == {"RESOURCE_EXHAUSTED": 70}


def test_a_run_ends_although_the_server_cannot_keep_up_and_tells_what_it_did_not_send() -> None:
    server = FakeServer(0.5)
    report = drive(server, 100, 1.0, overrun_s=2.0)
    assert server.now_s == pytest.approx(3.5)  # one call may begin just before time is up
    assert report.answered == 7 and report.unsent == 93


def test_a_run_never_sends_more_calls_than_it_may() -> None:
    server = FakeServer(0.0001)
    assert drive(server, 1_000, 1_000.0, max_calls=50).answered == 50 == server.calls


def test_a_fault_of_the_generator_itself_is_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError):
        open_loop(lambda _: 1 / 0, [b"a"], 10, 0.1)


@pytest.mark.parametrize("wrong", [{"rate_per_s": 0.0}, {"seconds": 0.0}, {"callers": 0}, {"max_calls": 0}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    arguments = {"rate_per_s": 1.0, "seconds": 1.0} | wrong
    with pytest.raises(ValueError, match="must be positive"):
        open_loop(lambda _: None, [b"a"], **arguments)  # type: ignore[arg-type]


def test_a_summary_is_plain_json_even_when_nothing_was_answered() -> None:
    report = drive(FakeServer(0.001, refuses_from=0), 100, 0.1)
    said = json.loads(json.dumps(report.summary(), allow_nan=False))
    assert said["p99_ms"] is None and said["errors"] == {"RESOURCE_EXHAUSTED": 10} and said["achieved_per_s"] == 0
