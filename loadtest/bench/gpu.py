"""`liverank bench gpu`: every kernel beside its floor, the whole rank batch, and what else one would use.

Floors: bytes at the measured copy rate of this device, or flops at its measured matrix rate, whichever takes longer.
Without a GPU only the short form runs, interpreted on the CPU: it proves that the bench works and measures nothing.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from kernels.backend import CPU, Backend, choose, visible_gpu
from kernels.gather_gpu import gather_rows
from loadtest.bench.catalogue import make_catalogue
from loadtest.bench.gpu_retrieval import SIZES as RETRIEVAL_SIZES
from loadtest.bench.gpu_retrieval import SMOKE_SIZES as RETRIEVAL_SMOKE
from loadtest.bench.gpu_retrieval import retrieval_rows, time_us
from loadtest.bench.gpu_slate import SIZES as SLATE_SIZES
from loadtest.bench.gpu_slate import SMOKE_SIZES as SLATE_SMOKE
from loadtest.bench.gpu_slate import slate_rows
from loadtest.bench.gpu_table import table_rows
from loadtest.bench.inprocess import InProcess, fill_in_process
from loadtest.revision import commit
from server.live.queue import DeviceQueue
from server.ranking.device_batch import RankBuffers, bucket_of
from server.ranking.pipeline_gpu import GpuPipeline

RANK_SIZES, RANK_BATCH = (10_000, 100_000, 1_000_000), 256
NO_GPU = 2
"""Exit status: nothing was measured."""
_PROFILED_STREAMS = 100_000
_SMOKE_SETTINGS: dict[str, dict[str, Any]] = {
    "retrieval": {"personal": 8, "trending": 6, "trending_per_group": 1, "followed": 2, "fresh": 2},
    "rank": {"max_limit": 50, "reserve": 2},
}


def run_gpu(quick: bool) -> int:
    """Measures and prints a table per part and, last, one line of JSON. Returns 0, or NO_GPU.

    Args:
        quick: the short form, which also runs interpreted on a CPU.
    """
    name = visible_gpu()
    if name is None and not quick:
        told = "no GPU is visible here, so nothing was measured; --quick checks the bench on the CPU"
        print(f"bench gpu: {told}", file=sys.stderr)
        return NO_GPU
    backend = choose("cuda") if name is not None else CPU
    device = torch.device("cuda" if backend.on_gpu else "cpu")
    started_s = time.monotonic()
    retrieval = retrieval_rows(device, RETRIEVAL_SMOKE if quick else RETRIEVAL_SIZES)
    copied = 1e9 * float(retrieval[0]["copy_gb_per_s"])
    slate = slate_rows(device, SLATE_SMOKE if quick else SLATE_SIZES)
    table = table_rows(backend, copied, (9, 40), (20,), 1) if quick else table_rows(backend, copied)
    rank = rank_rows(backend, (40,), 2, _SMOKE_SETTINGS) if quick else rank_rows(backend)
    parts = {"retrieval": retrieval, "slate": slate, "table": table, "rank": rank}
    for title, rows in parts.items():
        _print(title, rows)
    targets = targets_of(retrieval, table, rank)
    _print("targets, stated for an H100", targets)
    about = {"bench": "gpu", "commit": commit(), "gpu": name, "measured": backend.on_gpu}
    print(json.dumps({**about, "seconds": round(time.monotonic() - started_s, 1), **parts, "targets": targets}))
    return 0


def rank_rows(
    backend: Backend,
    sizes: Sequence[int] = RANK_SIZES,
    viewers: int = RANK_BATCH,
    settings: dict[str, dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """The whole rank batch at each size of the table.

    Keys: n, b, device_ms (the captured queue of kernels), wall_ms (host's preparation, upload, device, copy, last
    check), ranks_per_s (b / wall), device_ranks_per_s, model_ms (gathering the features of every candidate and an
    untrained network of the size of a multi-task ranker, in torch: what a per-request model would add), on_host
    (requests that the host had to rank), profile (device time by kernel, at 100 k).
    """
    return [_rank_row(backend, n, viewers, settings or {}) for n in sizes]


def _rank_row(backend: Backend, streams: int, viewers: int, settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    on_host: Counter[str] = Counter()
    world = fill_in_process(
        make_catalogue(streams, oldest_ms=3_600_000), "exact_gpu", backend,
        lambda reason, n: on_host.update({reason: n}), **settings,
    )  # fmt: skip
    pipeline = world.pipeline
    assert isinstance(pipeline, GpuPipeline)
    batches = [world.batch(viewers, seed) for seed in range(4 if backend.on_gpu else 1)]
    for batch in batches:
        pipeline.rank(batch)
    runs = 50 if backend.on_gpu else 1
    taken_ms = []
    for run in range(runs):
        begun_s = time.perf_counter()
        pipeline.rank(batches[run % len(batches)])
        taken_ms.append(1e3 * (time.perf_counter() - begun_s))
    bucket = bucket_of(viewers)
    assert bucket is not None
    buffers = pipeline.buffers_of(bucket)
    device = buffers.work["slots"].device
    device_ms = 1e-3 * time_us(lambda: pipeline.run(buffers), device, captured=False)
    wall_ms = float(np.median(taken_ms))
    row = {
        "n": streams, "b": viewers, "device_ms": round(device_ms, 4), "wall_ms": round(wall_ms, 4),
        "ranks_per_s": round(1e3 * viewers / wall_ms), "device_ranks_per_s": round(1e3 * viewers / device_ms),
        "model_ms": round(_model_ms(world, buffers), 4), "on_host": dict(on_host),
    }  # fmt: skip
    if backend.on_gpu and streams == _PROFILED_STREAMS:
        row["profile"] = _profile(pipeline, buffers)
    return row


def _model_ms(world: InProcess, buffers: RankBuffers) -> float:
    """Features of all candidates gathered, then a network of four experts and four heads over them, in float16."""
    queue = world.table.accumulators
    assert isinstance(queue, DeviceQueue)
    slots = buffers.work["slots"]
    device, width = slots.device, 64
    half = torch.float16 if device.type == "cuda" else torch.float32
    features = torch.zeros((queue.device.capacity, width), device=device)
    gathered = torch.empty((*slots.shape, width), device=device)
    experts = [(torch.randn((width, 64), device=device, dtype=half), torch.randn((64, 64), device=device, dtype=half))
               for _ in range(4)]  # fmt: skip
    heads = torch.randn((256, 4), device=device, dtype=half)

    def run() -> None:
        gather_rows(features, slots, gathered=gathered)
        rows = gathered.view(-1, width).to(half)
        torch.sigmoid(torch.cat([torch.relu(torch.relu(rows @ a) @ b) for a, b in experts], dim=1) @ heads)

    return 1e-3 * time_us(run, device)


def _profile(pipeline: GpuPipeline, buffers: RankBuffers) -> list[dict[str, Any]]:
    """Device microseconds per kernel of one batch, largest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(20):
            pipeline.run(buffers)
        torch.cuda.synchronize()
    found = [(event.key, event.self_device_time_total / 20) for event in profiler.key_averages()]
    return [{"kernel": key[:60], "us": round(us, 2)} for key, us in sorted(found, key=lambda f: -f[1])[:16] if us > 0]


def targets_of(
    retrieval: list[dict[str, Any]], table: list[dict[str, Any]], rank: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """What was aimed for on an H100 beside what was found: name, wanted, got, met; nothing for sizes not measured."""
    largest = {r["contestant"]: r for r in retrieval[1:] if (r["rows"], r["batch"]) == (1_000_000, 256)}
    whole = next((r for r in rank if (r["n"], r["b"]) == (_PROFILED_STREAMS, RANK_BATCH)), None)
    scattered = [float(r["events_per_s"]) for r in table if "scatter" in r["kernel"] and "events_per_s" in r]
    found: list[tuple[str, str, float, bool]] = []
    if largest:
        over_floor, over_ours = largest["liverank"]["over_floor"], largest["torch"]["over_ours"]
        found.append(("masked top-500 of 1 M, 256 queries: times its floor", "<= 2", over_floor, over_floor <= 2))
        found.append(("the same: torch's time over ours", ">= 3", over_ours, over_ours >= 3))
    if whole is not None:
        found.append(("rank batch of 256 at 100 k, device ms", "<= 4", whole["device_ms"], whole["device_ms"] <= 4))
        found.append(("rank batch of 256 at 100 k, ms in all", "<= 4", whole["wall_ms"], whole["wall_ms"] <= 4))
        found.append(("events scattered per second", ">= 1e8", max(scattered), max(scattered) >= 1e8))
    return [{"target": name, "wanted": wanted, "got": round(got, 3), "met": met} for name, wanted, got, met in found]


def _print(title: str, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row if name != "profile"))
    table = Table(title=title)
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in names))
    Console(width=170).print(table)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
