"""The bench of the GPU's slate kernels runs every line; how fast they are is not tested."""

from __future__ import annotations

from loadtest.bench.gpu_slate import SMOKE_SIZES, slate_rows
from tests.device import DEVICE


def test_every_kernel_is_measured_against_a_floor() -> None:
    rows = slate_rows(DEVICE, SMOKE_SIZES)
    assert [row["kernel"] for row in rows] == [
        "eligible_rows", "merge_candidates", "select_slates", "verify_picks", "encode_streams", "tally",
    ]  # fmt: skip
    for row in rows:
        assert row["us"] > 0 and row["floor_us"] >= 0 and row["ratio"] > 0
        assert row["bound"] == ("flops" if row["flops"] / 60e12 > row["bytes"] / 3e12 else "bytes")
