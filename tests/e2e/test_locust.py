"""The locust file really drives a server: feeds, clicks and a platform, without a failed call."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

from server.clock import SystemClock
from tests.app import running_app

ROOT = Path(__file__).resolve().parents[2]


def test_users_of_every_kind_get_answers(tmp_path: Path) -> None:
    with running_app(tmp_path, SystemClock(), table={"capacity": 4_000, "embedding_dim": 64}) as client:
        done = subprocess.run(
            [
                sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py", "--headless", "-u", "6", "-r", "6",
                "-t", "6s", "--host", f"127.0.0.1:{client.app.port}", "--csv", str(tmp_path / "run"), "--only-summary",
            ],
            cwd=ROOT, capture_output=True, text=True, timeout=90, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        rows = {row["Name"]: row for row in csv.DictReader((tmp_path / "run_stats.csv").open())}
    for name, least in (("Rank", 20), ("Publish", 4), ("CheckLive", 1)):
        assert int(rows[name]["Request Count"]) >= least and int(rows[name]["Failure Count"]) == 0, rows[name]
