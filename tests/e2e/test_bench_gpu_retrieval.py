"""The GPU retrieval bench runs from end to end wherever it is, and says what is no measurement."""

from __future__ import annotations

from kernels import scan_gpu
from loadtest.bench.gpu_retrieval import SHAPES, SMOKE_SIZES, retrieval_rows, shape_rows
from tests.device import DEVICE, INTERPRETED


def test_every_contestant_is_timed_at_every_size_and_ours_is_exact() -> None:
    rows = retrieval_rows(DEVICE, SMOKE_SIZES)
    assert rows[0]["contestant"] == "limits" and rows[0]["copy_gb_per_s"] > 0 and rows[0]["tflops"] > 0
    assert ("no measurement" in rows[0]["device"]) == INTERPRETED
    for contestant in ("liverank", "torch", "faiss"):
        assert [row["batch"] for row in rows if row["contestant"] == contestant] == [1, 3]
    ours = [row for row in rows if row["contestant"] == "liverank"]
    assert all(row["exact"] and row["us"] > 0 and row["over_floor"] > 0 and row["unproven"] == 0 for row in ours)


def test_scan_tiles_can_be_compared_and_the_chosen_ones_stay() -> None:
    before = dict(scan_gpu.SCAN_SHAPES)
    rows = shape_rows(DEVICE, SMOKE_SIZES[1], SHAPES[16][:2])
    assert len(rows) == 2 and all(row["us"] > 0 for row in rows)
    assert before == scan_gpu.SCAN_SHAPES
