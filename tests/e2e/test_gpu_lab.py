"""The script for GPU machines, in its short form, and what it does with steps that fail or hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.backend import visible_gpu
from loadtest.gpu import lab
from loadtest.gpu.lab import Step, last_words, run_steps

ROOT = Path(__file__).resolve().parents[2]


def test_the_short_form_passes_and_leaves_its_results(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [ROOT / "deploy/gpu-lab.sh", out, "--smoke"],
        capture_output=True, text=True, timeout=150, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHON": sys.executable, "LIVERANK_LOG__PATH": str(tmp_path / "events.sqlite3")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "lab.json").read_text())
    assert report == json.loads(done.stdout.splitlines()[-1])
    assert report["passed"] and [step["status"] for step in report["steps"]] == ["passed"] * len(lab.SMOKE)
    assert report["steps"][0]["figures"]["doctor"] == "liverank" and report["versions"]["numpy"]
    assert "passed" in (out / "parity-interpreted.log").read_text()
    assert "| doctor | passed |" in (out / "lab.txt").read_text()


@pytest.mark.skipif(visible_gpu() is not None, reason="there is a GPU")
def test_without_a_gpu_the_long_form_says_so_and_does_nothing(tmp_path: Path) -> None:
    assert lab.main([str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_a_step_that_fails_or_hangs_stops_no_other_and_is_said(tmp_path: Path) -> None:
    def python(program: str) -> tuple[str, ...]:
        return (sys.executable, "-u", "-c", program)

    hang = "import subprocess, sys; print('began'); subprocess.run([sys.executable, '-c', 'input()'], stdin=sys.stdin)"
    steps = (
        Step("fails", python("print('why'); raise SystemExit(3)"), 20.0),
        Step("hangs", python(hang.replace("'input()'", "'import time; time.sleep(600)'")), 1.5),
        Step("passes", python("import os; print('LAB' in os.environ); print('{\"a\": 1}')"), 20.0, {"LAB": "1"}),
    )
    outcomes = {outcome.name: outcome for outcome in run_steps(steps, tmp_path)}
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "fails": "failed", "hangs": "cut off", "passes": "passed",
    }  # fmt: skip
    assert (outcomes["fails"].told, outcomes["hangs"].told) == ("why", "began")
    assert (outcomes["passes"].told, outcomes["passes"].figures) == ("True", {"a": 1})
    (late,) = run_steps(steps[:1], tmp_path, budget_s=0.0)
    assert late.status == "not run"


def test_all_steps_together_stay_under_nine_minutes() -> None:
    assert lab.BUDGET_S + 2 * lab.KILL_AFTER_S < 9 * 60
    assert {step.changes.get("TRITON_INTERPRET", "") for step in lab.ON_GPU} >= {"1", None}


def test_last_words_of_a_log() -> None:
    assert last_words("") == ("", None)
    assert last_words("a\n{not json\n") == ("{not json", None)
    assert last_words('a\n{"b": 2}\n\n') == ("a", {"b": 2})
