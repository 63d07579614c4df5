"""`liverank bench slo`: the highest rate of Rank calls at which 99 % of them are answered in time.

Open loop: each trial holds a constant arrival rate, and latency counts from when a call was due. Failed and unsent
calls count as infinitely slow. Steps double the rate until a trial breaks the promise; then the gap between the best
that held and the least that did not is halved (in proportion) until it is small or the time is up.
Floor: one call at a time on the same server, measured in the same run; no rate can make a call faster than that.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from loadtest.bench.catalogue import as_bytes, rank_requests
from loadtest.bench.filled import Filled, filled_server, where
from loadtest.bench.load import closed_loop
from loadtest.bench.openloop import open_loop

QUERIES = 256
CALLERS = 256
CONFIRMED = 2
"""Trials that must agree on a rate, best of three: one lucky window proves nothing, nor does one disturbed window."""
BUSY_GENERATOR = 0.9  # cores; Python can use one


@dataclass(frozen=True)
class Trial:
    """One rate for one window. Latencies in ms, None: calls without an answer reach that percentile."""

    rate_rps: float
    holds: bool
    p50_ms: float | None = None
    p99_ms: float | None = None
    failed: int = 0
    achieved_rps: float = 0.0
    late_max_ms: float = 0.0
    generator_cores: float = 0.0


@dataclass(frozen=True)
class Found:
    """rate_rps: the highest rate that held, 0 when none did. ceiling_rps: the least that did not, None: none broke."""

    rate_rps: float
    ceiling_rps: float | None
    tried: tuple[Trial, ...]
    why: str


def find_rate(
    measure: Callable[[float], Trial],
    start_rps: float,
    most_rps: float,
    precision: float = 0.05,
    confirmed: int = CONFIRMED,
    time_left: Callable[[], bool] = lambda: True,
) -> Found:
    """Steps and bisects. Pure but for ``measure``, which tells whether a rate holds.

    Args:
        start_rps, most_rps: first rate tried, and the highest that ever is.
        precision: stop when the gap is at most this share of the lower end.
        confirmed: a rate holds, or breaks, when this many of its trials did; they are repeated until one is so.
        time_left: asked before each trial.

    Raises:
        ValueError: a number is out of range.
    """
    if not (0 < start_rps <= most_rps < math.inf and precision > 0 and confirmed >= 1):
        raise ValueError("0 < start_rps <= most_rps, precision > 0 and confirmed >= 1 wanted")
    tried: list[Trial] = []
    best: Trial | None = None
    broken_rps: float | None = None
    rate, why = start_rps, ""
    while not why:
        held: list[Trial] = []
        broke: list[Trial] = []
        while max(len(held), len(broke)) < confirmed and time_left():
            tried.append(measure(rate))
            (held if tried[-1].holds else broke).append(tried[-1])
        if max(len(held), len(broke)) < confirmed:
            why = "time is up"
            break
        if len(held) == confirmed:
            best = held[-1]
            if rate >= most_rps:
                why = f"the highest rate allowed, {most_rps:g}, still holds"
        else:
            broken_rps = rate
        if best is None:
            assert broken_rps is not None
            rate = broken_rps / 2
            if rate < start_rps / 64:
                why = "even a small rate does not hold"
        elif broken_rps is None:
            rate = min(2 * best.rate_rps, most_rps)
        else:
            rate = math.sqrt(best.rate_rps * broken_rps)  # halves the gap in proportion
            if broken_rps <= best.rate_rps * (1 + precision):
                why = "found"
    return Found(best.rate_rps if best else 0.0, broken_rps, tuple(tried), why)


def run_slo(
    p99_ms: float = 20.0,
    streams: int = 10_000,
    window_s: float = 5.0,
    budget_s: float = 160.0,
    most_rps: float = 50_000.0,
) -> int:
    """Finds the rate, prints the trials and, last, a line of JSON. Returns 0, or 1 when no rate holds.

    window_s: of a trial. budget_s: for all trials; starting and filling the server comes before.
    """
    told = where()
    requests = as_bytes(rank_requests(QUERIES))
    with filled_server(streams) as filled:
        ends_at_s = time.monotonic() + budget_s
        lone = closed_loop(filled.rank, requests, 1, window_s / 2)
        cpu_ms = _cpu_ms(filled, requests, window_s / 2)
        start_rps = max(1.0, min(0.25 * 1000 / cpu_ms, most_rps))  # a quarter of one core: holds unless it never can
        found = find_rate(
            lambda rate: _trial(filled, requests, rate, window_s, p99_ms),
            start_rps,
            most_rps,
            time_left=lambda: time.monotonic() + window_s < ends_at_s,
        )
    best = next((t for t in reversed(found.tried) if t.rate_rps == found.rate_rps and t.holds), None)
    broken = [t for t in found.tried if not t.holds]
    result: dict[str, Any] = {
        "bench": "slo",
        "rate_rps": round(found.rate_rps, 1),
        "p50_ms": best.p50_ms if best else None,
        "p99_ms": best.p99_ms if best else None,
        "slo_p99_ms": p99_ms,
        "ceiling_rps": found.ceiling_rps and round(found.ceiling_rps, 1),
        "stopped": found.why,
        "generator_bound": any(t.generator_cores > BUSY_GENERATOR for t in broken),
        "streams": streams,
        "window_s": window_s,
        "floor": "one call at a time",
        "floor_p50_ms": round(lone.p50_ms, 3),
        "floor_p99_ms": round(lone.p99_ms, 3),
        "cpu_ms_per_reply": round(cpu_ms, 4),
        **told,
        "tried": [asdict(trial) for trial in found.tried],
    }
    _print(result)
    return 0 if found.rate_rps > 0 else 1


def _trial(filled: Filled, requests: list[bytes], rate: float, window_s: float, p99_ms: float) -> Trial:
    own_s, begun_s = time.process_time(), time.monotonic()
    load = open_loop(filled.rank, requests, rate, window_s, callers=CALLERS, overrun_s=max(1.0, window_s / 2))
    cores = (time.process_time() - own_s) / (time.monotonic() - begun_s)
    p50, p99 = load.promised_ms(50), load.promised_ms(99)
    return Trial(
        rate_rps=round(rate, 2),
        holds=p99 <= p99_ms,
        p50_ms=_finite(p50),
        p99_ms=_finite(p99),
        failed=load.failed,
        achieved_rps=round(load.per_s, 1),
        late_max_ms=round(load.worst_send_delay_s * 1000, 2),
        generator_cores=round(cores, 2),
    )


def _cpu_ms(filled: Filled, requests: list[bytes], seconds: float) -> float:
    used_s = filled.cpu_s
    load = closed_loop(filled.rank, requests, 8, seconds)
    if not load.answered:
        raise RuntimeError(f"no call was answered: {load.errors}")
    return max(filled.cpu_s - used_s, 0.01) * 1000 / load.answered


def _finite(value_ms: float) -> float | None:
    return round(value_ms, 3) if math.isfinite(value_ms) else None


def _print(result: dict[str, Any]) -> None:
    console = Console(width=120, highlight=False)
    table = Table(title=f"Rank at {result['streams']:,} live, open loop; promise: p99 ≤ {result['slo_p99_ms']:g} ms")
    for title in ("rate/s", "answered/s", "p50 ms", "p99 ms", "failed", "sent late ms", "generator cores", "holds"):
        table.add_column(title, justify="right")
    for t in result["tried"]:
        shown = ["∞" if t[key] is None else f"{t[key]:.2f}" for key in ("p50_ms", "p99_ms")]
        table.add_row(
            f"{t['rate_rps']:,.0f}", f"{t['achieved_rps']:,.0f}", *shown, str(t["failed"]), f"{t['late_max_ms']:.1f}",
            f"{t['generator_cores']:.2f}", "yes" if t["holds"] else "no",
        )  # fmt: skip
    console.print(table)
    console.print(
        f"{result['rate_rps']:,.0f} calls/s hold ({result['stopped']}). Floor: {result['floor']}, p50 "
        f"{result['floor_p50_ms']} ms. {result['machine']}, commit {result['commit']}; the client {result['client']}."
    )
    if result["generator_bound"]:
        console.print("The generator used its whole core where the promise broke: the server may hold more than this.")
    print(json.dumps(result))
