"""What the GPU retrieval bench does beside `liverank bench gpu` (tests/parity/test_bench_gpu.py)."""

from __future__ import annotations

from kernels import scan_gpu
from loadtest.bench.gpu_retrieval import SHAPES, SMOKE_SIZES, shape_rows
from tests.device import DEVICE


def test_scan_tiles_can_be_compared_and_the_chosen_ones_stay() -> None:
    before = dict(scan_gpu.SCAN_SHAPES)
    rows = shape_rows(DEVICE, SMOKE_SIZES[1], SHAPES[16][:2])
    assert len(rows) == 2 and all(row["us"] > 0 for row in rows)
    assert before == scan_gpu.SCAN_SHAPES
