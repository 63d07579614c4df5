"""Clients that harm: readers that do not read, thousands that say nothing, messages that stop half-way."""

from __future__ import annotations

import resource
import socket
import time

import grpc
from liverank.v1 import ingest_pb2, liveness_pb2, liveness_pb2_grpc, ranking_pb2

from loadtest.faults import http2
from loadtest.faults.base import Seen, scenario
from loadtest.faults.events import check_live, ended, publish, started
from loadtest.faults.stage import WITHIN_S, Stage
from loadtest.processes import rss_bytes

IDLE_CONNECTIONS = 10_000
SPARE_FILES = 1_000  # of this process and of the server, for everything else
HALF_CONNECTIONS = 40
ENDS_PER_BATCH = 1_000
# A reader with the smallest window gRPC allows, which does not grow.
SMALL_WINDOW = (("grpc.http2.lookahead_bytes", 1), ("grpc.http2.bdp_probe", 0))


@scenario("reader of ends too slow", traffic=False)
def reader_of_ends_too_slow(stage: Stage) -> Seen:
    """It is told to resync once it has fallen behind the bounded memory of ends; resynced, it hears again."""
    batches = 2 + 2 * stage.settings["serve"]["watch_buffer"] // ENDS_PER_BATCH
    before_bytes = rss_bytes(stage.server.process.pid)
    with stage.channel() as channel, stage.channel(*SMALL_WINDOW) as slow:
        watch = liveness_pb2_grpc.LivenessStub(slow).WatchEnded(liveness_pb2.WatchEndedRequest())
        watch.initial_metadata()
        gone = []
        run = time.monotonic_ns()
        begun_s = time.monotonic()
        for number in range(batches):
            ids = [f"slow-{run}-{number}-{i}" for i in range(ENDS_PER_BATCH)]
            publish(channel, *map(started, ids), *map(ended, ids))
            gone += ids
        heard, told = 0, ""
        try:
            for _ in watch:
                heard += 1
        except grpc.RpcError as error:
            told = error.code().name
        told_s = time.monotonic()
        shown = check_live(channel, gone)
        again = liveness_pb2_grpc.LivenessStub(slow).WatchEnded(liveness_pb2.WatchEndedRequest(), timeout=WITHIN_S)
        again.initial_metadata()
        publish(channel, started(f"last-{run}"), ended(f"last-{run}"))
        next(again)
        recovered_s = time.monotonic()
        again.cancel()
    grown = (rss_bytes(stage.server.process.pid) - before_bytes) / (1 << 20)
    return Seen(
        told_s - begun_s, recovered_s - told_s, told == "ABORTED",
        f"{told or 'nothing'} after {heard} of {len(gone)} ends; server grew {grown:.0f} MiB",
        shown_wrongly=len(shown),
    )  # fmt: skip


@scenario("idle connections")
def idle_connections(stage: Stage) -> Seen:
    """As many as the limits on open files allow, up to ten thousand; others are answered as before."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    wanted = IDLE_CONNECTIONS if hard == resource.RLIM_INFINITY else min(IDLE_CONNECTIONS, hard - SPARE_FILES)
    idle: list[socket.socket] = []
    with stage.probe() as probe:
        begun_s = time.monotonic()
        try:
            for _ in range(wanted):
                connection = http2.connect(stage.address)
                connection.sendall(http2.greeting())
                idle.append(connection)
            # The server has said its own settings to the last of them: it holds them all.
            idle[-1].recv(9)
            open_s = time.monotonic()
            with stage.channel() as newcomer:  # and takes new callers
                ask = newcomer.unary_unary("/liverank.v1.Ranking/Rank")
                ask(ranking_pb2.RankRequest(limit=1).SerializeToString(), timeout=WITHIN_S)
            taken_ms = (time.monotonic() - open_s) * 1000
            probe.wait_usual(open_s, WITHIN_S)
        finally:
            for connection in idle:
                connection.close()
        unusual = [a for a in probe.since(begun_s) if a.level != "NONE"]
        first_s = unusual[0].at_s - begun_s if unusual else None
        again = probe.wait_usual(time.monotonic(), WITHIN_S)
        recover_s = again.at_s - unusual[-1].at_s if unusual else None
        return Seen(
            first_s, recover_s, probe.discloses(begun_s),
            f"{len(idle):,} held (limit {hard:,} files); a newcomer was answered in {taken_ms:.0f} ms",
        )  # fmt: skip


@scenario("half a message")
def half_a_message(stage: Stage) -> Seen:
    """Requests and batches of events that stop in the middle, some for good, some with a reset."""
    stream_id = f"half-{time.monotonic_ns()}"
    batch = ingest_pb2.EventBatch(producer_id="half", events=[started(stream_id)] * 50).SerializeToString()
    request = ranking_pb2.RankRequest(viewer_id="v" * 60).SerializeToString()
    torn = [
        http2.greeting()[:20],
        http2.greeting() + http2.call("/liverank.v1.Ranking/Rank")[:30],
        http2.greeting() + http2.call("/liverank.v1.Ranking/Rank") + http2.half_message(request),
        http2.greeting() + http2.call("/liverank.v1.Ingest/Publish") + http2.half_message(batch),
    ]
    with stage.probe() as probe, stage.channel() as channel:
        begun_s = time.monotonic()
        hanging = []
        for number in range(HALF_CONNECTIONS):
            connection = http2.connect(stage.address)
            connection.sendall(torn[number % len(torn)])
            if number % 2:
                http2.reset(connection)
            else:
                hanging.append(connection)
        probe.wait_usual(time.monotonic(), WITHIN_S)
        applied = check_live(channel, [stream_id])
        for connection in hanging:
            http2.reset(connection)
        again = probe.wait_usual(time.monotonic(), WITHIN_S)
        unusual = [a for a in probe.since(begun_s) if a.level != "NONE"]
        return Seen(
            unusual[0].at_s - begun_s if unusual else None,
            again.at_s - unusual[-1].at_s if unusual else None,
            probe.discloses(begun_s),
            f"{HALF_CONNECTIONS} torn connections; nothing of a half batch was applied",
            shown_wrongly=len(applied),
        )  # fmt: skip
