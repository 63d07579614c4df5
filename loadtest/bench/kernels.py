"""Every kernel on this machine's CPU against its floor; one thread.

A search's floor is the bare matrix product of the same shape; the two alternate, so that a disturbance on a shared
machine hits both. The other kernels do little arithmetic: their floor is the bytes that they must read and write
over the bandwidth of a large copy, measured right before and right after each. Each figure is a median. Kernels run
again and again on the same arrays, so a small working set stays in cache and can beat that floor.

This file only measures and reports; it must load before NumPy does. What is measured stands in ``kernel_cases``.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loadtest.bench.kernel_cases import Case

ROOT = Path(__file__).resolve().parent.parent.parent
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
SIZES, QUICK_SIZES = (10_000, 100_000), (10_000,)
BATCHES, QUICK_BATCHES = (1, 8, 32), (1, 32)
BUDGET_S, QUICK_BUDGET_S = 1.5, 0.05
LEAST_RUNS, MOST_RUNS = 5, 400
COPY_BYTES, COPIES = 32 << 20, 5


def run_kernels(quick: bool = False) -> int:
    """Measures all kernels; prints a table and, last, one line of JSON. Returns 0.

    quick: the smaller table only, few runs: shows that it works, not how fast it is.

    Raises:
        RuntimeError: NumPy is loaded already, so the number of its threads is settled.
    """
    if "numpy" in sys.modules:
        raise RuntimeError("bench kernels must set the number of threads before NumPy is imported")
    for name in THREAD_VARIABLES:
        os.environ[name] = "1"
    from loadtest.bench.kernel_cases import cases
    from loadtest.revision import commit, machine

    begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
    rows: dict[str, list[dict[str, Any]]] = {}
    for n in QUICK_SIZES if quick else SIZES:
        for case in cases(n, QUICK_BATCHES if quick else BATCHES):
            rows.setdefault(case.kernel, []).append(_row(case, QUICK_BUDGET_S if quick else BUDGET_S))
    wall_s = time.perf_counter() - begun_s
    _print(rows)
    report = {
        "bench": "kernels",
        "quick": quick,
        "commit": commit(),
        "machine": machine(),
        "threads": 1,
        # Above 1, something used a second thread after all.
        "cpu_per_wall": round((time.process_time() - begun_cpu_s) / wall_s, 2),
        "wall_s": round(wall_s, 1),
        **rows,
    }
    print(json.dumps(report))
    return 0


def _row(case: Case, budget_s: float) -> dict[str, Any]:
    """One line of the report: times in ms, and ``ratio`` of kernel to floor."""
    case.prepare()
    case.run()  # compiles, and warms what can be warm
    copies_s = [] if case.bare else _copies_s()
    taken_s: list[float] = []
    bare_s: list[float] = []
    ends_at = time.perf_counter() + budget_s
    while len(taken_s) < LEAST_RUNS or (time.perf_counter() < ends_at and len(taken_s) < MOST_RUNS):
        case.prepare()
        taken_s.append(_seconds(case.run))
        if case.bare:
            bare_s.append(_seconds(case.bare))
    ms = statistics.median(taken_s) * 1e3
    row: dict[str, Any] = {"n": case.n}
    if case.batch:
        row["b"] = case.batch
    if case.events:
        row |= {"events": case.events, "events_per_s": round(case.events / ms * 1e3)}
    row["ms"] = round(ms, 4)
    if case.bare:
        floor_ms = statistics.median(bare_s) * 1e3
        row["matmul_ms"] = round(floor_ms, 4)
    else:
        # A copy of m bytes reads m and writes m.
        bytes_per_s = 2 * COPY_BYTES / statistics.median(copies_s + _copies_s())
        floor_ms = case.bytes / bytes_per_s * 1e3
        row |= {"floor_ms": round(floor_ms, 5), "bytes": case.bytes, "copy_gb_per_s": round(bytes_per_s / 1e9, 1)}
    return row | {"ratio": round(ms / floor_ms, 2), "runs": len(taken_s)}


def _copies_s() -> list[float]:
    """Seconds of some copies that no cache holds."""
    import numpy as np

    source, target = np.ones(COPY_BYTES, np.uint8), np.zeros(COPY_BYTES, np.uint8)
    return [_seconds(lambda: np.copyto(target, source)) for _ in range(COPIES)]


def _seconds(function: Callable[[], object]) -> float:
    begun_s = time.perf_counter()
    function()
    return time.perf_counter() - begun_s


def _print(rows: dict[str, list[dict[str, Any]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="kernels on one CPU thread; floor: bare matmul for retrieve, else bytes ÷ copy bandwidth")
    for title in ("kernel", "rows", "batch", "ms", "floor ms", "ratio", "events/s"):
        table.add_column(title, justify="left" if title == "kernel" else "right")
    for kernel, lines in rows.items():
        for line in lines:
            floor_ms = line.get("matmul_ms", line.get("floor_ms"))
            rate = f"{line['events_per_s']:,}" if "events_per_s" in line else ""
            table.add_row(
                kernel, f"{line['n']:,}", str(line.get("b", "")), f"{line['ms']:.4f}", f"{floor_ms:.4f}",
                f"{line['ratio']:.2f}", rate,
            )  # fmt: skip
    Console(width=100).print(table)
