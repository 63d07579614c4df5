"""`liverank bench swap`: a model is replaced, and put back, under load: does anybody notice?

Rank calls arrive at a constant rate (open loop). First a quiet part; then, while they go on, an operator pushes version
2, shadows it, serves it to 1, 10 and 100 % of the viewers, promotes it and rolls it back. Both versions are the shipped
model, its scores moved by less than 0.002 onto two lattices (`nets.on_lattice`), so that every score of every reply
tells which version gave it: a reply that mixes versions, or names another one, is counted.
Floor: the quiet part of the same run. Wanted: no failed call, no mixed reply, and a p99 of at most 1.5 times the quiet.
"""

from __future__ import annotations

import json
import math
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from liverank.v1 import admin_pb2, admin_pb2_grpc, ranking_pb2
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from loadtest.bench.catalogue import make_catalogue, rank_requests
from loadtest.bench.contestants import CALL_TIMEOUT_S, OLDEST_MS, our_settings
from loadtest.bench.fill import fill, wait_until_scored
from loadtest.bench.filled import where
from loadtest.bench.load import code_of, nearest_rank
from loadtest.bench.openloop import ANSWERED, Arrivals, open_loop_at
from loadtest.load.record import plain_ms
from loadtest.load.schedule import Schedule
from loadtest.processes import NotStartedError, running_server, running_triton, set_up_triton
from server.config import ScoringSettings
from server.errors import ConfigError

MODEL, OLD, NEW = "trendiness", 1, 2
QUERIES, LIMIT, CALLERS = 512, 20, 256
WANTED_RATIO = 1.5
PUSH_TIMEOUT_S = 90.0
WHY = "bench swap"
RULES = """
[surface.default]
trend_weight = 1.0
similarity_weight = 0.0
followed_bonus = 0.0
fresh_bonus = 0.0
boost_weight = 0.0
cold_start_trend = 0.5005
exploration_share = 0.0
"""


@dataclass(frozen=True)
class Plan:
    """Rate and length of the load; quiet_share: of the length, before the first step. in_triton: else in process."""

    streams: int = 10_000
    rate_rps: float = 1_000.0
    seconds: float = 60.0
    quiet_share: float = 1 / 3
    in_triton: bool = False


QUICK = Plan(streams=300, rate_rps=60.0, seconds=9.0, quiet_share=0.2)


@dataclass(frozen=True)
class Step:
    """What the operator did: from when to when, seconds since the load began; failed: "" or why."""

    name: str
    begun_s: float
    done_s: float
    failed: str = ""


def run_swap(plan: Plan) -> int:
    """Prints a table and, last, a line of JSON. Returns 1 when a call or a step failed or a reply mixed versions.

    Raises:
        ConfigError: `onnx` is not installed. NotStartedError: server or Triton did not start.
    """
    told = where()
    requests = _requests()
    replies: dict[int, tuple[float, bytes]] = {}
    with _server(plan) as channel:
        rank = channel.unary_unary("/liverank.v1.Ranking/Rank")

        def call(number: int) -> tuple[float, bytes]:
            sent_s = time.monotonic()
            return sent_s, rank(requests[number % len(requests)], timeout=CALL_TIMEOUT_S)

        schedule = Schedule.constant(plan.rate_rps, plan.seconds)
        begun_s = time.monotonic()
        operator = _Operator(channel, plan, begun_s)
        operator.start()
        try:
            # Looked at when the run is over: reading replies must not slow the generator down.
            arrivals = open_loop_at(
                call, schedule.due_s(), callers=CALLERS, begun_s=begun_s, look=replies.__setitem__
            )  # fmt: skip
        finally:
            operator.stop()
    result = {**_judged(plan, arrivals, replies, operator.steps, begun_s), **told}
    _print(result)
    return 0 if result["failed"] == result["mixed"] == result["late_old"] == 0 and result["steps_done"] else 1


def _requests() -> list[bytes]:
    """Viewers without embedding: their scores are the model's and nothing else."""
    plain = [
        ranking_pb2.RankRequest(viewer_id=request.viewer_id, languages=request.languages, limit=LIMIT)
        for request in rank_requests(QUERIES)
    ]
    return [request.SerializeToString() for request in plain]


@contextmanager
def _server(plan: Plan) -> Iterator[grpc.Channel]:
    """A server with version 1 in service and streams that were scored; version 2 waits outside the repository."""
    settings: dict[str, dict[str, Any]] = our_settings(plan.streams)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="liverank-swap-")))
        repository, rules = folder / "models", folder / "rules.toml"
        _put_version(repository, OLD)
        rules.write_text(RULES)
        settings["rank"] = {"rules_file": str(rules)}
        settings["scoring"] = {"mode": "local", "model_repository": str(repository)}
        if plan.in_triton:
            if problem := set_up_triton():
                raise NotStartedError(problem)
            triton = stack.enter_context(running_triton(repository, folder / "triton.log", MODEL))
            settings["scoring"] |= {"mode": "triton", "triton_address": triton.address}
        server = stack.enter_context(running_server(folder, settings))
        channel = stack.enter_context(grpc.insecure_channel(server.address))
        fill(channel, make_catalogue(plan.streams, OLDEST_MS))
        wait_until_scored(channel)
        yield channel


def _graph(version: int) -> bytes:
    """The shipped model on the lattice of its version."""
    try:
        import onnx

        from loadtest.faults.nets import on_lattice
    except ImportError as error:
        raise ConfigError("bench swap makes two models of one: pip install 'liverank[train]' for onnx") from error
    shipped = ScoringSettings().model_repository / MODEL
    newest = max((path for path in shipped.glob("*/model.onnx")), key=lambda path: int(path.parent.name))
    model = onnx.load(str(newest))
    schema = {entry.key: entry.value for entry in model.metadata_props}["feature_schema"]
    on_lattice(model, version % 2 == 1, schema, {"auc": 0.8})
    graph: bytes = model.SerializeToString()
    return graph


def _put_version(repository: Path, version: int) -> None:
    folder = repository / MODEL / str(version)
    folder.mkdir(parents=True)
    shipped = ScoringSettings().model_repository / MODEL
    (folder.parent / "config.pbtxt").write_text((shipped / "config.pbtxt").read_text())
    (folder / "model.onnx").write_bytes(_graph(version))


class _Operator:
    """A thread that takes each step at its time, or as soon as the one before is done."""

    def __init__(self, channel: grpc.Channel, plan: Plan, begun_s: float) -> None:
        admin = admin_pb2_grpc.AdminStub(channel)
        files = [admin_pb2.ModelFile(name="model.onnx", content=_graph(NEW))]
        new: dict[str, Any] = {"model": MODEL, "version": NEW, "why": WHY}

        def canary(percent: float) -> Callable[[], object]:
            request = admin_pb2.CanaryModelRequest(percent=percent, **new)
            return lambda: admin.CanaryModel(request, timeout=CALL_TIMEOUT_S)

        steps: list[tuple[str, Callable[[], object]]] = [
            ("push", lambda: admin.PushModel(admin_pb2.PushModelRequest(files=files, **new), timeout=PUSH_TIMEOUT_S)),
            (
                "shadow",
                lambda: admin.ShadowModel(admin_pb2.ShadowModelRequest(percent=100, **new), timeout=CALL_TIMEOUT_S),
            ),
            ("canary 1 %", canary(1)),
            ("canary 10 %", canary(10)),
            ("canary 100 %", canary(100)),
            ("promote", lambda: admin.PromoteModel(admin_pb2.PromoteModelRequest(**new), timeout=CALL_TIMEOUT_S)),
            (
                "rollback",
                lambda: admin.RollbackModel(
                    admin_pb2.RollbackModelRequest(model=MODEL, why=WHY), timeout=CALL_TIMEOUT_S
                ),
            ),
        ]
        first_s = plan.quiet_share * plan.seconds
        # The last part of the run shows what comes after the rollback.
        self._planned = [
            (first_s + i * (plan.seconds - first_s) / (len(steps) + 0.5), name, step)
            for i, (name, step) in enumerate(steps)
        ]
        self._begun_s = begun_s
        self.steps: list[Step] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="operator", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """No further step begins; one in progress ends."""
        self._over.set()
        self._thread.join(PUSH_TIMEOUT_S)

    def _run(self) -> None:
        for at_s, name, step in self._planned:
            if self._over.wait(max(0.0, self._begun_s + at_s - time.monotonic())):
                return
            begun_s, failed = time.monotonic() - self._begun_s, ""
            try:
                step()
            except grpc.RpcError as error:
                failed = f"{code_of(error)}: {error.details()}"
            self.steps.append(Step(name, begun_s, time.monotonic() - self._begun_s, failed))


def _judged(
    plan: Plan, arrivals: Arrivals, replies: dict[int, tuple[float, bytes]], steps: list[Step], begun_s: float
) -> dict[str, Any]:
    from loadtest.faults.nets import is_odd

    versions: Counter[str] = Counter()
    levels: Counter[str] = Counter()
    mixed = late_old = 0
    rolled_back_s = next((step.done_s for step in steps if step.name == "rollback" and not step.failed), math.inf)
    for sent_s, payload in replies.values():
        reply = ranking_pb2.RankResponse.FromString(payload)
        versions[reply.model_version] += 1
        levels[ranking_pb2.Degradation.Level.Name(reply.degradation.level)] += 1
        name, _, number = reply.model_version.partition("/")
        if name != MODEL or not number.isdecimal():
            continue  # no model scored it: the formula, which says so
        mixed += any(is_odd(stream.score) is not (int(number) % 2 == 1) for stream in reply.streams)
        late_old += int(number) == NEW and sent_s - begun_s > rolled_back_s
    first_s = steps[0].begun_s if steps else plan.quiet_share * plan.seconds
    warm_s = 0.1 * first_s  # connections are made in the first moments
    quiet = _p99_ms(arrivals, warm_s, first_s)
    during = _p99_ms(arrivals, first_s, plan.seconds)
    parts = [("quiet", warm_s, first_s, "")]
    for step, after in zip(steps, [*[s.begun_s for s in steps[1:]], plan.seconds], strict=True):
        parts.append((step.name, step.begun_s, after, step.failed))
    took = {step.name: round((step.done_s - step.begun_s) * 1000, 1) for step in steps}
    return {
        "bench": "swap",
        "rate_rps": plan.rate_rps,
        "seconds": plan.seconds,
        "streams": plan.streams,
        "model": "triton" if plan.in_triton else "in process",
        "calls": len(arrivals.due_s),
        "failed": int(np.count_nonzero(arrivals.outcome != ANSWERED)),
        "errors": arrivals.report().errors,
        "quiet_p99_ms": quiet,
        "swap_p99_ms": during,
        "p99_ratio": round(during / quiet, 3) if quiet and during else None,
        "wanted_ratio": WANTED_RATIO,
        "versions": dict(versions),
        "levels": dict(levels),
        "mixed": mixed,
        "late_old": late_old,
        "steps_done": len(steps) == 7 and not any(step.failed for step in steps),
        "step_ms": took,
        "rollback_ms": took.get("rollback"),
        "late_max_ms": round(float(np.nanmax(arrivals.late_s)) * 1000, 2),
        "floor": "the quiet part of the same run",
        "parts": [
            {"part": name, "from_s": round(a, 2), "p99_ms": _p99_ms(arrivals, a, b), "failed": failed}
            | _worst(arrivals, a, b)
            for name, a, b, failed in parts
        ],
    }


def _p99_ms(arrivals: Arrivals, from_s: float, to_s: float) -> float | None:
    """Of the calls that were due then; one that failed was never answered (None: as many as that)."""
    mine: NDArray[np.bool_] = (arrivals.due_s >= from_s) & (arrivals.due_s < to_s)
    answered = np.sort(arrivals.latency_s[mine & (arrivals.outcome == ANSWERED)])
    return plain_ms(nearest_rank(answered, int(mine.sum()) - len(answered), 99))


def _worst(arrivals: Arrivals, from_s: float, to_s: float) -> dict[str, float | None]:
    """The longest answer to the calls that were due then, and when its call was due."""
    mine = np.flatnonzero((arrivals.due_s >= from_s) & (arrivals.due_s < to_s) & (arrivals.outcome == ANSWERED))
    if not len(mine):
        return {"max_ms": None, "max_at_s": None}
    worst = mine[np.argmax(arrivals.latency_s[mine])]
    return {
        "max_ms": round(float(arrivals.latency_s[worst]) * 1000, 2), "max_at_s": round(float(arrivals.due_s[worst]), 3),
    }  # fmt: skip


def _print(result: dict[str, Any]) -> None:
    console = Console(width=120, highlight=False)
    table = Table(title=f"{result['rate_rps']:,.0f} Rank calls/s, open loop, while the model changes")
    for title in ("part", "from s", "p99 ms", "longest ms", "due at s", "step took ms", "failed"):
        table.add_column(title, justify="left" if title in ("part", "failed") else "right")
    for part in result["parts"]:
        p99 = "∞" if part["p99_ms"] is None else f"{part['p99_ms']:.2f}"
        took = result["step_ms"].get(part["part"])
        longest, due = ("", "") if part["max_ms"] is None else (f"{part['max_ms']:.1f}", f"{part['max_at_s']:.2f}")
        spent = "" if took is None else f"{took:.0f}"
        table.add_row(part["part"], f"{part['from_s']:.1f}", p99, longest, due, spent, part["failed"])
    console.print(table)
    ratio = result["p99_ratio"]
    console.print(
        f"{result['calls']:,} calls, {result['failed']} failed (0 wanted), {result['mixed']} replies mixed versions (0 "
        f"wanted), {result['late_old']} by version {NEW} after its rollback (0 wanted). p99 {result['quiet_p99_ms']} → "
        f"{result['swap_p99_ms']} ms: {ratio} × the quiet one (at most {WANTED_RATIO} wanted). Versions seen: "
        f"{result['versions']}; degradation: {result['levels']}. Model: {result['model']}; {result['streams']:,} "
        f"streams. {result['machine']}, commit {result['commit']}; the client {result['client']}."
    )
    if not result["steps_done"]:
        console.print("FAULT: not every step was done; give the run more time, or see why one failed", markup=False)
    print(json.dumps(result))
