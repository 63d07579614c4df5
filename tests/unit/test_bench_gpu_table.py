"""The bench of the table's GPU kernels runs from end to end where there is no GPU; how fast they are is not tested."""

from __future__ import annotations

from kernels.backend import CPU, choose
from loadtest.bench.gpu_table import table_rows
from tests.device import INTERPRETED

KERNELS = {
    "scatter_fast", "scatter_fast_one_row", "scatter_in_order", "scatter_in_order_one_row", "observe",
    "observe_one_row", "apply", "features", "rules", "distinct", "move_landmark",
}  # fmt: skip


def test_every_kernel_is_measured_against_a_floor() -> None:
    rows = table_rows(CPU if INTERPRETED else choose("cuda"), 3e12, sizes=(9, 40), batches=(20,), runs=1)
    assert {(row["kernel"], row["n"]) for row in rows} == {(kernel, n) for kernel in KERNELS for n in (9, 40)}
    for row in rows:
        assert row["ms"] > 0 and row["floor_ms"] > 0 and row["runs"] == 1, row
        per_event = row["kernel"].split("_")[0] in ("scatter", "observe", "apply")
        assert ("events_per_s" in row) == per_event and row.get("events", 20) == 20
