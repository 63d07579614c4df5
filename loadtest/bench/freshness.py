"""`liverank bench freshness`: from an acknowledged event to the reply that shows it, while the server is busy.

Probes start a stream, look for it until a reply has it, end it and look again, while Rank calls arrive at half the rate
that the server answers at most. Every reply, the load's included, is checked: a request sent after an end was
acknowledged never gets that stream.
Floor: one Rank call at a time on the idle server; what is looked for cannot be seen faster than one call takes.
"""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import numpy as np
from liverank.v1 import ranking_pb2
from rich.console import Console
from rich.table import Table

from loadtest.bench.catalogue import DIM, as_bytes, rank_requests
from loadtest.bench.filled import filled_server, where
from loadtest.bench.load import closed_loop
from loadtest.bench.openloop import open_loop_at
from loadtest.load.prober import Prober
from loadtest.load.record import samples
from loadtest.load.schedule import Schedule

QUERIES, BUSY_CALLERS, LOAD = 256, 16, 0.5
PROBE_EVERY_S = 0.1


def run_freshness(streams: int = 10_000, seconds: float = 30.0, find_s: float = 4.0) -> int:
    """Prints a table and, last, a line of JSON. Returns 1 when a dead stream was shown or a probe failed, else 0."""
    told = where()
    requests = as_bytes(rank_requests(QUERIES))
    ended_at: dict[str, float] = {}
    shown: list[str] = []
    lock = threading.Lock()
    with filled_server(streams) as filled:
        lone = closed_loop(filled.rank, requests, 1, find_s / 2)
        most = closed_loop(filled.rank, requests, BUSY_CALLERS, find_s).per_s
        prober = Prober(filled.channel, "probe", DIM, PROBE_EVERY_S, ended_at.__setitem__)

        def ask(number: int) -> tuple[float, Any]:
            return time.monotonic(), filled.rank(requests[number % len(requests)])

        def look(number: int, answer: tuple[float, Any]) -> None:
            sent_s, payload = answer
            never = float("inf")
            for stream in ranking_pb2.RankResponse.FromString(payload).streams:
                if ended_at.get(stream.stream_id, never) < sent_s:
                    with lock:
                        shown.append(stream.stream_id)

        begun_s = time.monotonic()
        prober.start(begun_s)
        try:
            arrivals = open_loop_at(ask, Schedule.constant(LOAD * most, seconds).due_s(), begun_s=begun_s, look=look)
        finally:
            prober.stop()
            prober.close()
    seen, load = prober.seen, arrivals.report()
    faults = [seen.failure] if seen.failure else []
    if seen.never_visible:
        faults.append(f"{seen.never_visible} probes were never shown")
    if not seen.gone_s:
        faults.append("no probe was finished")
    dead = len(shown) + seen.shown_after_end
    result: dict[str, Any] = {
        "bench": "freshness",
        "visible_p50_ms": samples(seen.visible_s)["p50_ms"],
        "visible_p99_ms": samples(seen.visible_s)["p99_ms"],
        "gone_p50_ms": samples(seen.gone_s)["p50_ms"],
        "gone_p99_ms": samples(seen.gone_s)["p99_ms"],
        "shown_after_end": dead,
        "probes": len(seen.gone_s),
        "floor": "one Rank call at a time on the idle server",
        "floor_p50_ms": round(lone.p50_ms, 3),
        "floor_p99_ms": round(lone.p99_ms, 3),
        "start_acknowledged": samples(seen.start_acked_s),
        "acknowledged_start_to_shown": samples(seen.visible_s),
        "end_acknowledged": samples(seen.end_acked_s),
        "acknowledged_end_to_gone": samples(seen.gone_s),
        "acknowledged_end_to_watch_ended": samples(seen.told_s),
        "never_told": seen.never_told,
        "looks_shed": seen.shed,
        "streams": streams,
        "load": load.summary() | {"arrivals_per_s": round(LOAD * most, 1), "share_of_most": LOAD},
        "faults": faults,
        **told,
    }
    _print(result)
    return 1 if dead or faults or not np.isfinite(load.p50_ms) else 0


def _print(result: dict[str, Any]) -> None:
    console = Console(width=120, highlight=False)
    table = Table(title=f"{result['probes']} probes at {result['load']['arrivals_per_s']:,.0f} Rank calls/s, ms")
    for title in ("from", "to", "p50", "p99", "max"):
        table.add_column(title, justify="left" if title in ("from", "to") else "right")
    for key, begin, end in (
        ("start_acknowledged", "start sent", "acknowledged"),
        ("acknowledged_start_to_shown", "start acknowledged", "first reply that has it"),
        ("end_acknowledged", "end sent", "acknowledged: gone from every later reply"),
        ("acknowledged_end_to_gone", "end acknowledged", "first reply without it (one call)"),
        ("acknowledged_end_to_watch_ended", "end acknowledged", "WatchEnded tells it"),
    ):
        shown = ["–" if result[key][k] is None else f"{result[key][k]:.2f}" for k in ("p50_ms", "p99_ms", "max_ms")]
        table.add_row(begin, end, *shown)
    console.print(table)
    console.print(
        f"Shown after an acknowledged end: {result['shown_after_end']}. Floor: {result['floor']}, p50 "
        f"{result['floor_p50_ms']} ms. {result['machine']}, commit {result['commit']}; client {result['client']}."
    )
    for fault in result["faults"]:
        console.print(f"FAULT: {fault}", markup=False)
    print(json.dumps(result))
