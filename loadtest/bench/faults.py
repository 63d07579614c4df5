"""`liverank bench faults`: every scenario of the matrix against real processes, under judged traffic."""

from __future__ import annotations

import json
import tempfile
import traceback
from pathlib import Path

from rich.console import Console
from rich.table import Table

from loadtest.bench.overload import DEFAULT as FLOOD
from loadtest.faults.base import SCENARIOS, CannotPlay, Outcome, Scenario
from loadtest.faults.matrix import run_scenario
from loadtest.faults.stage import Stage, open_stage
from loadtest.revision import commit, machine

SOAK_S = 600.0
QUICK_SOAK_S = 10.0


def run_faults(names: list[str] | None = None, seconds: float | None = None, quick: bool = False) -> int:
    """Plays the matrix (or only ``names``), prints a table and, last, a line of JSON.

    Args:
        seconds: length of the soak. quick: a soak of ten seconds, and an overload of a second or two.

    Returns:
        0; 1 when anything was lost, shown wrongly or not disclosed, or a scenario failed; 2 for an unknown name.
    """
    if unknown := sorted(set(names or ()) - set(SCENARIOS)):
        print(f"unknown: {', '.join(unknown)}; known are {', '.join(SCENARIOS)}")
        return 2
    with tempfile.TemporaryDirectory(prefix="liverank-faults-") as folder, open_stage(Path(folder)) as stage:
        stage.soak_s = seconds or (QUICK_SOAK_S if quick else SOAK_S)
        stage.flood = stage.flood if quick else FLOOD
        outcomes, skipped = [], {}
        for wanted in (s for s in SCENARIOS.values() if not names or s.name in names):
            try:
                outcomes.append(_play(stage, wanted))
            except CannotPlay as why:
                skipped[wanted.name] = str(why)
    _print(outcomes, skipped)
    return 0 if all(outcome.ok for outcome in outcomes) else 1


def _play(stage: Stage, scenario: Scenario) -> Outcome:
    """A scenario that fails is a row of the table, not the end of it."""
    try:
        return run_scenario(stage, scenario)
    except CannotPlay:
        raise
    except Exception as error:  # noqa: BLE001 - shown in the table, with its traceback above it
        traceback.print_exc()
        return Outcome(scenario.name, 0, 0, None, None, False, f"failed: {error}")


def _print(outcomes: list[Outcome], skipped: dict[str, str]) -> None:
    table = Table(
        title="Faults: real processes",
        caption="lost: acknowledged events, beyond what the fault itself destroyed. shown wrongly: dead streams. "
        "recover: from the end of the fault to usual answers",
    )
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
    for name, why in skipped.items():
        console.print(f"SKIPPED, hence not shown to hold: {name} ({why})", style="yellow")
    told = {"bench": "faults", "commit": commit(), "machine": machine()}
    print(json.dumps({**told, "skipped": sorted(skipped), "faults": [o.row() for o in outcomes]}))
