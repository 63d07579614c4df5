"""`liverank bench kernels --quick` measures every kernel and ends with JSON; how fast they are is not tested."""

from __future__ import annotations

import json
import subprocess
import sys

from loadtest.processes import ROOT

PER_REQUEST = {"retrieve", "retrieve_float32", "merge", "blend", "slate", "verify", "encode"}
PER_TABLE = {"eligible", "groups", "distinct", "features", "rules"}
PER_EVENT = {"lookup", "fence", "scatter", "observe"}


def test_the_last_line_is_json_with_a_row_per_kernel_and_batch() -> None:
    command = [sys.executable, "-m", "server", "bench", "kernels", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["bench"] == "kernels" and report["quick"] is True and report["threads"] == 1
    kernels = {name: rows for name, rows in report.items() if isinstance(rows, list)}
    assert set(kernels) == PER_REQUEST | PER_TABLE | PER_EVENT
    for name, rows in kernels.items():
        assert all(row["n"] == 10_000 and row["ms"] > 0 and row["ratio"] > 0 for row in rows), name
        if name in PER_REQUEST:
            assert [row["b"] for row in rows] == [1, 32]
        if name in PER_EVENT:
            assert all(row["events_per_s"] > 0 for row in rows)
    assert set(kernels["retrieve"][0]) == {"n", "b", "ms", "matmul_ms", "ratio", "runs"}
    assert set(kernels["merge"][0]) == {"n", "b", "ms", "floor_ms", "bytes", "copy_gb_per_s", "ratio", "runs"}


def test_it_refuses_to_measure_with_threads_it_did_not_choose() -> None:
    program = "import numpy; from loadtest.bench.kernels import run_kernels; run_kernels(True)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "before NumPy is imported" in done.stderr
