"""`liverank bench overload`: ten times the load that the server can serve, at a constant rate of arrivals.

First the peak: the most replies per second over a few numbers of callers, closed loop; once more at the end, and the
mean counts: a shared machine is not equally fast for two minutes. In between the flood, open loop, from a process of
its own; meanwhile CheckLive, a health probe and a Publish stream go on, one call every 100 ms each, and must not
notice. Latency of an accepted request counts from when it was due.

The load shares the cores with the server. Sending costs little (`flood.py`), refusing about as much as the cheapest
call to serve. So the server ranks one viewer at a time here, on a large table: slow on purpose, so that what is
measured is the policy, not what nine refusals cost beside a request that is as cheap (docs/overload.md, "The floor").
offered_factor says what was really offered. Goodput above 1 is no mistake: under pressure fewer candidates are
scored (degraded_share), and the engine does less besides.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from liverank.v1 import ingest_pb2, ingest_pb2_grpc, liveness_pb2, liveness_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from loadtest.bench.catalogue import as_bytes, make_catalogue, rank_requests, stream_id
from loadtest.bench.fill import fill, wait_until_scored
from loadtest.bench.flood import OVERLOADED, QUERIES, SHED
from loadtest.bench.load import Ask, closed_loop, code_of
from loadtest.processes import ROOT, Server, cpu_seconds, running_server

PROBE_EVERY_S = 0.1
CALL_TIMEOUT_S = 5.0
RECOVERED_WITHIN_S = 30.0
SLO_MS = 200.0
"""End to end, from PRODUCT.md: a slate within 100 to 200 ms."""


@dataclass(frozen=True)
class Plan:
    """factor: offered arrivals per second as a multiple of the peak. seconds: of the flood."""

    streams: int = 500_000
    max_batch_rows: int = 1
    callers: tuple[int, ...] = (2, 4, 8)
    peak_seconds: float = 4.0
    seconds: float = 30.0
    settle_seconds: float = 3.0
    factor: float = 10.0
    generators: int = max(1, (os.cpu_count() or 1) // 4)


DEFAULT = Plan()
QUICK = Plan(streams=20_000, callers=(4,), peak_seconds=0.8, seconds=1.2, settle_seconds=0.5, factor=3.0)


def plan_from(streams: int | None, seconds: float | None, quick: bool) -> Plan:
    """The plan of a command line."""
    base = QUICK if quick else DEFAULT
    return replace(base, streams=streams or base.streams, seconds=seconds or base.seconds)


def run_overload(plan: Plan = DEFAULT) -> int:
    """Measures, prints a table and, last, a line of JSON. Returns 0, or 1 when calls failed other than by shedding."""
    with tempfile.TemporaryDirectory(prefix="liverank-bench-") as folder:
        result = measure(Path(folder), plan)
    table = Table(title=f"{plan.streams:,} live, {result['offered_factor']} times the peak for {plan.seconds:.0f} s")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in result.items():
        table.add_row(name, str(value))
    Console(width=110).print(table)
    print(json.dumps(result))
    return 1 if result["other_errors"] or result["probe_errors"] or result["peak_errors"] else 0


def measure(folder: Path, plan: Plan) -> dict[str, Any]:
    """The figures; see `run_overload`. Files of the server go to ``folder``."""
    settings = {
        "table": {"capacity": plan.streams + 1_000, "lease_ms": 3_600_000},
        "scoring": {"mode": "local"},
        "serve": {"max_batch_rows": plan.max_batch_rows},
    }
    requests = as_bytes(rank_requests(QUERIES))
    with running_server(folder / "server", settings) as server, grpc.insecure_channel(server.address) as channel:
        fill(channel, make_catalogue(plan.streams))
        wait_until_scored(channel)
        ask = channel.unary_unary("/liverank.v1.Ranking/Rank")  # bytes in, bytes out
        before, errors_before = _peak(lambda request: ask(request, timeout=CALL_TIMEOUT_S), requests, plan)
        with _probes(server.address, plan.streams) as probes:
            flood = _flood(server, plan, plan.factor * before)
        recovered_s = _recovered_s(ask, requests[0])
        after, errors_after = _peak(lambda request: ask(request, timeout=CALL_TIMEOUT_S), requests, plan)
    peak = (before + after) / 2
    return {"bench": "overload", "streams": plan.streams, "peak_rps": round(peak, 1), **flood, **probes.summary()} | {
        "peak_before_rps": round(before, 1),
        "peak_after_rps": round(after, 1),
        "goodput_share": round(flood["goodput_rps"] / peak, 3),
        "offered_factor": round(flood["offered_rps"] / peak, 1),
        "slo_ms": SLO_MS,
        "recovered_s": recovered_s,
        "peak_errors": dict(Counter(errors_before) + Counter(errors_after)),
    }


def _recovered_s(ask: Callable[..., bytes], request: bytes) -> float | None:
    """Seconds from the end of a flood to a reply of full quality; None when none comes."""
    begun_s, pause = time.monotonic(), threading.Event()
    while (taken_s := time.monotonic() - begun_s) < RECOVERED_WITHIN_S:
        try:
            if OVERLOADED not in ask(request, timeout=CALL_TIMEOUT_S):
                return round(taken_s, 2)
        except grpc.RpcError as error:
            if code_of(error) != SHED:
                raise
        pause.wait(0.02)
    return None


def _peak(ask: Ask, requests: list[bytes], plan: Plan) -> tuple[float, dict[str, int]]:
    """Replies per second at the number of callers where it is highest, and the errors of all runs."""
    closed_loop(ask, requests, max(plan.callers), min(1.0, plan.peak_seconds))
    runs = [closed_loop(ask, requests, callers, plan.peak_seconds) for callers in plan.callers]
    return max(run.per_s for run in runs), dict(sum((Counter(run.errors) for run in runs), Counter()))


# --- the flood --------------------------------------------------------------------------------


def _flood(server: Server, plan: Plan, rate_per_s: float) -> dict[str, Any]:
    """Generators are processes of their own, so that none waits for this one's interpreter."""
    command = [sys.executable, "-m", "loadtest.bench.flood", "--address", server.address]
    command += ["--rate", str(rate_per_s / plan.generators), "--seconds", str(plan.seconds)]
    command += ["--settle", str(plan.settle_seconds)]
    used_s, before = cpu_seconds(server.process.pid), _scrape(server)
    running = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        for _ in range(plan.generators)
    ]
    try:
        said = [process.communicate(timeout=plan.settle_seconds + plan.seconds + 60.0)[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    parts = [json.loads(out.splitlines()[-1]) for out in said]
    latencies_ms = np.concatenate([np.array(part.pop("latencies_ms"), np.float64) for part in parts])
    hints_ms = np.concatenate([np.array(part.pop("hints_ms"), np.float64) for part in parts])
    errors = sum((Counter(part["errors"]) for part in parts), Counter())
    answered, shed = len(latencies_ms), errors.pop(SHED, 0)
    after = _scrape(server)
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    return {
        "offered_rps": round(sum(part["sent"] / part["wall_s"] for part in parts), 1),
        "goodput_rps": round(float((latencies_ms <= SLO_MS).sum()) / max(part["wall_s"] for part in parts), 1),
        "accepted_p50_ms": _percentile(latencies_ms, 50),
        "accepted_p99_ms": _percentile(latencies_ms, 99),
        "accepted": answered,
        "shed": shed,
        "shed_with_hint": len(hints_ms),
        "hint_p50_ms": _percentile(hints_ms, 50),
        "degraded_share": round(sum(part["degraded"] for part in parts) / max(1, answered), 3),
        "other_errors": sum(errors.values()),
        "errors": dict(errors),
        "unsent": sum(part["unsent"] for part in parts),
        "worst_send_delay_ms": max(part["worst_send_delay_ms"] for part in parts),
        "generator_cpu_s": round(sum(part["cpu_s"] for part in parts), 2),
        "server_cpu_s": round(cpu_seconds(server.process.pid) - used_s, 2),
        "mean_batch_rows": _mean(grown, "liverank_batch_rows"),
        "server_mean_wait_ms": _mean(grown, "liverank_queue_wait_seconds", 1000.0),
        "server_mean_ms": _mean(grown, "liverank_rank_seconds", 1000.0),
        "limit": after["liverank_admission_limit"],
        "quality": after["liverank_quality_factor"],
    }


def _mean(grown: dict[str, float], name: str, scale: float = 1.0) -> float:
    return round(scale * grown[f"{name}_sum"] / max(1.0, grown[f"{name}_count"]), 2)


def _scrape(server: Server) -> dict[str, float]:
    """The server's metrics that have no labels, and those of interactive requests."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=10.0) as page:
        families = text_string_to_metric_families(page.read().decode())
        wanted: tuple[dict[str, str], ...] = ({}, {"priority": "interactive"})
        return {sample.name: sample.value for f in families for sample in f.samples if sample.labels in wanted}


def _percentile(values: np.ndarray[Any, Any], q: float) -> float | None:
    return round(float(np.percentile(values, q)), 2) if len(values) else None


# --- what must go on --------------------------------------------------------------------------


class _Probes:
    """What the calls that overload must not touch took, in ms, and how many failed."""

    def __init__(self) -> None:
        self.took_ms: dict[str, list[float]] = {"check_live": [], "health": [], "publish": []}
        self.errors: Counter[str] = Counter()

    def summary(self) -> dict[str, Any]:
        times = {
            f"{name}_{key}_ms": _percentile(np.array(took), q)
            for name, took in self.took_ms.items()
            for key, q in (("p50", 50), ("max", 100))
        }
        return {**times, "probe_calls": sum(map(len, self.took_ms.values())), "probe_errors": dict(self.errors)}


@contextmanager
def _probes(address: str, streams: int) -> Iterator[_Probes]:
    """CheckLive, health and Publish, each in a thread of its own."""
    probes, over = _Probes(), threading.Event()
    options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own, as another service would have
    with grpc.insecure_channel(address, options=options) as channel:
        liveness, health = liveness_pb2_grpc.LivenessStub(channel), health_pb2_grpc.HealthStub(channel)
        asked = liveness_pb2.CheckLiveRequest(streams=[{"stream_id": stream_id(0)}])
        wanted = health_pb2.HealthCheckRequest(service="liverank.v1.Ranking")
        batches = _heartbeats(over, streams)
        acknowledgements = ingest_pb2_grpc.IngestStub(channel).Publish(batches)
        calls: dict[str, Callable[[], object]] = {
            "check_live": lambda: liveness.CheckLive(asked, timeout=CALL_TIMEOUT_S),
            "health": lambda: health.Check(wanted, timeout=CALL_TIMEOUT_S),
            "publish": lambda: next(acknowledgements),
        }

        def repeat(name: str) -> None:
            while not over.is_set():
                begun_s = time.monotonic()
                try:
                    calls[name]()
                    probes.took_ms[name].append((time.monotonic() - begun_s) * 1000)
                except grpc.RpcError as error:
                    probes.errors[f"{name}: {code_of(error)}"] += 1
                over.wait(PROBE_EVERY_S)

        threads = [threading.Thread(target=repeat, args=(name,)) for name in calls]
        for thread in threads:
            thread.start()
        try:
            yield probes
        finally:
            over.set()
            for thread in threads:
                thread.join(CALL_TIMEOUT_S)


def _heartbeats(over: threading.Event, streams: int) -> Iterator[ingest_pb2.EventBatch]:
    """Viewer counts, one batch per acknowledgement that is asked for."""
    sequence = 0
    while not over.is_set():
        sequence += 1
        now_ms = int(time.time() * 1000)
        event = ingest_pb2.Event(sequence=sequence, stream_id=stream_id(sequence % streams), event_time_ms=now_ms)
        event.viewer_count.count = sequence
        yield ingest_pb2.EventBatch(producer_id="overload", events=[event])
        over.wait(PROBE_EVERY_S)
