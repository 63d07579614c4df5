"""`liverank bench soak`: does it stay as it is? Latency, memory and errors over minutes at 70 % of its best rate.

Rank calls arrive at a constant rate (open loop) and events are published beside them. Memory is read every second (at
least 60 times); its slope has a standard error, because a slope without one says nothing. The first tenth warms up
and is left out.
Floor: the slope of a process that keeps what it has is 0; a slope within two standard errors of it is none.
"""

from __future__ import annotations

import json
import math
import threading
import time
from typing import Any, NamedTuple

import grpc
import numpy as np
from numpy.typing import ArrayLike
from rich.console import Console
from rich.table import Table

from loadtest.bench.catalogue import DIM, as_bytes, rank_requests
from loadtest.bench.filled import Filled, filled_server, where
from loadtest.bench.load import closed_loop, nearest_rank
from loadtest.bench.openloop import open_loop_at
from loadtest.load.fleet import Fleet
from loadtest.load.publisher import Publisher
from loadtest.load.record import plain_ms
from loadtest.load.scenario import DEFAULT_MIX
from loadtest.load.schedule import Schedule
from loadtest.processes import rss_bytes

QUERIES, BUSY_CALLERS, LOAD, WARM_UP = 256, 16, 0.7, 0.1
WINDOWS = 20
FLEET_STREAMS = 200
MAX_CALLS = 5_000_000


class Slope(NamedTuple):
    """Least squares: change of y per unit of x, and its standard error (NaN for fewer than three points)."""

    per_x: float
    error: float

    @property
    def is_none(self) -> bool:
        """Whether it lies within two standard errors of zero."""
        return not abs(self.per_x) > 2 * self.error


def slope(x: ArrayLike, y: ArrayLike) -> Slope:
    """Slope of y over x, both float64[n].

    The error supposes independent residuals; memory moves in steps, so take it as a lower bound.
    """
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    n = len(xs)
    spread = float(((xs - xs.mean()) ** 2).sum()) if n else 0.0
    if n < 2 or spread == 0.0:
        return Slope(math.nan, math.nan)
    per_x = float(((xs - xs.mean()) * (ys - ys.mean())).sum()) / spread
    residual = ys - ys.mean() - per_x * (xs - xs.mean())
    error = math.sqrt(float((residual**2).sum()) / (n - 2) / spread) if n > 2 else math.nan
    return Slope(per_x, error)


def run_soak(
    minutes: float = 10.0,
    rate_rps: float | None = None,
    streams: int = 10_000,
    events_per_s: float = 500.0,
    find_s: float = 5.0,
) -> int:
    """Prints a table and, last, a line of JSON. Returns 1 when calls failed or events were refused, else 0.

    rate_rps: of the Rank calls, as they arrive; None: 70 % of what the server answers to 16 callers.
    """
    told, seconds = where(), minutes * 60
    requests = as_bytes(rank_requests(QUERIES))
    with filled_server(streams, capacity=streams + FLEET_STREAMS + 1_000) as filled:
        rate = rate_rps or LOAD * closed_loop(filled.rank, requests, BUSY_CALLERS, find_s).per_s
        schedule = Schedule.constant(rate, seconds)
        if schedule.count > MAX_CALLS:
            raise ValueError(f"minutes × rate: at most {MAX_CALLS:,} calls allowed, got {schedule.count:,}")
        memory = _Memory(filled, min(1.0, seconds / 60))
        with grpc.insecure_channel(filled.server.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            fleet = Fleet("soak", 4_000, DIM, 1.0, np.random.default_rng(3))
            publisher = Publisher(
                channel, "soak", fleet, Schedule.constant(events_per_s, seconds), lambda t_s: DEFAULT_MIX
            )
            try:
                publisher.now(lambda f, now_ms: f.starts(FLEET_STREAMS, now_ms))
                begun_s, used_s = time.monotonic(), filled.cpu_s
                publisher.start(begun_s)
                memory.start(begun_s)
                arrivals = open_loop_at(
                    lambda i: filled.rank(requests[i % len(requests)]), schedule.due_s(), begun_s=begun_s
                )
                used_s = filled.cpu_s - used_s
            finally:
                memory.stop()
                publisher.stop()
    windows = _windows(arrivals.due_s, arrivals.latency_s, seconds)
    load = arrivals.report()
    late = [w for w in windows if w["t_s"] >= WARM_UP * seconds]
    drift = slope([w["t_s"] / 3600 for w in late if w["p99_ms"]], [w["p99_ms"] for w in late if w["p99_ms"]])
    growth = memory.slope_mb_per_h(WARM_UP * seconds)
    result: dict[str, Any] = {
        "bench": "soak",
        "minutes": minutes,
        "rate_rps": round(rate, 1),
        "p50_ms": plain_ms(load.promised_ms(50) / 1000),
        "p99_ms": plain_ms(load.promised_ms(99) / 1000),
        "first_p99_ms": late[0]["p99_ms"] if late else None,
        "last_p99_ms": late[-1]["p99_ms"] if late else None,
        "p99_drift_ms_per_h": _rounded(drift.per_x),
        "p99_drift_error_ms_per_h": _rounded(drift.error),
        "rss_slope_mb_per_h": _rounded(growth.per_x),
        "rss_slope_error_mb_per_h": _rounded(growth.error),
        "rss_grows": not growth.is_none and growth.per_x > 0,
        "rss_first_mb": round(memory.since(WARM_UP * seconds)[0][1], 1),
        "rss_last_mb": round(memory.bytes_seen[-1] / 1e6, 1),
        "server_cores": round(used_s / arrivals.wall_s, 3),
        "errors": load.errors,
        "unsent": load.unsent,
        "events_accepted": sum(publisher.seen.events),
        "events_refused": dict(publisher.seen.rejected),
        "publish_failure": publisher.seen.failure,
        "streams": streams + FLEET_STREAMS,
        "floor": "no growth: 0 MB/h within two standard errors",
        **told,
        "windows": windows,
    }
    _print(result)
    return 1 if load.failed or publisher.seen.failure or publisher.seen.rejected else 0


class _Memory:
    """Reads the server's resident memory every ``every_s`` seconds."""

    def __init__(self, filled: Filled, every_s: float) -> None:
        self._every_s = every_s
        self.times_s: list[float] = []
        self.bytes_seen: list[int] = []
        self._pid = filled.server.process.pid
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, begun_s: float) -> None:
        def run() -> None:
            while True:
                self.times_s.append(time.monotonic() - begun_s)
                self.bytes_seen.append(rss_bytes(self._pid))
                if self._stop.wait(self._every_s):
                    return

        self._thread = threading.Thread(target=run, name="memory", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5.0)

    def slope_mb_per_h(self, from_s: float) -> Slope:
        kept = self.since(from_s)
        return slope([t for t, _ in kept], [b for _, b in kept])

    def since(self, from_s: float) -> list[tuple[float, float]]:
        """(hours, MB) from then on; the last reading at least."""
        found = [(t / 3600, b / 1e6) for t, b in zip(self.times_s, self.bytes_seen, strict=True)]
        return [(h, mb) for h, mb in found if h * 3600 >= from_s] or found[-1:]


def _windows(due_s: Any, latency_s: Any, seconds: float) -> list[dict[str, Any]]:
    """Latency in equal parts of the run, by due time; failed calls count as infinitely slow (null)."""
    width_s = seconds / WINDOWS
    place = np.minimum((due_s / width_s).astype(np.int64), WINDOWS - 1)
    found = []
    for i in range(WINDOWS):
        mine = latency_s[place == i]
        if len(mine):
            answered = np.sort(mine[~np.isnan(mine)])
            failed = len(mine) - len(answered)
            at = {f"p{q}_ms": plain_ms(nearest_rank(answered, failed, q)) for q in (50, 99)}
            found.append({"t_s": round((i + 0.5) * width_s, 2), "calls": len(mine), "failed": failed, **at})
    return found


def _rounded(value: float) -> float | None:
    return round(value, 3) if math.isfinite(value) else None


def _print(result: dict[str, Any]) -> None:
    console = Console(width=120, highlight=False)
    table = Table(title=f"{result['minutes']:g} minutes at {result['rate_rps']:,.0f} Rank calls/s, open loop")
    for title in ("at s", "calls", "failed", "p50 ms", "p99 ms"):
        table.add_column(title, justify="right")
    for w in result["windows"]:
        shown = ["∞" if w[key] is None else f"{w[key]:.2f}" for key in ("p50_ms", "p99_ms")]
        table.add_row(f"{w['t_s']:.0f}", f"{w['calls']:,}", str(w["failed"]), *shown)
    console.print(table)
    console.print(
        f"Memory: {result['rss_first_mb']} → {result['rss_last_mb']} MB, {result['rss_slope_mb_per_h']} ± "
        f"{result['rss_slope_error_mb_per_h']} MB/h. p99 drift: {result['p99_drift_ms_per_h']} ± "
        f"{result['p99_drift_error_ms_per_h']} ms/h. Errors: {result['errors'] or 'none'}, unsent {result['unsent']}; "
        f"events refused: {result['events_refused'] or 'none'}. Floor: {result['floor']}. {result['machine']}, commit "
        f"{result['commit']}; the client {result['client']}."
    )
    if result["publish_failure"]:
        console.print(f"FAULT: {result['publish_failure']}", markup=False)
    print(json.dumps(result))
