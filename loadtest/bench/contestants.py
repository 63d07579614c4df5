"""The servers that `bench serve` compares, started alike, filled alike, and only one of them running at a time."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc

from loadtest.bench.catalogue import DIM, Catalogue, make_catalogue
from loadtest.bench.child import start_child
from loadtest.bench.fill import fill, wait_until_scored
from loadtest.bench.load import Ask
from loadtest.processes import Server, children_of, cpu_seconds, start_server

OURS, CONSTANT, THREADS, TEXTBOOK, TEXTBOOK_LEAN = "ours", "constant", "constant_threads", "textbook", "textbook_lean"
BEHIND_EDGES, EDGES = "ours_behind_edges", 2
OURS_RANKED, TEXTBOOK_RANKED = "ours_with_ranker", "textbook_with_ranker"
RANKER = "ranker"
"""The shipped model viewer x stream, of the repository."""
OLDEST_MS = 7_200_000
"""Starts are spread over two hours: if every stream were fresh, each tick of ours would do the work of a mass start."""
CALL_TIMEOUT_S = 10.0
STOP_PATIENCE_S = 40
"""Edges drain first, then their engine: on a busy machine that is not done in ten seconds."""


@dataclass(frozen=True)
class Contestant:
    """A running server. ``rank`` and ``rank_batch`` take and return serialised messages."""

    name: str
    server: Server
    rank: Ask
    rank_batch: Ask

    @property
    def pids(self) -> list[int]:
        """Its process, and those that it started."""
        return [self.server.process.pid, *children_of(self.server.process.pid)]

    @property
    def cpu_s(self) -> float:
        """CPU time its processes have used, seconds."""
        return sum(cpu_seconds(pid) for pid in self.pids)

    @property
    def engine_cpu_s(self) -> float:
        """CPU time of the engine behind edges, seconds."""
        children = children_of(self.server.process.pid)
        return sum(cpu_seconds(pid) for pid, line in children.items() if "-m server engine " in line)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Its process runs inside, and is stopped outside.

        Ours works between requests too (ticks, scoring); on shared cores that would slow the others down.
        """
        self.tell(signal.SIGCONT)
        try:
            yield
        finally:
            self.tell(signal.SIGSTOP)

    def tell(self, number: signal.Signals) -> None:
        """Sends a signal to all its processes."""
        for pid in self.pids:
            os.kill(pid, number)


def our_settings(streams: int) -> dict[str, dict[str, object]]:
    """Defaults, but for room, the model in process, starts in the past, and equal work: however loaded the machine
    is, all candidates are scored and nothing is shed."""
    return {
        "table": {
            "capacity": streams + 1_000,
            "embedding_dim": DIM,
            "lease_ms": 5 * OLDEST_MS,
            "max_lateness_ms": 2 * OLDEST_MS,
            "tombstone_ms": 3 * OLDEST_MS,
        },
        "scoring": {"mode": "local"},
        "admission": {"target_ms": 60_000, "target_wait_ms": 60_000},
    }


@contextmanager
def contestants(folder: Path, streams: int, sample: bytes, every: bool = True) -> Iterator[dict[str, Contestant]]:
    """Ours, the constant reply on our transport and on grpcio's own, and the textbook server, whole and lean; ours
    behind edges; ours and the textbook server with a ranker. All stopped in the end.

    Args:
        sample: a serialised RankRequest; our reply to it is the constant one.
        every: also those that only the headline's number of streams asks: behind edges, and with a ranker.
    """
    catalogue = make_catalogue(streams, OLDEST_MS)
    with ExitStack() as stack:
        ours = stack.enter_context(_running(OURS, start_server(folder / OURS, our_settings(streams))))
        reply = _fill_and_ask(ours.server.address, catalogue, sample)
        reply_file = folder / "reply"
        reply_file.write_bytes(reply)
        started = {OURS: ours}
        others = {BEHIND_EDGES: {"serve": {"edges": EDGES}}, OURS_RANKED: {"ranker": {"model": RANKER}}}
        for name, more in others.items() if every else ():
            other = start_server(folder / name, our_settings(streams) | more)
            started[name] = stack.enter_context(_running(name, other))
            _fill_and_ask(other.address, catalogue, sample)
        n = ("--streams", str(streams))
        for name, module, arguments in (
            (CONSTANT, "loadtest.bench.constant", ("--reply-file", str(reply_file), "--transport", "direct")),
            (THREADS, "loadtest.bench.constant", ("--reply-file", str(reply_file), "--transport", "threads")),
            (TEXTBOOK, "loadtest.bench.textbook", n),
            (TEXTBOOK_LEAN, "loadtest.bench.textbook", (*n, "--lean")),
            *([(TEXTBOOK_RANKED, "loadtest.bench.textbook", (*n, "--ranker"))] if every else []),
        ):
            started[name] = stack.enter_context(_running(name, start_child(folder / name, module, *arguments)))
        for contestant in started.values():
            contestant.tell(signal.SIGSTOP)
        try:
            yield started
        finally:
            for contestant in started.values():
                contestant.tell(signal.SIGCONT)


def _fill_and_ask(address: str, catalogue: Catalogue, sample: bytes) -> bytes:
    with grpc.insecure_channel(address) as channel:
        fill(channel, catalogue)
        wait_until_scored(channel)
        reply: bytes = channel.unary_unary("/liverank.v1.Ranking/Rank")(sample, timeout=CALL_TIMEOUT_S)
        return reply


@contextmanager
def _running(name: str, server: Server) -> Iterator[Contestant]:
    try:
        with grpc.insecure_channel(server.address) as channel:
            rank = channel.unary_unary("/liverank.v1.Ranking/Rank")  # bytes in, bytes out
            rank_batch = channel.unary_unary("/liverank.v1.Ranking/RankBatch")
            yield Contestant(
                name,
                server,
                lambda request: rank(request, timeout=CALL_TIMEOUT_S),
                lambda request: rank_batch(request, timeout=CALL_TIMEOUT_S),
            )
    finally:
        _stop(server.process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Wakes a sleeping process and ends it with SIGTERM, or kills it.

    SIGTERM is sent more than once: a thread that has just been continued takes no further signal at first, so
    the kernel may hand it to another one; Python then runs the handler only when its main thread next wakes,
    which is never while that waits for the handler.
    """
    process.send_signal(signal.SIGCONT)
    for _ in range(STOP_PATIENCE_S):
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
            return
    process.kill()
    process.wait()
