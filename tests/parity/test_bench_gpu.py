"""`liverank bench gpu` where there is no GPU: says so, and its short form runs every part interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.backend import visible_gpu

ROOT = Path(__file__).resolve().parents[2]


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "server", "bench", "gpu", *options],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.skipif(visible_gpu() is not None, reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured_and_that_is_said() -> None:
    done = bench()
    assert done.returncode == 2 and "nothing was measured" in done.stderr and not done.stdout


def test_the_short_form_runs_every_part_and_ends_with_json() -> None:
    done = bench("--quick")
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["measured"] is (visible_gpu() is not None)
    contestants = {row["contestant"] for row in report["retrieval"]}
    assert contestants == {"limits", "liverank", "torch", "faiss"}
    assert all(row["exact"] for row in report["retrieval"] if row["contestant"] == "liverank")
    assert {"select_slates", "verify_picks", "encode_streams"} <= {row["kernel"] for row in report["slate"]}
    assert {row["n"] for row in report["table"]} == {64}
    (rank,) = report["rank"]
    assert rank["b"] == 2 and rank["on_host"] == {} and rank["device_ms"] > 0 and rank["model_ms"] > 0
