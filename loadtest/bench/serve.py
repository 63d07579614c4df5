"""`liverank bench serve`: Rank against a constant reply (the ceiling) and a textbook server, taking turns.

Every figure compares servers within one run: in each round one after the other gets the same load (A B C A B C),
the others' processes stopped meanwhile; ratios are taken per round, and medians over rounds reported. Load comes
from this process, which shares the cores with the server under test: on a small machine replies per second and
latencies are those of both, CPU per reply is the server's alone (/proc).
Floor: the constant reply on the same transport (`server/rpc/direct.py`); ceiling_cpu_ratio 1.0 cannot be beaten on it.
threads_cpu_ratio compares with a constant reply from grpcio's own synchronous server, which everybody else would use.

Two modes, never mixed: scores of the stream level, worked out once for everybody (all of the above), and, under
``with_ranker``, a viewer x stream model asked for every request (`loadtest/bench/serve_with_ranker.py`).
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from loadtest.bench.catalogue import as_batches, as_bytes, rank_requests
from loadtest.bench.contestants import (
    BEHIND_EDGES,
    CONSTANT,
    EDGES,
    OURS,
    TEXTBOOK,
    TEXTBOOK_LEAN,
    THREADS,
    Contestant,
    contestants,
)
from loadtest.bench.load import LoadReport
from loadtest.bench.openloop import open_loop
from loadtest.bench.serve_report import print_result
from loadtest.bench.serve_with_ranker import with_ranker
from loadtest.bench.turns import CPU_RESOLUTION_S, WARM_UP_S, Turn, cpu_ratio, errors_of, summary, take_turn
from loadtest.revision import commit, machine

QUERIES = 256
BATCH_VIEWERS, BATCH_CALLERS = 256, 2
OPEN_LOAD = 0.7
"""Open-loop arrivals per second, as a share of the server's own closed-loop replies per second."""
COMPARED_LOADS = (0.7, 0.9, 1.0)
"""Shares of the textbook server's closed-loop replies per second at which both get the same arrivals."""


@dataclass(frozen=True)
class Plan:
    """What to measure. ``headline``: the (streams, concurrency) whose figures lead the JSON."""

    streams: tuple[int, ...] = (1_000, 10_000, 100_000)
    concurrency: tuple[int, ...] = (1, 16, 64)
    rounds: int = 3
    seconds: float = 2.0

    @property
    def headline(self) -> tuple[int, int]:
        """N = 10 k at concurrency 64, or what comes closest in this grid."""
        return min(self.streams, key=lambda n: abs(n - 10_000)), min(self.concurrency, key=lambda c: abs(c - 64))


DEFAULT = Plan()
QUICK = Plan(streams=(10_000,), concurrency=(1, 64), rounds=1, seconds=0.7)


def plan_from(streams: list[int] | None, concurrency: list[int] | None, seconds: float | None, quick: bool) -> Plan:
    """The plan of a command line: what is not given is as in `QUICK` or `DEFAULT`."""
    base = QUICK if quick else DEFAULT
    return replace(
        base,
        streams=tuple(streams or base.streams),
        concurrency=tuple(concurrency or base.concurrency),
        seconds=seconds or base.seconds,
    )


def run_serve(plan: Plan = DEFAULT) -> int:
    """Measures, prints a table and, last, a line of JSON. Returns 0, or 1 when a server failed calls."""
    begun_s = time.monotonic()
    load_before = os.getloadavg()[0]
    requests = rank_requests(QUERIES)
    asked = as_bytes(requests)
    rows: list[dict[str, Any]] = []
    batches: list[dict[str, Any]] = []
    open_rows: list[dict[str, Any]] = []
    edges: dict[str, Any] = {}
    ranked: dict[str, Any] = {}
    for n in plan.streams:
        headline = n == plan.headline[0]
        with (
            tempfile.TemporaryDirectory(prefix="liverank-bench-") as folder,
            contestants(Path(folder), n, asked[1], headline) as servers,
        ):
            cells = {c: _rank(servers, asked, n, c, plan) for c in plan.concurrency}
            rows += cells.values()
            textbook_cpu_ms = cells[max(cells)][TEXTBOOK]["cpu_ms_per_reply"]
            if headline:
                edges = _behind_edges(servers, asked, plan)
            batches.append(_rank_batch(servers[OURS], as_batches(requests, BATCH_VIEWERS), n, textbook_cpu_ms, plan))
            if headline:
                open_rows = _open_loop(servers, asked, cells[plan.headline[1]], plan)
                ranked = with_ranker(servers, asked, n, plan.concurrency, plan.rounds, plan.seconds)
    result = _result(plan, rows, batches, open_rows) | {"edges": edges, "with_ranker": ranked}
    result["errors"] += ranked["errors"]
    result |= _where(load_before, time.monotonic() - begun_s)
    print_result(result)
    return 1 if result["errors"] else 0


def _rank(servers: dict[str, Contestant], requests: list[bytes], n: int, c: int, plan: Plan) -> dict[str, Any]:
    """One cell of the grid. The lean textbook server takes part in the headline cell only."""
    names = [OURS, CONSTANT, THREADS, TEXTBOOK, *([TEXTBOOK_LEAN] if (n, c) == plan.headline else [])]
    turns: dict[str, list[Turn]] = {name: [] for name in names}
    for _ in range(plan.rounds):
        for name in names:
            turns[name].append(take_turn(servers[name], servers[name].rank, requests, c, plan.seconds))
    row: dict[str, Any] = {"streams": n, "concurrency": c}
    row |= {name: summary(turns[name]) for name in names}
    row["ceiling_cpu_ratio"] = cpu_ratio(turns[OURS], turns[CONSTANT])
    row["threads_cpu_ratio"] = cpu_ratio(turns[OURS], turns[THREADS])
    row["speedup"] = cpu_ratio(turns[TEXTBOOK], turns[OURS])
    if TEXTBOOK_LEAN in turns:
        row["speedup_lean"] = cpu_ratio(turns[TEXTBOOK_LEAN], turns[OURS])
    return row


def _rank_batch(ours: Contestant, requests: list[bytes], n: int, textbook_cpu_ms: float, plan: Plan) -> dict[str, Any]:
    """RankBatch of ours; per slate, against what the textbook server spends on a Rank."""
    turns = [
        take_turn(ours, ours.rank_batch, requests, BATCH_CALLERS, plan.seconds, slates=BATCH_VIEWERS)
        for _ in range(plan.rounds)
    ]
    cpu_ms = median(t.cpu_ms for t in turns)
    return {
        "streams": n,
        "viewers_per_call": BATCH_VIEWERS,
        "concurrency": BATCH_CALLERS,
        "slates_per_s": round(median(t.load.per_s * BATCH_VIEWERS for t in turns)),
        "cpu_ms_per_slate": round(cpu_ms, 4),
        "call_p50_ms": round(median(t.load.p50_ms for t in turns), 2),
        "batch_speedup": round(textbook_cpu_ms / cpu_ms, 3),
        "errors": errors_of(t.load for t in turns),
    }


def _behind_edges(servers: dict[str, Contestant], requests: list[bytes], plan: Plan) -> dict[str, Any]:
    """The same server behind edges, which share two cores with its engine here: what matters is the engine's share."""
    edged, (_, callers) = servers[BEHIND_EDGES], plan.headline
    turns, shares = [], []
    for _ in range(plan.rounds):
        with edged.awake():
            engine_s, all_s = edged.engine_cpu_s, edged.cpu_s
            turns.append(take_turn(edged, edged.rank, requests, callers, plan.seconds))
        with edged.awake():
            shares.append((edged.engine_cpu_s - engine_s) / max(edged.cpu_s - all_s, CPU_RESOLUTION_S))
    return summary(turns) | {"edges": EDGES, "engine_share": round(median(shares), 3)}


def _open_loop(
    servers: dict[str, Contestant], requests: list[bytes], row: dict[str, Any], plan: Plan
) -> list[dict[str, Any]]:
    """Latency at constant arrival rates: ours at its own pace, then both at those that the textbook server can have."""
    cases = [(OURS, OPEN_LOAD * row[OURS]["rps"])]
    cases += [(name, share * row[TEXTBOOK]["rps"]) for share in COMPARED_LOADS for name in (TEXTBOOK, OURS)]
    runs: list[list[LoadReport]] = [[] for _ in cases]
    for _ in range(plan.rounds):
        for (name, rate), seen in zip(cases, runs, strict=True):
            with servers[name].awake():
                open_loop(servers[name].rank, requests, rate, min(WARM_UP_S, plan.seconds))
                seen.append(open_loop(servers[name].rank, requests, rate, plan.seconds))
    return [
        {
            "server": name,
            "arrivals_per_s": round(rate),
            "achieved_per_s": round(median(r.per_s for r in seen)),
            "p50_ms": round(median(r.p50_ms for r in seen), 2),
            "p90_ms": round(median(r.percentile_ms(90) for r in seen), 2),
            "p99_ms": round(median(r.p99_ms for r in seen), 2),
            "max_ms": round(max(r.percentile_ms(100) for r in seen), 2),
            "unsent": sum(r.unsent for r in seen),
            "errors": errors_of(seen),
        }
        for (name, rate), seen in zip(cases, runs, strict=True)
    ]


def _result(
    plan: Plan, rows: list[dict[str, Any]], batches: list[dict[str, Any]], open_rows: list[dict[str, Any]]
) -> dict[str, Any]:
    n, c = plan.headline
    row = next(r for r in rows if (r["streams"], r["concurrency"]) == plan.headline)
    ours, ceiling, textbook = row[OURS], row[CONSTANT], row[TEXTBOOK]
    own_pace = open_rows[0]
    errors = sum(
        sum(part["errors"].values())
        for part in [*(r[k] for r in rows for k in (OURS, CONSTANT, THREADS, TEXTBOOK)), *batches, *open_rows]
    )
    return {
        "bench": "serve",
        "streams": n,
        "concurrency": c,
        "rps": ours["rps"],
        "cpu_ms_per_reply": ours["cpu_ms_per_reply"],
        "p50_ms": own_pace["p50_ms"],
        "p99_ms": own_pace["p99_ms"],
        "latency": f"open loop, {own_pace['arrivals_per_s']} arrivals/s ({OPEN_LOAD:.0%} of rps), from due time",
        "closed_loop_p50_ms": ours["p50_ms"],
        "closed_loop_p99_ms": ours["p99_ms"],
        "ceiling_rps": ceiling["rps"],
        "ceiling_cpu_ms_per_reply": ceiling["cpu_ms_per_reply"],
        "ceiling_cpu_ratio": row["ceiling_cpu_ratio"],
        "threads_rps": row[THREADS]["rps"],
        "threads_cpu_ms_per_reply": row[THREADS]["cpu_ms_per_reply"],
        "threads_cpu_ratio": row["threads_cpu_ratio"],
        "textbook_rps": textbook["rps"],
        "textbook_cpu_ms_per_reply": textbook["cpu_ms_per_reply"],
        "speedup": row["speedup"],
        "textbook_lean_cpu_ms_per_reply": row[TEXTBOOK_LEAN]["cpu_ms_per_reply"],
        "speedup_lean": row["speedup_lean"],
        "batch_speedup": next(b["batch_speedup"] for b in batches if b["streams"] == n),
        "floor": "constant reply, same transport, same reply size",
        "rounds": plan.rounds,
        "seconds_per_turn": plan.seconds,
        "errors": errors,
        "rows": rows,
        "batch_rows": batches,
        "open_loop": open_rows,
        "p99_ratio": {
            f"{share:.0%}": round(theirs["p99_ms"] / mine["p99_ms"], 2)
            for share, theirs, mine in zip(COMPARED_LOADS, open_rows[1::2], open_rows[2::2], strict=True)
        },
    }


def _where(load_before: float, wall_s: float) -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    return {
        "commit": commit(),
        "machine": machine(),
        "client": "shares the cores with the server under test",
        "load_average_before": round(load_before, 2),
        "wall_s": round(wall_s, 1),
    }
