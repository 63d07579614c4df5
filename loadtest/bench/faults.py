"""`liverank bench faults`: every scenario of the matrix against real processes, under judged traffic."""

from __future__ import annotations

import json
import platform
import subprocess
import tempfile
import traceback
from pathlib import Path

from rich.console import Console
from rich.table import Table

from loadtest.faults.base import SCENARIOS, Outcome, Scenario
from loadtest.faults.matrix import playable, run_scenario
from loadtest.faults.stage import Stage, open_stage
from loadtest.processes import ROOT

SOAK_S = 600.0
QUICK_SOAK_S = 10.0


def run_faults(names: list[str] | None = None, seconds: float | None = None, quick: bool = False) -> int:
    """Plays the matrix (or only ``names``), prints a table and, last, a line of JSON.

    Args:
        seconds: length of the soak. quick: a soak of ten seconds.

    Returns:
        0; 1 when anything was lost, shown wrongly or not disclosed, or a scenario failed; 2 for an unknown name.
    """
    if unknown := sorted(set(names or ()) - set(SCENARIOS)):
        print(f"unknown: {', '.join(unknown)}; known are {', '.join(SCENARIOS)}")
        return 2
    with tempfile.TemporaryDirectory(prefix="liverank-faults-") as folder, open_stage(Path(folder)) as stage:
        stage.soak_s = seconds or (QUICK_SOAK_S if quick else SOAK_S)
        wanted = [s for s in SCENARIOS.values() if not names or s.name in names]
        can_play = playable(stage)
        skipped = [s.name for s in wanted if s not in can_play]
        outcomes = [_play(stage, s) for s in wanted if s in can_play]
        why = stage.no_triton
    _print(outcomes, skipped, why)
    return 0 if all(outcome.ok for outcome in outcomes) else 1


def _play(stage: Stage, scenario: Scenario) -> Outcome:
    """A scenario that fails is a row of the table, not the end of it."""
    try:
        return run_scenario(stage, scenario)
    except Exception as error:  # noqa: BLE001 - shown in the table, with its traceback above it
        traceback.print_exc()
        return Outcome(scenario.name, 0, 0, None, None, False, f"failed: {error}")


def _print(outcomes: list[Outcome], skipped: list[str], why: str) -> None:
    table = Table(title="Faults: real processes, judged traffic meanwhile")
    for title in ("fault", "lost", "shown wrongly", "degrade s", "recover s", "disclosed", "what was seen"):
        table.add_column(title, justify="left" if title in ("fault", "what was seen") else "right")
    for o in outcomes:
        times = ["-" if s is None else f"{s:.2f}" for s in (o.degrade_s, o.recover_s)]
        style = None if o.ok else "red"
        table.add_row(
            o.name, str(o.lost), str(o.shown_wrongly), *times, "yes" if o.disclosed else "NO", o.note, style=style
        )
    console = Console(width=150)
    console.print(table)
    for o in outcomes:
        for detail in o.details:
            console.print(f"{o.name}: {detail}", style="red")
    if skipped:
        console.print(f"skipped ({why}): {', '.join(skipped)}")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    told = {"bench": "faults", "commit": commit, "machine": platform.processor() or platform.machine()}
    print(json.dumps({**told, "skipped": skipped, "faults": [o.row() for o in outcomes]}))
