"""`liverank bench scale`: what one more stream costs: per reply, in memory, at start; and an event by batch size.

A fresh server per size. CPU is the server's user and system time (/proc); what its ticks and score refreshes use
meanwhile counts, because a larger table makes them dearer. `idle_cores` tells how much that is.
Floor: memory: the embedding alone, 4 bytes per dimension. Reply: the smallest table of the same run.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from liverank.v1 import ingest_pb2 as pb
from rich.console import Console
from rich.table import Table

from loadtest.bench.catalogue import DIM, as_bytes, event_batches, make_catalogue, rank_requests
from loadtest.bench.contestants import CALL_TIMEOUT_S, OLDEST_MS, our_settings
from loadtest.bench.event_columns import as_messages, draw
from loadtest.bench.fill import wait_until_scored
from loadtest.bench.filled import where
from loadtest.bench.load import closed_loop
from loadtest.processes import Server, cpu_seconds, rss_bytes, running_server

SIZES, FULL_SIZES = (1_000, 10_000, 100_000), (1_000, 10_000, 100_000, 1_000_000)
BATCHES = (1, 10, 100, 1_000, 10_000)
QUERIES, CALLERS = 256, 8
CPU_RESOLUTION_S = 0.01
START_WITHIN_S = 600.0


def run_scale(
    sizes: tuple[int, ...] = SIZES, seconds: float = 4.0, events: int = 40_000, batches: tuple[int, ...] = BATCHES
) -> int:
    """Prints tables and, last, a line of JSON. Returns 0.

    seconds: of each measurement. events: at most, per batch size.
    """
    told = where()
    rows = [_size(n, seconds, events, batches) for n in sizes]
    result = {
        "bench": "scale",
        "floor": f"memory: {4 * DIM} bytes of embedding per stream; reply: the smallest table",
        **told,
        "rows": rows,
    }
    _print(result)
    return 0


def _size(n: int, seconds: float, events: int, batches: tuple[int, ...]) -> dict[str, Any]:
    row: dict[str, Any] = {"streams": n}
    settings: dict[str, dict[str, Any]] = our_settings(n)
    with tempfile.TemporaryDirectory(prefix="liverank-bench-") as folder:
        row["start_empty_s"] = _timed_start(Path(folder) / "empty", settings)
        begun_s = time.monotonic()
        with running_server(Path(folder) / "server", settings, START_WITHIN_S) as server:
            empty_bytes = rss_bytes(server.process.pid)
            with grpc.insecure_channel(server.address) as channel:
                row |= _fill(channel, n)
                row["ready_s"] = round(time.monotonic() - begun_s, 2)
                row["bytes_per_stream"] = round((rss_bytes(server.process.pid) - empty_bytes) / n)
                row["rss_mb"] = round(rss_bytes(server.process.pid) / 1e6, 1)
                row |= _replies(server, channel, seconds)
                row["events"] = [_events(server, channel, n, size, events, seconds) for size in batches]
        row["start_recovering_s"] = _timed_start(Path(folder) / "server", settings)
    return row


def _timed_start(folder: Path, settings: dict[str, dict[str, Any]]) -> float:
    begun_s = time.monotonic()
    with running_server(folder, settings, START_WITHIN_S):
        return round(time.monotonic() - begun_s, 2)


def _fill(channel: grpc.Channel, n: int) -> dict[str, Any]:
    """Batches are made as they are sent: a million streams at once would not fit beside the server."""
    begun_s, accepted = time.monotonic(), 0
    publish = channel.stream_stream("/liverank.v1.Ingest/Publish")
    batches = (b.SerializeToString() for b in event_batches(make_catalogue(n, OLDEST_MS), int(time.time() * 1000)))
    for ack in publish(batches):
        accepted += pb.PublishAck.FromString(ack).accepted
    if accepted != 2 * n:
        raise RuntimeError(f"scale: the server accepted {accepted} of {2 * n} events")
    filled_s = time.monotonic() - begun_s
    wait_until_scored(channel)
    return {"fill_s": round(filled_s, 2)}


def _replies(server: Server, channel: grpc.Channel, seconds: float) -> dict[str, Any]:
    method = channel.unary_unary("/liverank.v1.Ranking/Rank")
    requests = as_bytes(rank_requests(QUERIES))
    pid = server.process.pid
    used_s, begun_s = cpu_seconds(pid), time.monotonic()
    time.sleep(seconds / 2)  # nobody asks: what is used now is the price of being there
    idle = (cpu_seconds(pid) - used_s) / (time.monotonic() - begun_s)
    closed_loop(lambda r: method(r, timeout=CALL_TIMEOUT_S), requests, CALLERS, seconds / 4)
    lone = closed_loop(lambda r: method(r, timeout=CALL_TIMEOUT_S), requests, 1, seconds / 2)
    used_s = cpu_seconds(pid)
    busy = closed_loop(lambda r: method(r, timeout=CALL_TIMEOUT_S), requests, CALLERS, seconds)
    used_s = cpu_seconds(pid) - used_s
    if not busy.answered:
        raise RuntimeError(f"scale: no call was answered: {busy.errors}")
    return {
        "idle_cores": round(idle, 4),
        "lone_p50_ms": round(lone.p50_ms, 3),
        "rps": round(busy.per_s),
        "p50_ms": round(busy.p50_ms, 2),
        "p99_ms": round(busy.p99_ms, 2),
        "cpu_ms_per_reply": round(max(used_s, CPU_RESOLUTION_S) * 1000 / busy.answered, 4),
        "errors": busy.errors,
    }


def _events(
    server: Server, channel: grpc.Channel, streams: int, size: int, events: int, seconds: float
) -> dict[str, Any]:
    """One producer, one batch after another; stops when the time is up."""
    # Small batches wait for an fsync each: fewer of them tell as much.
    rows = draw(max(size, min(events, 500 * size)), streams, int(time.time() * 1000), np.random.default_rng(size))
    parts = list(rows.parts(size))
    payloads = [as_messages(rows, part, f"scale-{size}", 1 + part.start) for part in parts]
    ends_at_s = time.monotonic() + seconds

    def outgoing() -> Iterator[bytes]:
        for payload in payloads:
            if time.monotonic() > ends_at_s:
                return
            yield payload

    pid = server.process.pid
    used_s, begun_s = cpu_seconds(pid), time.monotonic()
    accepted = 0
    for ack in channel.stream_stream("/liverank.v1.Ingest/Publish")(outgoing()):
        accepted += pb.PublishAck.FromString(ack).accepted
    wall_s, used_s = time.monotonic() - begun_s, cpu_seconds(pid) - used_s
    if not accepted:
        raise RuntimeError(f"scale: no event of batches of {size} was accepted")
    return {
        "batch": size,
        "events": accepted,
        "events_per_s": round(accepted / wall_s),
        "cpu_us_per_event": round(max(used_s, CPU_RESOLUTION_S) / accepted * 1e6, 2),
    }


def _print(result: dict[str, Any]) -> None:
    console = Console(width=140, highlight=False)
    table = Table(title=f"By number of live streams; {CALLERS} callers, closed loop")
    columns = {
        "streams": "live", "start_empty_s": "start s", "start_recovering_s": "start from log s",
        "ready_s": "filled and scored s",
        "bytes_per_stream": "B/stream", "idle_cores": "idle cores", "lone_p50_ms": "lone p50", "rps": "replies/s",
        "p99_ms": "p99", "cpu_ms_per_reply": "CPU ms/reply",
    }  # fmt: skip
    for title in columns.values():
        table.add_column(title, justify="right")
    for row in result["rows"]:
        table.add_row(*(f"{row[key]:,}" for key in columns))
    console.print(table)
    sizes = [entry["batch"] for entry in result["rows"][0]["events"]]
    table = Table(title="Server CPU per event, µs (events/s), by batch size; one producer, each batch acknowledged")
    for title in ("live", *(f"{size:,}" for size in sizes)):
        table.add_column(title, justify="right")
    for row in result["rows"]:
        cells = (f"{e['cpu_us_per_event']:,.1f} ({e['events_per_s']:,})" for e in row["events"])
        table.add_row(f"{row['streams']:,}", *cells)
    console.print(table)
    console.print(
        f"Floor: {result['floor']}. {result['machine']}, commit {result['commit']}; the client {result['client']}."
    )
    print(json.dumps(result))
