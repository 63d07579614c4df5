"""`liverank bench gpu` where there is no GPU: says so, and its short form runs every part interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kernels.backend import visible_gpu

ROOT = Path(__file__).resolve().parents[2]
Rows = list[dict[str, Any]]
TABLE_KERNELS = {
    "scatter_fast", "scatter_fast_one_row", "scatter_in_order", "scatter_in_order_one_row", "observe",
    "observe_one_row", "apply", "features", "rules", "distinct", "move_landmark",
}  # fmt: skip


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


def every_contestant_is_timed_at_every_size_and_ours_is_exact(rows: Rows) -> None:
    assert rows[0]["contestant"] == "limits" and rows[0]["copy_gb_per_s"] > 0 and rows[0]["tflops"] > 0
    assert ("no measurement" in rows[0]["device"]) == (visible_gpu() is None)
    assert {row["contestant"] for row in rows[1:]} == {"liverank", "torch", "faiss"}
    for contestant in ("liverank", "torch", "faiss"):
        assert [row["batch"] for row in rows if row["contestant"] == contestant] == [1, 3]
    ours = [row for row in rows if row["contestant"] == "liverank"]
    assert all(row["exact"] and row["us"] > 0 and row["over_floor"] > 0 and row["unproven"] == 0 for row in ours)


def every_slate_kernel_is_measured_against_a_floor(rows: Rows) -> None:
    assert [row["kernel"] for row in rows] == [
        "eligible_rows", "merge_candidates", "select_slates", "verify_picks", "encode_streams", "tally",
    ]  # fmt: skip
    for row in rows:
        assert row["us"] > 0 and row["floor_us"] >= 0 and row["ratio"] > 0
        assert row["bound"] == ("flops" if row["flops"] / 60e12 > row["bytes"] / 3e12 else "bytes")


def every_table_kernel_is_measured_against_a_floor(rows: Rows) -> None:
    assert {(row["kernel"], row["n"]) for row in rows} == {(kernel, n) for kernel in TABLE_KERNELS for n in (9, 40)}
    for row in rows:
        assert row["ms"] > 0 and row["floor_ms"] > 0 and row["runs"] == 1, row
        per_event = row["kernel"].split("_")[0] in ("scatter", "observe", "apply")
        assert ("events_per_s" in row) == per_event and row.get("events", 20) == 20


def test_the_short_form_runs_every_part_and_ends_with_json() -> None:
    done = bench("--quick")
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["measured"] is (visible_gpu() is not None)
    every_contestant_is_timed_at_every_size_and_ours_is_exact(report["retrieval"])
    every_slate_kernel_is_measured_against_a_floor(report["slate"])
    every_table_kernel_is_measured_against_a_floor(report["table"])
    (rank,) = report["rank"]
    assert rank["b"] == 2 and rank["on_host"] == {} and rank["device_ms"] > 0 and rank["model_ms"] > 0
