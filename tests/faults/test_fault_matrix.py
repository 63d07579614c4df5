"""The fault matrix, and the liveness checker: right servers pass, each planted bug is found.

One Triton and one server process for all; what a scenario breaks it mends.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from loadtest.faults.base import SCENARIOS, CannotPlay
from loadtest.faults.matrix import run_scenario
from loadtest.faults.soak import slope_per_minute
from loadtest.faults.stage import Stage, open_stage
from loadtest.liveness.check import Verdict, check, find_violations
from loadtest.liveness.run import check_liveness
from loadtest.liveness.traffic import Traffic, TrafficPlan
from tests.faults.planted import BUGS
from tests.triton_server import eventually

JUDGE_TIMES = ("overload",)
"""In test_overload.py."""
ONLY_A_KILL_SHOWS = "acknowledge before it is durable"
PLAN = TrafficPlan(streams_each=12)


def is_enough(seen: Verdict) -> bool:
    """What a checker must have met before it means something that it found nothing."""
    return seen.kills >= 2 and seen.replies > 100 and seen.ends > 5 and seen.lapses > 0


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with open_stage(tmp_path_factory.mktemp("stage"), "tests.faults.planted") as opened:
        yield opened


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name not in JUDGE_TIMES])
def test_nothing_is_lost_or_shown_wrongly_and_all_is_disclosed_when(stage: Stage, name: str) -> None:
    try:
        outcome = run_scenario(stage, SCENARIOS[name])
    except CannotPlay as why:
        pytest.skip(str(why))
    assert (outcome.lost, outcome.shown_wrongly, outcome.disclosed) == (0, 0, True), outcome


def test_the_checker_finds_nothing_while_server_and_triton_are_killed_and_come_back(stage: Stage) -> None:
    verdict = check_liveness(stage, PLAN, seconds=0.0, fault_every_s=0.8, enough=is_enough)
    assert verdict.ok, (verdict.violations, verdict.missing_events, verdict.missed_watch_ends)
    assert is_enough(verdict), verdict.summary()


@pytest.mark.parametrize("bug", [bug for bug in BUGS if bug != ONLY_A_KILL_SHOWS])
def test_the_checker_finds_a_server_that_would(stage: Stage, bug: str) -> None:
    stage.command(f"plant {bug}")
    traffic = Traffic(stage.address, PLAN)
    try:
        eventually(lambda: find_violations(traffic.history, PLAN.lease_ms), what=f"{bug!r} is found")
    finally:
        stage.command("plant none")
        traffic.finish()


def test_the_checker_finds_a_server_that_would_acknowledge_before_it_is_durable(stage: Stage) -> None:
    stage.command(f"plant {ONLY_A_KILL_SHOWS}")
    traffic = Traffic(stage.address, PLAN)
    try:
        eventually(lambda: sum(batch.acked is not None for batch in traffic.history.batches) > 20)
    finally:
        for producer in traffic.producers:
            producer.stop.set()  # nothing is sent again: what was acknowledged is lost for good
        stage.kill_server()
        stage.start_server()
        history = traffic.finish()
    verdict = check(history, PLAN.lease_ms)
    assert verdict.missing_events, "acknowledged, and gone after kill -9"


def test_the_slope_of_a_soak_leaves_its_beginning_out() -> None:
    at_s = [float(i) for i in range(101)]
    filling_then_flat = [min(i, 30.0) for i in at_s]
    assert abs(slope_per_minute(at_s, filling_then_flat)) < 1e-6
    assert slope_per_minute(at_s, [0.5 * i for i in at_s]) == pytest.approx(30.0)
