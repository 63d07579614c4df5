"""`liverank bench recovery`: kill -9, then the seconds until the server says SERVING again.

A log of so many events is written directly (a server would take minutes), a first server replays it whole and takes
snapshots while events go on, then it is killed and started again: that second start is the figure. Reported besides:
how long a snapshot held the engine, how long it took, its size, and the first start, without a snapshot.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
from liverank.v1 import admin_pb2, admin_pb2_grpc, ingest_pb2, ingest_pb2_grpc
from rich.console import Console
from rich.table import Table

from loadtest.bench.catalogue import Catalogue, event_batches, make_catalogue, stream_id
from loadtest.processes import Server, start_server, wait_for
from loadtest.revision import commit, machine
from server.log.base import Record
from server.log.sqlite import SqliteLog

EVENTS_PER_BATCH = 1_000
TAIL_SHARE = 0.01
"""Events published after the last snapshot, as a share of all: what the second start has to replay."""
SNAPSHOTS = 3
WITHIN_S = 3_600.0


def run_recovery(streams: int, events: int) -> int:
    """Measures, prints a table and, last, a line of JSON. Returns 0, or 1 if the restart lost something."""
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="liverank-bench-") as folder:
        result = _measure(Path(folder), streams, events)
    table = Table(title=f"Restart after kill -9: {streams:,} streams, {events:,} events in the log")
    table.add_column("")
    table.add_column("value", justify="right")
    for name, value in result.items():
        table.add_row(name, f"{value:,}")
    Console(width=100).print(table)
    about = {
        "bench": "recovery", "commit": commit(), "machine": machine(),
        "load_average_before": load_before, "streams": streams, "events": events,
    }  # fmt: skip
    print(json.dumps({**about, **result}))
    return 0 if result["lost_records"] == 0 else 1


def _measure(folder: Path, streams: int, events: int) -> dict[str, Any]:
    settings: dict[str, dict[str, Any]] = {
        "table": {"capacity": streams + 1_000, "lease_ms": 3_600_000, "max_lateness_ms": 7_200_000},
        "scoring": {"mode": "local"},
        "snapshot": {"every_ms": 1_000},
        "log": {"retain_records": 1_000_000_000},  # all events stay in the log, although snapshots cover most
    }
    settings["table"]["tombstone_ms"] = 10_800_000
    catalogue = make_catalogue(streams)
    begun_s = time.monotonic()
    _write_log(folder / "events.sqlite3", catalogue, streams, events)
    written_s = time.monotonic() - begun_s
    server, whole_s = _start(folder, settings)
    try:
        ids = [stream_id(i) for i in range(streams)]
        tail = max(1, int(events * TAIL_SHARE) // EVENTS_PER_BATCH)
        for turn in range(SNAPSHOTS):  # taken while events come in, as in service
            offset = _publish(server, ids, turn * tail, tail)
            wait_for(lambda: _metric(server, "liverank_snapshot_offset") >= offset, 120.0, "a snapshot")  # noqa: B023
        pause_s = _metric(server, "liverank_snapshot_pause_seconds_sum")
        count = _metric(server, "liverank_snapshot_pause_seconds_count")
        took_s = _metric(server, "liverank_snapshot_seconds_sum") / count
        worst_ms = _worst_pause_ms(server)
        size_bytes = _metric(server, "liverank_snapshot_bytes")
        offset = _publish(server, ids, SNAPSHOTS * tail, tail)
        snapshot_offset = _metric(server, "liverank_snapshot_offset")
    finally:
        server.process.kill()
        server.process.wait()
    again, serving_s = _start(folder, settings)
    try:
        with grpc.insecure_channel(again.address) as channel:
            status = admin_pb2_grpc.AdminStub(channel).Status(admin_pb2.StatusRequest(), timeout=30.0)
    finally:
        again.process.kill()
        again.process.wait()
    recovered = re.findall(r"recovered to offset \d+ in (\S+) s: snapshot of offset (\d+)", again.log.read_text())[-1]
    return {
        "seconds_to_serving": round(serving_s, 2),
        "of_that_recovery_s": float(recovered[0]),
        "replayed_records": offset - int(recovered[1]),
        "snapshot_pause_mean_ms": round(1e3 * pause_s / count, 2),
        "snapshot_pause_at_most_ms": worst_ms,
        "snapshot_seconds": round(took_s, 2),
        "snapshot_bytes": int(size_bytes),
        "snapshot_lag_records": int(offset - snapshot_offset),
        "log_bytes": sum(p.stat().st_size for p in folder.glob("events.sqlite3*")),
        "without_snapshot_s": round(whole_s, 2),
        "log_written_s": round(written_s, 2),
        "lost_records": int(offset - status.applied_offset),
        "live": status.live,
    }


def _write_log(path: Path, catalogue: Catalogue, streams: int, events: int) -> None:
    """Starts of all streams, then interactions spread over them."""
    now_ms = int(time.time() * 1000)
    log = SqliteLog(path)
    ids = [stream_id(i) for i in range(streams)]
    waiting: list[Record] = []

    def payloads() -> Iterator[bytes]:
        for batch in event_batches(catalogue, now_ms):
            yield batch.SerializeToString()
        for number in range(max(0, events - 2 * streams) // EVENTS_PER_BATCH):
            yield _interactions(ids, "history", number, now_ms).SerializeToString()

    for offset, payload in enumerate(payloads(), start=1):
        waiting.append(Record(offset, now_ms, payload))
        if len(waiting) == 256:
            log.append(waiting)
            waiting = []
    log.append(waiting)
    log.close()


def _interactions(ids: list[str], producer: str, number: int, now_ms: int) -> ingest_pb2.EventBatch:
    """A batch of chats and joins; ``number`` gives its sequences."""
    batch = ingest_pb2.EventBatch(producer_id=producer)
    first = number * EVENTS_PER_BATCH
    for i in range(first, first + EVENTS_PER_BATCH):
        event = batch.events.add(
            sequence=i + 1, stream_id=ids[(i * 7919) % len(ids)], event_time_ms=now_ms, viewer_id=f"v{i % 50_021}"
        )
        (event.chatted if i % 3 else event.joined).count = 1
    return batch


def _publish(server: Server, ids: list[str], first: int, count: int) -> int:
    """Publishes batches ``first`` and on; returns the last offset."""
    with grpc.insecure_channel(server.address) as channel:
        batches = (_interactions(ids, "tail", first + i, int(time.time() * 1000)) for i in range(count))
        return int([ack.offset for ack in ingest_pb2_grpc.IngestStub(channel).Publish(batches)][-1])


def _start(folder: Path, settings: dict[str, dict[str, Any]]) -> tuple[Server, float]:
    begun_s = time.monotonic()
    server = start_server(folder, settings, WITHIN_S)
    return server, time.monotonic() - begun_s


def _scrape(server: Server) -> str:
    url = f"http://127.0.0.1:{server.metrics_port}/metrics"
    return str(urllib.request.urlopen(url, timeout=30.0).read().decode())


def _metric(server: Server, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", _scrape(server), re.MULTILINE)
    return float(found.group(1)) if found else 0.0


def _worst_pause_ms(server: Server) -> float:
    """The smallest bucket bound that no pause exceeded; -1 when one was longer than all."""
    found = re.findall(r'^liverank_snapshot_pause_seconds_bucket\{le="(\S+)"\} (\S+)$', _scrape(server), re.MULTILINE)
    every = float(found[-1][1])
    bound = next(le for le, count in found if float(count) == every)
    return -1.0 if bound == "+Inf" else 1e3 * float(bound)
