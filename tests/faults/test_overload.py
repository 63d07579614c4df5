"""A flood, the scenario ``overload`` of the fault matrix, and what is asked of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loadtest.bench.overload import DEFAULT, QUICK, plan_from
from loadtest.faults.base import SCENARIOS
from loadtest.faults.matrix import run_scenario
from loadtest.faults.overload_faults import faults_of

GOOD = {
    "offered_factor": 9.8, "shed": 900, "shed_with_hint": 900, "other_errors": 0, "errors": {}, "peak_errors": {},
    "goodput_share": 0.9, "accepted_p50_ms": 90.0, "accepted_p99_ms": 150.0, "slo_ms": 200.0, "degraded_share": 1.0,
    "probe_errors": {}, "probe_calls": 100, "check_live_max_ms": 40.0, "health_max_ms": 9.0, "publish_max_ms": 60.0,
    "recovered_s": 0.4,
}  # fmt: skip
BAD = {
    "offered_factor": 1.2, "shed": 0, "shed_with_hint": 899, "other_errors": 1, "errors": {"INTERNAL": 1},
    "peak_errors": {"UNKNOWN": 1}, "goodput_share": 0.05, "accepted_p50_ms": 300.0, "accepted_p99_ms": 201.0,
    "degraded_share": 0.2, "probe_errors": {"health: UNAVAILABLE": 1}, "probe_calls": 0, "check_live_max_ms": 2_500.0,
    "recovered_s": None,
}  # fmt: skip


@pytest.mark.alone
def test_under_a_flood_excess_is_shed_with_a_hint_and_nobody_else_notices(tmp_path: Path) -> None:
    stage: Any = SimpleNamespace(own_folder=lambda name: tmp_path / name, flood=QUICK, no_triton="")  # all that it uses
    outcome = run_scenario(stage, SCENARIOS["overload"])
    assert (outcome.lost, outcome.shown_wrongly, outcome.disclosed) == (0, 0, True), outcome


@pytest.mark.parametrize("name", BAD)
def test_each_figure_of_a_flood_that_is_not_as_it_should_be_is_a_fault(name: str) -> None:
    assert faults_of(GOOD) == []
    assert faults_of({**GOOD, name: BAD[name]})


def test_the_whole_form_asks_for_the_promise_and_the_short_one_for_no_collapse() -> None:
    busy = {**GOOD, "offered_factor": 3.0, "goodput_share": 0.5, "accepted_p99_ms": 400.0}
    assert faults_of(busy, whole=False) == [] and len(faults_of(busy, whole=True)) == 3
    for name in BAD.keys() - {"accepted_p99_ms"}:
        assert faults_of({**GOOD, name: BAD[name]}, whole=False), name


def test_what_is_not_given_on_the_command_line_is_as_planned() -> None:
    assert plan_from(None, None, quick=False) == DEFAULT and plan_from(None, None, quick=True) == QUICK
    assert (plan_from(500, 1.0, quick=True).streams, plan_from(500, 1.0, quick=True).seconds) == (500, 1.0)
