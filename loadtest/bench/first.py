"""First honest figures: Rank at several sizes of the table, ingest, memory, start-up.

A real server process over loopback gRPC, scored in process by the shipped model; the load comes from this
process, so on a small machine both share the cores. Closed loop: latency is that of a caller who waits.
Floor: `bench serve` will measure the transport's; here a constant reply costs 0.12-0.37 ms of CPU.
"""

from __future__ import annotations

import json
import platform
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from liverank.v1 import admin_pb2, admin_pb2_grpc, ingest_pb2, ingest_pb2_grpc, ranking_pb2
from rich.console import Console
from rich.table import Table

from loadtest.processes import ROOT, Server, cpu_seconds, rss_bytes, start_server

DIM, CREATORS, BATCH = 64, 5_000, 2_000
LANGUAGES, CATEGORIES = ("en", "de", "fr", "ja", "id"), tuple(f"category-{i}" for i in range(20))
QUERIES = 256
SECONDS = 6.0


def run_first(sizes: list[int]) -> int:
    """Measures one fresh server per size. Returns 0."""
    rows = [_measure(n) for n in sizes]
    table = Table(title="Rank with 50 results, viewer embedding, one filter in three; closed loop")
    names = {
        "streams": "live", "startup_s": "start s", "fill_events_per_s": "events/s", "bytes_per_stream": "B/stream",
        "lone_p50_ms": "lone p50", "lone_p99_ms": "lone p99", "rps": "replies/s", "busy_p50_ms": "c16 p50",
        "busy_p99_ms": "c16 p99", "cpu_ms_per_reply": "CPU ms/reply",
    }  # fmt: skip
    for title in names.values():
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(*(f"{row[key]:,}" for key in names))
    Console(width=140).print(table)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    print(
        json.dumps(
            {"bench": "first", "commit": commit, "machine": platform.processor() or platform.machine(), "rows": rows}
        )
    )
    return 0


def _measure(streams: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="liverank-bench-") as folder:
        started_s = time.monotonic()
        settings = {"table": {"capacity": streams + 1_000, "lease_ms": 3_600_000}, "scoring": {"mode": "local"}}
        server = start_server(Path(folder), settings)
        row: dict[str, Any] = {"streams": streams, "startup_s": round(time.monotonic() - started_s, 2)}
        try:
            with grpc.insecure_channel(server.address) as channel:
                _fill_and_ask(server, channel, streams, row)
        finally:
            server.stop()
    return row


def _fill_and_ask(server: Server, channel: grpc.Channel, streams: int, row: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    before_bytes = rss_bytes(server.process.pid)
    batches = list(_batches(rng, streams))
    begun_s = time.monotonic()
    accepted = sum(ack.accepted for ack in ingest_pb2_grpc.IngestStub(channel).Publish(iter(batches)))
    row["fill_events_per_s"] = round(accepted / (time.monotonic() - begun_s))
    assert accepted == sum(len(b.events) for b in batches), "every event must be applied"
    _wait_until_scored(channel)
    row["bytes_per_stream"] = round((rss_bytes(server.process.pid) - before_bytes) / streams)
    ask = channel.unary_unary("/liverank.v1.Ranking/Rank")  # bytes in, bytes out: the client costs little
    requests = _requests(rng)
    lone = _load(ask, requests, 1)[0]
    row |= {"lone_p50_ms": _ms(lone, 50), "lone_p99_ms": _ms(lone, 99)}
    used_s = cpu_seconds(server.process.pid)
    busy, wall_s = _load(ask, requests, 16)
    row |= {"rps": round(len(busy) / wall_s), "busy_p50_ms": _ms(busy, 50), "busy_p99_ms": _ms(busy, 99)}
    row["cpu_ms_per_reply"] = round((cpu_seconds(server.process.pid) - used_s) * 1000 / len(busy), 3)


def _batches(rng: np.random.Generator, streams: int) -> Iterator[ingest_pb2.EventBatch]:
    """A start and a viewer count per stream."""
    now_ms = int(time.time() * 1000)
    for first in range(0, streams, BATCH):
        events = []
        for i in range(first, min(first + BATCH, streams)):
            start = ingest_pb2.Event(sequence=2 * i + 1, stream_id=f"stream-{i:07}", epoch=1, event_time_ms=now_ms)
            start.started.creator_id = f"creator-{i % CREATORS}"
            start.started.title = f"Stream number {i}"
            start.started.language = LANGUAGES[i % len(LANGUAGES)]
            start.started.category = CATEGORIES[i % len(CATEGORIES)]
            start.started.embedding.extend(rng.standard_normal(DIM).astype(np.float32))
            count = ingest_pb2.Event(sequence=2 * i + 2, stream_id=f"stream-{i:07}", event_time_ms=now_ms)
            count.viewer_count.count = int(rng.pareto(1.2) * 20)
            events += [start, count]
        yield ingest_pb2.EventBatch(producer_id="bench", events=events)


def _wait_until_scored(channel: grpc.Channel) -> None:
    """Until two full score refreshes began after the fill: the table is then as it would be in service."""
    admin = admin_pb2_grpc.AdminStub(channel)
    begun_ms = admin.Status(admin_pb2.StatusRequest()).now_ms
    pause = threading.Event()
    while True:
        status = admin.Status(admin_pb2.StatusRequest())
        if status.now_ms - status.score_age_ms > begun_ms + 1_000:
            return
        pause.wait(0.1)


def _requests(rng: np.random.Generator) -> list[bytes]:
    return [
        ranking_pb2.RankRequest(
            request_id=f"r{i}",
            viewer_id=f"v{i}",
            viewer_embedding=rng.standard_normal(DIM).astype(np.float32),
            limit=50,
            languages=[LANGUAGES[i % len(LANGUAGES)]] if i % 3 == 0 else [],
        ).SerializeToString()
        for i in range(QUERIES)
    ]


def _load(ask: Any, requests: list[bytes], threads: int) -> tuple[list[float], float]:
    """Seconds per call of ``threads`` callers for SECONDS, and the wall time."""
    taken: list[list[float]] = [[] for _ in range(threads)]
    ends_at = time.monotonic() + SECONDS

    def run(number: int) -> None:
        i = number
        while (begun_s := time.monotonic()) < ends_at:
            ask(requests[i % len(requests)])
            taken[number].append(time.monotonic() - begun_s)
            i += threads

    begun_s = time.monotonic()
    workers = [threading.Thread(target=run, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return [s for calls in taken for s in calls], time.monotonic() - begun_s


def _ms(seconds: list[float], q: float) -> float:
    return round(float(np.percentile(seconds, q)) * 1000, 2)
