"""Plays a scenario against a server: prime, run, take down, record."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from liverank.v1 import admin_pb2, admin_pb2_grpc, ranking_pb2, ranking_pb2_grpc
from rich.console import Console
from rich.table import Table

from loadtest.bench.openloop import open_loop_at
from loadtest.load.actions import Actions
from loadtest.load.callers import Callers
from loadtest.load.fleet import Fleet
from loadtest.load.observe import Observer
from loadtest.load.outcome import MAX_CALLERS, headline, outcome
from loadtest.load.prober import Prober
from loadtest.load.publisher import Publisher
from loadtest.load.scenario import Scenario, Start
from loadtest.processes import ROOT, NotStartedError, running_server
from server.channel import open_channel
from server.errors import ConfigError

FIRST_ANSWER_S = 10.0
ASSESSED_WITHIN_S = 30.0
LEAD_S = 0.2  # between the last preparation and the first call
INTERRUPTED = 130
"""Exit status, as shells have it."""


@dataclass(frozen=True)
class Target:
    """A server to put load on.

    metrics: HOST:PORT of its metrics, "" for none. pid: its process, if ours. rules_file, model_folder: its files,
    if ours or told.
    """

    address: str
    metrics: str = ""
    pid: int | None = None
    rules_file: Path | None = None
    model_folder: Path | None = None


def check_target(address: str, allow_remote: bool) -> None:
    """Load goes to this machine only, unless the user says otherwise.

    Raises:
        ConfigError: not HOST:PORT, or another machine without ``allow_remote``.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"--target: HOST:PORT wanted, got {address!r}")
    if allow_remote:
        return
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host.strip("[]"), int(port))}
    except OSError as error:
        raise ConfigError(f"--target: {host}: {error}") from error
    strangers = sorted(str(ip) for ip in found if not ipaddress.ip_address(str(ip).partition("%")[0]).is_loopback)
    if strangers:
        raise ConfigError(
            f"--target: {host} is another machine ({', '.join(strangers)}); this load could take it down. "
            "If it is yours to load, say --allow-remote"
        )


@contextlib.contextmanager
def own_server(scenario: Scenario) -> Iterator[Target]:
    """A server for this scenario alone, with its own log, rules and models. Raises NotStartedError."""
    streams = scenario.fleet.streams + sum(a.streams for _, a in scenario.actions if isinstance(a, Start))
    with tempfile.TemporaryDirectory(prefix="liverank-load-") as name:
        folder = Path(name)
        models, rules = folder / "models", folder / "rules.toml"
        shutil.copytree(ROOT / "model_repository", models)
        shutil.copy(ROOT / "server" / "rules" / "default.toml", rules)
        settings: dict[str, dict[str, Any]] = {
            "table": {"capacity": 2 * streams + 2_000, "embedding_dim": scenario.fleet.embedding_dim or 64},
            "scoring": {"mode": "local", "model_repository": str(models)},
            "rank": {"rules_file": str(rules)},
        }
        with running_server(folder / "server", settings) as server:
            metrics = f"127.0.0.1:{server.metrics_port}"
            yield Target(server.address, metrics, server.process.pid, rules, models / "trendiness")


def play(scenario: Scenario, target: Target, say: Console | None = None) -> dict[str, Any]:
    """Runs ``scenario`` and returns its record (`docs/loadtest.md` describes it).

    Raises:
        ConfigError: the target is not reachable, or does not fit the scenario.
    """
    say = say or Console(quiet=True)
    rng = np.random.default_rng(scenario.seed)
    run_id = f"load-{int(time.time() * 1000):x}"
    due_s = scenario.calls.due_s()
    with contextlib.ExitStack() as stack:
        channel = stack.enter_context(_connected(target.address))
        events = stack.enter_context(_connected(target.address))
        status = _first_answer(channel, target.address)
        dim = scenario.fleet.embedding_dim
        fleet = Fleet(run_id, scenario.fleet.heartbeat_ms, dim, scenario.fleet.zipf, rng)
        publisher = Publisher(events, run_id, fleet, scenario.events, lambda t_s: _phase_at(scenario, t_s).mix)
        stack.callback(publisher.stop)
        actions = Actions(scenario, publisher, channel, target.rules_file, target.model_folder)
        say.print(f"starting {scenario.fleet.streams:,} streams at {target.address} …")
        _begin_fleet(publisher, scenario, channel, status.live)
        prober = Prober(events, f"{run_id}-probe", dim, scenario.probe_every_s or 1.0, publisher.ended_at.__setitem__)
        stack.callback(prober.close)
        callers = Callers(channel, scenario, due_s, fleet, publisher.ended_at, rng)
        observer = Observer(target.metrics, target.pid)
        say.print(f"{scenario.name}: {len(due_s):,} calls within {scenario.duration_s:.0f} s …")
        own_cpu_s, begun_s = time.process_time(), time.monotonic() + LEAD_S
        publisher.start(begun_s)
        parts: list[Actions | Observer | Prober] = [actions, observer]
        for part in [*parts, prober] if scenario.probe_every_s else parts:
            part.start(begun_s)
            stack.callback(part.stop)
        arrivals = open_loop_at(
            callers.call, due_s, callers=MAX_CALLERS, begun_s=begun_s, look=callers.look, overrun_s=10.0
        )
        rest_s = begun_s + scenario.duration_s - time.monotonic()
        if rest_s > 0:  # events, actions and probes go on to the end
            time.sleep(rest_s)
        own_cpu_s = time.process_time() - own_cpu_s
    record = outcome(scenario, target.address, arrivals, callers, publisher, prober, actions, observer)
    record["generator"]["cpu_cores"] = round(own_cpu_s / max(arrivals.wall_s, scenario.duration_s), 3)
    record["server_version"], record["scoring"] = status.version, status.scoring_backend
    return record


def run_load(
    scenario: Scenario, target: Target | None, report: Path | None, out: Path | None, console: Console | None = None
) -> int:
    """Plays, prints a table and, last, a line of JSON. None as target: starts a server of its own.

    Returns 0; 1 when the run did not hold what the scenario expects, or no server could be started; 130 interrupted.
    """
    console = console or Console(width=120, highlight=False)
    try:
        with own_server(scenario) if target is None else contextlib.nullcontext(target) as where:
            record = play(scenario, where, console)
    except NotStartedError as error:
        console.print(f"not started: {error}", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; the load's streams were ended, nothing was recorded")
        return INTERRUPTED
    if out is not None:
        out.write_text(json.dumps(record))
        console.print(f"record: {out}", markup=False)
    if report is not None:
        from loadtest.report import page

        report.write_text(page([record]))
        console.print(f"report: {report}", markup=False)
    _print(console, record)
    print(json.dumps(headline(record)))
    return 0 if record["ok"] else 1


def _connected(address: str) -> grpc.Channel:
    """A connection of its own: events and replies do not share one."""
    return open_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])


def _first_answer(channel: grpc.Channel, address: str) -> admin_pb2.StatusResponse:
    try:
        status: admin_pb2.StatusResponse = admin_pb2_grpc.AdminStub(channel).Status(
            admin_pb2.StatusRequest(), timeout=FIRST_ANSWER_S
        )
        return status
    except grpc.RpcError as error:
        raise ConfigError(f"--target {address}: {error.code().name}: {error.details()}") from error


def _begin_fleet(publisher: Publisher, scenario: Scenario, channel: grpc.Channel, live_before: int) -> None:
    """Starts the streams, and waits until they are assessed: from then on every slate can be full."""
    try:
        publisher.now(lambda fleet, now_ms: fleet.starts(scenario.fleet.streams, now_ms))
    except RuntimeError as error:
        raise ConfigError(f"the target does not fit this scenario: {error}") from error
    ranking = ranking_pb2_grpc.RankingStub(channel)
    ends_at_s = time.monotonic() + ASSESSED_WITHIN_S
    wanted = min(5, scenario.fleet.streams)
    while time.monotonic() < ends_at_s:
        try:
            reply = ranking.Rank(ranking_pb2.RankRequest(viewer_id="load", limit=wanted), timeout=FIRST_ANSWER_S)
        except grpc.RpcError as error:
            raise ConfigError(f"Rank: {error.code().name}: {error.details()}") from error
        if len(reply.streams) >= wanted:
            return
        time.sleep(0.05)
    raise ConfigError(f"the started streams were not shown within {ASSESSED_WITHIN_S:.0f} s")


def _phase_at(scenario: Scenario, t_s: float) -> Any:
    for phase in scenario.phase:
        if t_s < phase.duration_s:
            return phase
        t_s -= phase.duration_s
    return scenario.phase[-1]


def _print(console: Console, record: dict[str, Any]) -> None:
    table = Table(title=f"{record['scenario']}: open loop, ms from when a call was due; – : failed calls reach it")
    for title in ("call", "due", "failed", "p50", "p90", "p99", "max", "errors"):
        table.add_column(title, justify="left" if title == "call" else "right")
    for name, entry in record["calls"].items():
        shown = ("–" if entry[k] is None else f"{entry[k]:.1f}" for k in ("p50_ms", "p90_ms", "p99_ms", "max_ms"))
        table.add_row(name, f"{entry['due']:,}", str(entry["failed"]), *shown, str(entry["errors"] or ""))
    console.print(table)
    fresh, own = record["freshness"], record["generator"]
    console.print(
        f"Acknowledged start to visible: p50 {fresh['visible']['p50_ms']} ms, max {fresh['visible']['max_ms']} ms "
        f"({fresh['visible']['n']} probes). Shown after an acknowledged end: {record['shown_after_end']}.\n"
        f"Generator: {own['cpu_cores']} cores, late by p99 {own['late_p99_ms']} ms (part of every latency above)."
    )
    if own["no_caller_free"]:
        console.print(
            f"{own['no_caller_free']:,} calls waited for one of {own['callers']} callers: "
            "so many others were not answered yet."
        )
    for action in record["actions"]:
        console.print(f"  {action['at_s']:6.1f} s  {action['do']}: {action['told']}", markup=False)
    for fault in record["faults"]:
        console.print(f"FAULT: {fault}", markup=False)
