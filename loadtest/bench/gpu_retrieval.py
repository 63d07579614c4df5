"""Retrieval on the GPU beside what else one would use there: rows for `liverank bench gpu`.

Times are of the device: CUDA events around replays of a captured graph, so that all contestants are free of launch
costs alike (FAISS allocates and synchronises inside, so it is timed eagerly and says so). On a CPU device every line
runs too, interpreted and by the wall clock: a check that the bench works, no measurement.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kernels import scan_gpu
from kernels.canonical_gpu import masked_topk_slow
from kernels.scan_gpu import ScanShape
from kernels.topk_gpu import TopkBuffers, masked_topk, put_rows

DIM = 64
MASKS = 4
ELIGIBLE_SHARE = 0.6
_REPEATS = 5
_CHECKED_QUERIES = 4


@dataclass(frozen=True)
class Size:
    """rows of the table, all in use; queries; hits per query."""

    rows: int
    batch: int
    k: int = 500


SIZES = tuple(Size(rows, batch) for rows in (100_000, 1_000_000) for batch in (1, 32, 256))
SMOKE_SIZES = (Size(300, 1, 10), Size(200, 3, 10))
SHAPES = {
    16: (ScanShape(16, 256, 4, 4), ScanShape(16, 128, 4, 4), ScanShape(16, 128, 4, 6), ScanShape(16, 256, 8, 3)),
    32: (ScanShape(32, 256, 4, 3), ScanShape(32, 128, 4, 4), ScanShape(32, 256, 8, 3)),
    128: (
        ScanShape(128, 128, 8, 3), ScanShape(128, 128, 8, 4), ScanShape(128, 256, 8, 3), ScanShape(64, 128, 4, 3),
        ScanShape(64, 256, 4, 3), ScanShape(128, 128, 4, 3), ScanShape(128, 64, 4, 4),
    ),
}  # fmt: skip
"""Scan tiles worth comparing, by batch bucket; the first of each is in use."""


class Case:
    """A random table, masks and queries of one size on the device, the same for every contestant."""

    def __init__(self, device: torch.device, size: Size) -> None:
        self.size, self.device = size, device
        rows, batch, k = size.rows, size.batch, size.k
        random = torch.Generator(device).manual_seed(7)
        table = torch.randn((rows, DIM), generator=random, device=device)
        table /= table.norm(dim=1, keepdim=True)
        self.queries = torch.randn((batch, DIM), generator=random, device=device)
        self.queries /= self.queries.norm(dim=1, keepdim=True)
        self.eligible = (torch.rand((MASKS, rows), generator=random, device=device) < ELIGIBLE_SHARE).to(torch.uint8)
        self.mask_of = (torch.arange(batch, device=device) % MASKS).to(torch.int32)
        self.params = torch.tensor([0, rows, batch, 0, 0, 0, 0, 0], device=device)
        self.table, self.table16 = torch.zeros_like(table), torch.zeros_like(table, dtype=torch.float16)
        self.longest = torch.zeros(1, device=device)
        put_rows(
            torch.arange(rows, dtype=torch.int32, device=device), table,
            table=self.table, table16=self.table16, longest=self.longest,
        )  # fmt: skip
        self.work = TopkBuffers.allocate(batch, k, rows, DIM, MASKS, device)
        self.slots = torch.empty((batch, k), dtype=torch.int32, device=device)
        self.scores = torch.empty((batch, k), device=device)
        self.unproven = torch.empty(batch, dtype=torch.uint8, device=device)

    def ours(self) -> None:
        masked_topk(
            self.queries, self.table, self.table16, self.longest, self.eligible, self.mask_of, self.size.k,
            self.params, work=self.work, slots=self.slots, scores=self.scores, unproven=self.unproven,
        )  # fmt: skip

    def torch_topk(self) -> None:
        """Matrix product, mask, torch.topk: float16 throughout, which decides ids by rounding."""
        scores = self.queries.to(torch.float16) @ self.table16.T
        scores.masked_fill_(self.eligible[self.mask_of.long()] == 0, float("-inf"))
        torch.topk(scores, min(self.size.k, self.size.rows), dim=1)

    def exact(self) -> bool:
        """Whether ours equals scoring every row canonically, for a few proven queries."""
        self.ours()
        n = min(_CHECKED_QUERIES, self.size.batch)
        slots, scores = self.slots[:n].clone(), self.scores[:n].clone()
        masked_topk_slow(
            self.queries[:n].contiguous(), self.table, self.eligible, self.mask_of[:n].contiguous(), self.size.k,
            self.size.rows, slots=slots, scores=scores,
        )  # fmt: skip
        proven = self.unproven[:n] == 0
        return bool(((slots == self.slots[:n]).all(dim=1) & (scores == self.scores[:n]).all(dim=1))[proven].all())

    def faiss(self) -> Callable[[], None] | None:
        """FAISS's brute force with the masks as columns (what `faiss_gpu` asks it); None without GPU FAISS."""
        from server.errors import ConfigError
        from server.retrieval.faiss_gpu import knn_on_gpu

        try:
            knn = knn_on_gpu()
        except ConfigError:
            return None
        matrix = torch.cat([self.table, (self.eligible.T.float() - 1.0) * 1e30], dim=1)
        one_hot = torch.nn.functional.one_hot(self.mask_of.long(), MASKS).float()
        queries = torch.cat([self.queries, one_hot], dim=1)

        def run() -> None:
            knn(queries, matrix, min(self.size.k + 16, self.size.rows))

        return run


def retrieval_rows(device: torch.device, sizes: Sequence[Size] = SIZES) -> list[dict[str, Any]]:
    """One row per size and contestant, and the measured limits they are held against.

    Keys: contestant, rows, batch, k, us (median of repeats), and for ours floor_us, over_floor, unproven, exact.
    The floor is the larger of reading the float16 table once at the measured copy rate and the arithmetic at the
    measured matrix rate. A table that fits the second-level cache can be read faster than that.
    """
    copied = _copy_rate(device)
    multiplied = _multiply_rate(device)
    rows: list[dict[str, Any]] = [
        {"contestant": "limits", "device": _name(device), "copy_gb_per_s": copied / 1e9, "tflops": multiplied / 1e12}
    ]
    for size in sizes:
        case = Case(device, size)
        about = {"rows": size.rows, "batch": size.batch, "k": size.k}
        floor_us = 1e6 * max(2 * DIM * size.rows / copied, 2 * DIM * size.rows * size.batch / multiplied)
        exact = case.exact()
        unproven = int(case.unproven.sum())
        ours_us = time_us(case.ours, device)
        rows.append(
            {"contestant": "liverank", **about, "us": ours_us, "floor_us": floor_us, "over_floor": ours_us / floor_us,
             "unproven": unproven, "exact": exact}
        )  # fmt: skip
        torch_us = time_us(case.torch_topk, device)
        rows.append({"contestant": "torch", **about, "us": torch_us, "over_ours": torch_us / ours_us})
        run = case.faiss()
        faiss_us = None if run is None else time_us(run, device, captured=False)
        rows.append(
            {"contestant": "faiss", **about, "us": faiss_us, "over_ours": faiss_us and faiss_us / ours_us,
             "note": "not installed with GPU support" if run is None else "eager"}
        )  # fmt: skip
    return rows


def shape_rows(device: torch.device, size: Size, shapes: Sequence[ScanShape]) -> list[dict[str, Any]]:
    """The whole search under other scan tiles, to choose `SCAN_SHAPES` by: one row per shape."""
    case = Case(device, size)
    bucket = min(128, max(16, 1 << (size.batch - 1).bit_length()))
    chosen = scan_gpu.SCAN_SHAPES[bucket]
    rows = []
    try:
        for shape in shapes:
            scan_gpu.SCAN_SHAPES[bucket] = shape
            us = time_us(case.ours, device)
            rows.append({"table_rows": size.rows, "batch": size.batch, **shape._asdict(), "us": us})
    finally:
        scan_gpu.SCAN_SHAPES[bucket] = chosen
    return rows


def time_us(run: Callable[[], Any], device: torch.device, *, captured: bool = True) -> float:
    """Median microseconds of one run: of the device where it has a clock, else of the wall, once."""
    if device.type != "cuda":
        started_s = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - started_s)
    for _ in range(3):  # compile, and let torch take its workspace
        run()
    torch.cuda.synchronize(device)
    step = run
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        step = graph.replay
    runs = max(5, min(200, int(20_000 / max(1.0, _events_us(step, 5)))))
    return statistics.median(_events_us(step, runs) for _ in range(_REPEATS))


def _events_us(step: Callable[[], Any], runs: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(runs):
        step()
    end.record()
    end.synchronize()
    return float(1e3 * begin.elapsed_time(end) / runs)


def _copy_rate(device: torch.device) -> float:
    """Bytes per second of a copy within the device, read and written."""
    source = torch.zeros(1 << 30 if device.type == "cuda" else 1 << 16, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / (1e-6 * time_us(lambda: target.copy_(source), device))


def _multiply_rate(device: torch.device) -> float:
    """Float16 operations per second of a large matrix product of random numbers."""
    n = 8192 if device.type == "cuda" else 64
    a = torch.randn((n, n), device=device).to(torch.float16)
    out = torch.empty_like(a)
    return 2 * n**3 / (1e-6 * time_us(lambda: torch.matmul(a, a, out=out), device))


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu, interpreted: no measurement"
