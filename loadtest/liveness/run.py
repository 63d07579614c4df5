"""`liverank bench liveness`: the checker against real processes that are killed and come back meanwhile."""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from loadtest.faults.stage import WITHIN_S, Stage, open_stage
from loadtest.liveness.check import Verdict, check, tally
from loadtest.liveness.traffic import Traffic, TrafficPlan
from loadtest.processes import wait_for
from loadtest.revision import commit, machine

SHOWN = 10
FAULT_EVERY_S = 4.0
ENOUGH_WITHIN_S = 120.0


def check_liveness(
    stage: Stage,
    plan: TrafficPlan,
    seconds: float,
    fault_every_s: float,
    enough: Callable[[Verdict], bool] = lambda seen: True,
    within_s: float = ENOUGH_WITHIN_S,
) -> Verdict:
    """Traffic on ``stage`` for ``seconds``, and longer until there was ``enough`` of it, but that for ``within_s`` at
    most; every ``fault_every_s`` the server or (by turns) Triton is killed with -9 and started again.

    Returns the verdict on the whole history.
    """
    traffic = Traffic(stage.address, plan)
    pause = threading.Event()
    begun_s = time.monotonic()
    try:
        while True:
            left_s = begun_s + seconds - time.monotonic()
            pause.wait(min(left_s, fault_every_s) if left_s > 0 else fault_every_s)
            over_s = time.monotonic() - begun_s - seconds
            if over_s >= within_s or (over_s >= 0 and enough(tally(traffic.history, plan.lease_ms))):
                break
            if traffic.history.kills % 2 == 0 or stage.no_triton:
                stage.kill_server()
                traffic.history.kills += 1
                stage.start_server()
            else:
                stage.kill_triton()
                traffic.history.kills += 1
                stage.restart_triton()
            # Progress, not only life: replies came after the fault.
            replies = len(traffic.history.replies)
            wait_for(lambda seen=replies: len(traffic.history.replies) > seen, WITHIN_S, "replies after a kill")
    finally:
        history = traffic.finish()
    return check(history, plan.lease_ms)


def run_liveness(seconds: float, fault_every_s: float = FAULT_EVERY_S) -> int:
    """Runs the checker, prints what it found and, last, a line of JSON. Returns 0, or 1 when it found anything."""
    with tempfile.TemporaryDirectory(prefix="liverank-liveness-") as folder, open_stage(Path(folder)) as stage:
        if stage.no_triton:
            print(f"without Triton: {stage.no_triton}")
        verdict = check_liveness(stage, TrafficPlan(), seconds, fault_every_s)
    table = Table(title="Liveness: what producers, rankers and watchers were told")
    for name in verdict.summary():
        table.add_column(name.replace("_", " "), justify="right")
    table.add_row(*(f"{value:,}" for value in verdict.summary().values()))
    console = Console(width=120)
    console.print(table)
    for found in (verdict.violations, verdict.missing_events, verdict.missed_watch_ends):
        for line in found[:SHOWN]:
            console.print(line, style="red")
    told = {"bench": "liveness", "commit": commit(), "machine": machine()}
    print(json.dumps({**told, "seconds": seconds, "triton": not stage.no_triton, **verdict.summary()}))
    return 0 if verdict.ok else 1
