"""`liverank bench ingest`: events per second that are durable and applied, against Redis doing the same counting.

Rivals take turns within one run, with the same events in batches of the same size, and ratios are taken per round.
Everything is encoded before the clock starts. Events go over several connections at once, as many batches as each
server takes. CPU is user and system time of the server's process alone, our ticks and score refreshes included.
Floor: Redis with one HINCRBY per event, not durable: no fences, no decay, no distinct viewers, no ranking table.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from liverank.v1 import ingest_pb2 as pb
from rich.console import Console
from rich.table import Table

from loadtest.bench.event_columns import (
    ARROW,
    MESSAGES,
    EventRows,
    as_arrow,
    as_messages,
    as_redis,
    as_redis_counts,
    draw,
    has_columns,
)
from loadtest.bench.filled import Filled, filled_server, where
from loadtest.bench.redis_rival import Connection, Pipeline, redis_binary, running_redis
from loadtest.processes import cpu_seconds

REDIS_SAME, REDIS_LAX, REDIS_COUNTS = "redis always", "redis everysec", "redis counts only"
TOLD = {
    MESSAGES: "fenced, deduplicated, decayed sums, distinct viewers, one ranking table",
    ARROW: "the same, from Arrow columns",
    REDIS_SAME: "the same decayed sums (weights made by the client), distinct viewers; no fences, no duplicates told",
    REDIS_LAX: "the same, up to a second of it lost with the power",
    REDIS_COUNTS: "one HINCRBY per event",
}
Work = Callable[[], None]


@dataclass(frozen=True)
class Plan:
    """events: per turn. batches: events per message or pipeline. connections: at once."""

    events: int = 200_000
    batches: tuple[int, ...] = (1_000, 10_000)
    connections: int = 4
    rounds: int = 3
    streams: int = 10_000


QUICK = Plan(events=4_000, batches=(500,), connections=2, rounds=1, streams=1_000)


@dataclass(frozen=True)
class Turn:
    """Events per second of wall time; server and client CPU, microseconds per event."""

    per_s: float
    server_us: float
    client_us: float


@dataclass(frozen=True)
class Rival:
    """prepare: encodes a turn's events, in batches of this size, into one piece of work per connection. pid: the
    server's."""

    name: str
    durable: bool
    pid: int
    prepare: Callable[[EventRows, int], list[Work]]


def run_ingest(plan: Plan | None = None, quick: bool = False) -> int:
    """Measures, prints a table and, last, a line of JSON. Returns 0, or 1 when Redis is not installed."""
    plan = plan or (QUICK if quick else Plan())
    console, told = Console(width=140, highlight=False), where()
    missing = []
    if redis_binary() is None:
        missing.append("redis-server is not installed (apt-get install redis-server): NOTHING IS COMPARED with it")
    if not has_columns():
        missing.append("EventBatch has no field `arrow` in this build: the columnar form is NOT MEASURED")
    for text in missing:
        console.print(f"!!! {text}", style="bold red")
    rng = np.random.default_rng(5)
    turns: dict[tuple[str, int], list[Turn]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="liverank-bench-")))
        filled = stack.enter_context(filled_server(plan.streams))
        rivals = _rivals(stack, folder, filled, plan)
        for number in range(plan.rounds + 1):  # the first one warms up
            for batch in plan.batches:
                events = plan.events if number else max(batch * plan.connections, plan.events // 10)
                rows = draw(events, plan.streams, int(time.time() * 1000), rng)
                for rival in rivals:
                    turn = _turn(rival, rows, batch)
                    if number:
                        turns.setdefault((rival.name, batch), []).append(turn)
    result = _result(plan, rivals, turns) | {"not_measured": missing} | told
    _print(console, result)
    return 0 if redis_binary() else 1


def _turn(rival: Rival, rows: EventRows, batch: int) -> Turn:
    work = rival.prepare(rows, batch)
    with ThreadPoolExecutor(len(work)) as pool:
        used_s, own_s, begun_s = cpu_seconds(rival.pid), time.process_time(), time.monotonic()
        for done in [pool.submit(piece) for piece in work]:
            done.result()
        wall_s = time.monotonic() - begun_s
        used_s, own_s = cpu_seconds(rival.pid) - used_s, time.process_time() - own_s
    n = len(rows)
    return Turn(n / wall_s, used_s / n * 1e6, own_s / n * 1e6)


def _rivals(stack: ExitStack, folder: Path, filled: Filled, plan: Plan) -> list[Rival]:
    pid = filled.server.process.pid
    forms = [(MESSAGES, as_messages), *([(ARROW, as_arrow)] if has_columns() else [])]
    rivals = [Rival(name, True, pid, _Publishing(filled, plan, name, encode).prepare) for name, encode in forms]
    if redis_binary() is None:
        return rivals
    landmark_ms = int(time.time() * 1000)
    for name, fsync, encode_part in (
        (REDIS_SAME, "always", lambda rows, part: as_redis(rows, part, landmark_ms)),
        (REDIS_LAX, "everysec", lambda rows, part: as_redis(rows, part, landmark_ms)),
        (REDIS_COUNTS, "everysec", as_redis_counts),
    ):
        path, redis_pid = stack.enter_context(running_redis(folder / name.replace(" ", "-"), fsync))
        connections = [Connection(path) for _ in range(plan.connections)]
        for connection in connections:
            stack.callback(connection.close)

        prepare = partial(_pipelines, connections, encode_part)
        rivals.append(Rival(name, fsync == "always", redis_pid, prepare))
    return rivals


def _pipelines(
    connections: list[Connection], encode_part: Callable[[EventRows, slice], Pipeline], rows: EventRows, batch: int
) -> list[Work]:
    shares = [[encode_part(rows, part) for part in share] for share in _shares(rows, batch, len(connections))]
    return [partial(connection.send_all, share) for connection, share in zip(connections, shares, strict=True)]


class _Publishing:
    """Our side: one Publish stream per connection and turn; sequences go on over all turns."""

    def __init__(self, filled: Filled, plan: Plan, name: str, encode: Callable[..., bytes]) -> None:
        self._publish = filled.channel.stream_stream("/liverank.v1.Ingest/Publish")
        self._name, self._encode = name, encode
        self._next_sequence = [1] * plan.connections

    def prepare(self, rows: EventRows, batch: int) -> list[Work]:
        work = []
        for number, share in enumerate(_shares(rows, batch, len(self._next_sequence))):
            payloads = []
            for part in share:
                producer = f"bench-{self._name}-{number}"
                payloads.append(self._encode(rows, part, producer, self._next_sequence[number]))
                self._next_sequence[number] += part.stop - part.start
            work.append(self._work(payloads, sum(part.stop - part.start for part in share)))
        return work

    def _work(self, payloads: list[bytes], events: int) -> Work:
        def send() -> None:
            acks = [pb.PublishAck.FromString(ack) for ack in self._publish(iter(payloads))]
            if (accepted := sum(ack.accepted for ack in acks)) != events:
                refused = next(ack.rejected[0].message for ack in acks if ack.rejected)
                raise RuntimeError(f"{self._name}: {accepted} of {events} events accepted: {refused}")

        return send


def _shares(rows: EventRows, batch: int, connections: int) -> list[list[slice]]:
    """Batches of each connection."""
    parts = list(rows.parts(batch))
    return [parts[number::connections] for number in range(connections)]


def _result(plan: Plan, rivals: list[Rival], turns: dict[tuple[str, int], list[Turn]]) -> dict[str, Any]:
    rows = []
    for (name, batch), seen in turns.items():
        server_us = statistics.median(t.server_us for t in seen)
        both_us = statistics.median(t.server_us + t.client_us for t in seen)
        rows.append(
            {
                "rival": name,
                "batch": batch,
                "durable": next(rival.durable for rival in rivals if rival.name == name),
                "does": TOLD[name],
                "events_per_s": round(statistics.median(t.per_s for t in seen)),
                "server_cpu_us_per_event": round(server_us, 3),
                "client_cpu_us_per_event": round(statistics.median(t.client_us for t in seen), 3),
                "both_cpu_us_per_event": round(both_us, 3),
                "events_per_server_core_second": round(1e6 / server_us),
                "events_per_core_second_of_both": round(1e6 / both_us),
            }
        )
    ratios = {
        f"{ours} ÷ {theirs}, {batch}": round(
            statistics.median(
                b.server_us / a.server_us
                for a, b in zip(turns[ours, batch], turns[theirs, batch], strict=True)
            ), 3,
        )
        for batch in plan.batches
        for ours in (MESSAGES, ARROW)
        for theirs in (REDIS_SAME, REDIS_LAX, REDIS_COUNTS)
        if (ours, batch) in turns and (theirs, batch) in turns
    }  # fmt: skip
    best = {name: max(r["events_per_server_core_second"] for r in rows if r["rival"] == name) for name, _ in turns}
    return {
        "bench": "ingest",
        "streams": plan.streams,
        "events_per_turn": plan.events,
        "batches": list(plan.batches),
        "connections": plan.connections,
        "rounds": plan.rounds,
        "floor": f"{REDIS_COUNTS}: one HINCRBY per event, appendfsync everysec",
        "best_events_per_server_core_second": best,
        # Everyone at the batch size that suits him best.
        "best_ratios": {
            f"{ours} ÷ {theirs}": round(best[ours] / best[theirs], 3)
            for ours in (MESSAGES, ARROW)
            for theirs in (REDIS_SAME, REDIS_LAX, REDIS_COUNTS)
            if ours in best and theirs in best
        },
        "ratios_events_per_server_core_second": ratios,
        "rows": rows,
    }


def _print(console: Console, result: dict[str, Any]) -> None:
    table = Table(title=f"Events, {result['connections']} connections, taking turns")
    for title in (
        "",
        "batch",
        "durable",
        "does",
        "events/s",
        "server µs",
        "client µs",
        "events per server core-second",
    ):
        table.add_column(title, justify="left" if title in ("", "does") else "right")
    for row in result["rows"]:
        table.add_row(
            row["rival"], f"{row['batch']:,}", "yes" if row["durable"] else "no", row["does"],
            f"{row['events_per_s']:,}", f"{row['server_cpu_us_per_event']:.2f}",
            f"{row['client_cpu_us_per_event']:.2f}", f"{row['events_per_server_core_second']:,}",
        )  # fmt: skip
    console.print(table)
    for name, ratio in result["ratios_events_per_server_core_second"].items():
        console.print(f"events per server core-second, {name} per batch: {ratio:.2f}")
    for name, ratio in result["best_ratios"].items():
        console.print(f"events per server core-second, each at its best batch size, {name}: {ratio:.2f}")
    console.print(
        f"Floor: {result['floor']}. Redis commands are encoded before and its replies only counted. "
        f"{result['machine']}, commit {result['commit']}; the client {result['client']}."
    )
    print(json.dumps(result))
