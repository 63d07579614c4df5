"""The server's clock: never back, never a jump, close to the machine's unless that was stepped."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.clock import FOLLOWED_NS, SLEW, SystemClock

S = 1_000_000_000
HOUR = 3_600 * S
START = 1_700_000_000 * S


class Machine:
    """A wall clock and an elapsed-time clock to be moved apart."""

    def __init__(self) -> None:
        self.wall_ns, self.elapsed_ns = START, 5 * S
        self.clock = SystemClock(lambda: self.wall_ns, lambda: self.elapsed_ns)

    def run(self, seconds: float) -> int:
        """Time passes in steps of a second; returns the server's time, ms."""
        whole = int(seconds * S)
        while whole > 0:
            step = min(whole, S)
            self.wall_ns, self.elapsed_ns, whole = self.wall_ns + step, self.elapsed_ns + step, whole - step
            self.clock.now_ms()
        return self.clock.now_ms()


@pytest.mark.parametrize("step_ns", [HOUR, -HOUR])
def test_a_step_of_an_hour_is_neither_followed_nor_hidden(step_ns: int, caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine()
    machine.run(1)
    machine.wall_ns += step_ns
    with caplog.at_level(logging.WARNING):
        assert machine.run(60) == (START + 61 * S) // 1_000_000, "a lease of 15 s took 15 s"
        assert machine.clock.stepped_ms() == step_ns // 1_000_000
        machine.wall_ns -= step_ns
        machine.run(1)
    assert machine.clock.stepped_ms() == 0
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"], "said once each"


@pytest.mark.parametrize("off_ns", [FOLLOWED_NS // 2, -FOLLOWED_NS // 2])
def test_a_small_difference_is_made_up_for_slowly(off_ns: int) -> None:
    machine = Machine()
    machine.wall_ns += off_ns
    soon_ms = machine.run(10)
    assert abs(soon_ms - (START + 10 * S) / 1e6) <= 10_000 * SLEW + 1
    machine.run(2 * abs(off_ns) / S / SLEW)
    assert abs(machine.clock.now_ms() - machine.wall_ns // 1_000_000) <= 1


@given(st.lists(st.tuples(st.integers(-2 * HOUR, 2 * HOUR), st.integers(0, 10 * S)), max_size=30))
def test_it_never_goes_back_and_never_faster_than_it_may(moves: list[tuple[int, int]]) -> None:
    machine, last_ms = Machine(), START // 1_000_000
    for step_ns, passed_ns in moves:
        machine.wall_ns += step_ns + passed_ns
        machine.elapsed_ns += passed_ns
        now_ms = machine.clock.now_ms()
        assert last_ms <= now_ms <= last_ms + passed_ns * (1 + SLEW) / 1e6 + 1
        last_ms = now_ms


def test_a_start_with_a_clock_behind_the_log_begins_at_the_log_and_runs() -> None:
    """Were it to wait for the wall clock, leases would stand still for an hour."""
    machine = Machine()
    log_ms = (START + HOUR) // 1_000_000
    machine.clock.not_before(log_ms)
    assert machine.run(20) == log_ms + 20_000
    machine.clock.not_before(0)
    assert machine.clock.now_ms() == log_ms + 20_000
