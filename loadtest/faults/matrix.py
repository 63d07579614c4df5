"""Runs scenarios. Importing this fills the matrix."""

from __future__ import annotations

from loadtest.faults import (  # noqa: F401 - they add themselves
    client_faults,
    log_faults,
    model_faults,
    overload_faults,
    server_faults,
    soak,
)
from loadtest.faults.base import CannotPlay, Outcome, Scenario
from loadtest.faults.stage import TRAFFIC, Stage
from loadtest.liveness.check import Verdict, check
from loadtest.liveness.traffic import Traffic


def run_scenario(stage: Stage, scenario: Scenario) -> Outcome:
    """Plays one scenario and judges it together with the history of the traffic meanwhile.

    Raises:
        CannotPlay: not on this machine. TimeoutError: the fault did not show, or its end did not. AssertionError:
        see the scenario.
    """
    if scenario.needs_triton and stage.no_triton:
        raise CannotPlay(stage.no_triton)
    traffic = Traffic(stage.address, TRAFFIC) if scenario.traffic else None
    verdict = Verdict()
    try:
        seen = scenario.run(stage)
    finally:
        if traffic is not None:
            verdict = check(traffic.finish(), TRAFFIC.lease_ms)
    details = verdict.violations + verdict.missing_events + verdict.missed_watch_ends
    return Outcome(
        name=scenario.name,
        lost=seen.lost + len(verdict.missing_events) + len(verdict.missed_watch_ends),
        shown_wrongly=seen.shown_wrongly + len(verdict.violations),
        degrade_s=None if seen.degrade_s is None else round(seen.degrade_s, 3),
        recover_s=None if seen.recover_s is None else round(seen.recover_s, 3),
        disclosed=seen.disclosed,
        note=seen.note,
        details=tuple(details[:10]),
    )
