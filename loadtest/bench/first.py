"""First honest figures: Rank at several sizes of the table, ingest, memory, start-up.

A real server process over loopback gRPC, scored in process by the shipped model; the load comes from this
process, so on a small machine both share the cores. Closed loop: latency is that of a caller who waits.
Floor: the constant reply that `bench serve` measures.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console
from rich.table import Table

from loadtest.bench.catalogue import as_bytes, make_catalogue, rank_requests
from loadtest.bench.fill import fill, wait_until_scored
from loadtest.bench.load import closed_loop
from loadtest.processes import Server, cpu_seconds, rss_bytes, start_server
from loadtest.revision import commit, machine
from server.channel import open_channel

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
    print(json.dumps({"bench": "first", "commit": commit(), "machine": machine(), "rows": rows}))
    return 0


def _measure(streams: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="liverank-bench-") as folder:
        started_s = time.monotonic()
        settings = {"table": {"capacity": streams + 1_000, "lease_ms": 3_600_000}, "scoring": {"mode": "local"}}
        server = start_server(Path(folder), settings)
        row: dict[str, Any] = {"streams": streams, "startup_s": round(time.monotonic() - started_s, 2)}
        try:
            with open_channel(server.address) as channel:
                _fill_and_ask(server, channel, streams, row)
        finally:
            server.stop()
    return row


def _fill_and_ask(server: Server, channel: grpc.Channel, streams: int, row: dict[str, Any]) -> None:
    before_bytes = rss_bytes(server.process.pid)
    row["fill_events_per_s"] = round(fill(channel, make_catalogue(streams)))
    wait_until_scored(channel)
    row["bytes_per_stream"] = round((rss_bytes(server.process.pid) - before_bytes) / streams)
    ask = channel.unary_unary("/liverank.v1.Ranking/Rank")  # bytes in, bytes out: the client costs little
    requests = as_bytes(rank_requests(QUERIES))
    lone = closed_loop(ask, requests, 1, SECONDS)
    row |= {"lone_p50_ms": round(lone.p50_ms, 2), "lone_p99_ms": round(lone.p99_ms, 2)}
    used_s = cpu_seconds(server.process.pid)
    busy = closed_loop(ask, requests, 16, SECONDS)
    row["cpu_ms_per_reply"] = round((cpu_seconds(server.process.pid) - used_s) * 1000 / busy.answered, 3)
    row |= {"rps": round(busy.per_s), "busy_p50_ms": round(busy.p50_ms, 2), "busy_p99_ms": round(busy.p99_ms, 2)}
    if failed := lone.errors | busy.errors:
        raise RuntimeError(f"calls failed: {failed}")
