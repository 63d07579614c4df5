"""The locust file really drives a server: feeds, clicks and a platform, without a failed call."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

from server.clock import SystemClock
from tests.app import Client, running_app

ROOT = Path(__file__).resolve().parents[2]
WANTED = {"Rank": 20, "Publish": 4, "CheckLive": 1}
"""Least calls of each kind."""


def test_users_of_every_kind_get_answers(tmp_path: Path) -> None:
    with running_app(tmp_path, SystemClock(), table={"capacity": 4_000, "embedding_dim": 64}) as client:
        for seconds in (4, 16, 64):  # longer where the machine is busy
            rows = drive(client, seconds, tmp_path / f"run-{seconds}")
            assert not any(int(row["Failure Count"]) for row in rows.values()), rows
            calls = {name: int(rows[name]["Request Count"]) if name in rows else 0 for name in WANTED}
            if all(calls[name] >= least for name, least in WANTED.items()):
                return
    raise AssertionError(f"too few calls in {seconds} s: {calls}")


def drive(client: Client, seconds: int, results: Path) -> dict[str, dict[str, str]]:
    """Runs locust for so long; its statistics by name of the call."""
    done = subprocess.run(
        [
            sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py", "--headless", "-u", "6", "-r", "6",
            "-t", f"{seconds}s", "--host", f"127.0.0.1:{client.app.port}", "--csv", str(results), "--only-summary",
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=seconds + 120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {row["Name"]: row for row in csv.DictReader(results.with_name(f"{results.name}_stats.csv").open())}
