"""Edges as processes: whichever dies, others go on, nothing lies about it, and it comes back."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from liverank.v1 import ingest_pb2, ingest_pb2_grpc, ranking_pb2, ranking_pb2_grpc

from loadtest.processes import NotStartedError, Server, children_of, running_server, start_server, wait_for
from server.clock import SystemClock
from tests.app import put_current_model
from tests.events import started

EDGES = 2
SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("edges")
    put_current_model(path / "models")
    return path


def settings(folder: Path) -> dict[str, dict[str, object]]:
    return {
        "serve": {"edges": EDGES},
        "table": {"capacity": 256, "embedding_dim": 4, "lease_ms": 600_000},
        "scoring": {"model_repository": str(folder / "models")},
    }


@contextmanager
def channel_to(server: Server) -> Iterator[grpc.Channel]:
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 200)]
    with grpc.insecure_channel(server.address, options=options) as channel:
        yield channel


def part_pids(server: Server, kind: str) -> set[int]:
    return {pid for pid, line in children_of(server.process.pid).items() if f"-m server {kind} " in line}


def publish(channel: grpc.Channel, *events: ingest_pb2.Event, first: int = 1) -> None:
    for i, one in enumerate(events):
        one.sequence = first + i
        one.event_time_ms = SystemClock().now_ms()
    batch = ingest_pb2.EventBatch(producer_id="p", events=events)
    (ack,) = ingest_pb2_grpc.IngestStub(channel).Publish(iter([batch]), timeout=20.0)
    assert ack.accepted == len(events), ack


def shown(channel: grpc.Channel, timeout: float = 10.0) -> list[str]:
    reply = ranking_pb2_grpc.RankingStub(channel).Rank(ranking_pb2.RankRequest(), timeout=timeout)
    return [s.stream_id for s in reply.streams]


def serves(channel: grpc.Channel) -> bool:
    try:
        return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2.0).status == SERVING
    except grpc.RpcError:
        return False


def shows(server: Server, *ids: str) -> bool:
    with channel_to(server) as channel:
        try:
            return set(shown(channel, 2.0)) == set(ids)
        except grpc.RpcError:
            return False


def test_edges_share_a_port_lose_only_their_own_calls_and_are_restarted_as_is_the_engine(folder: Path) -> None:
    with running_server(folder / "server", settings(folder)) as server:
        with channel_to(server) as channel:
            publish(channel, started("a", 0), started("b", 0))
        wait_for(lambda: shows(server, "a", "b"), 60.0, "both are shown")
        engine, edges = part_pids(server, "engine"), part_pids(server, "edge")
        assert len(engine) == 1 and len(edges) == EDGES

        # Every edge takes connections: enough of them reach both.
        connections: dict[int, int] = {}
        for _ in range(40):
            with channel_to(server) as channel:
                shown(channel)
        for pid in edges:
            text = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            connections[pid] = int(text[11]) + int(text[12])
        assert all(connections.values())

        # An edge dies: whoever is connected to the other notices nothing.
        killed = edges.pop()
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: len(part_pids(server, "edge") - {killed}) == EDGES, 60.0, "another edge is started")
        wait_for(lambda: shows(server, "a", "b"), 60.0, "it serves")
        assert part_pids(server, "engine") == engine

        # The engine dies: health says so, calls are UNAVAILABLE and not wrong, and nothing acknowledged is lost.
        with channel_to(server) as channel:
            publish(channel, started("c", 0), first=10)
            (pid,) = engine
            codes: set[grpc.StatusCode] = set()
            stopped = threading.Event()

            def ask() -> None:
                stub = ranking_pb2_grpc.RankingStub(channel)
                while not stopped.is_set():
                    try:
                        stub.Rank(ranking_pb2.RankRequest(), timeout=30.0)
                    except grpc.RpcError as error:
                        codes.add(error.code())

            asking = threading.Thread(target=ask)
            asking.start()
            os.kill(pid, signal.SIGKILL)
            try:
                wait_for(lambda: not serves(channel), 60.0, "health says NOT_SERVING")
                wait_for(lambda: serves(channel), 60.0, "SERVING again")
            finally:
                stopped.set()
                asking.join()
            assert codes == {grpc.StatusCode.UNAVAILABLE}
            wait_for(lambda: shows(server, "a", "b", "c"), 60.0, "what was acknowledged is there")
        assert part_pids(server, "engine") != engine
        everybody = part_pids(server, "engine") | part_pids(server, "edge")
        assert server.stop() == 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in everybody)


def test_parts_end_when_their_supervisor_is_killed(folder: Path) -> None:
    server = start_server(folder / "orphans", settings(folder))
    parts = part_pids(server, "engine") | part_pids(server, "edge")
    server.process.kill()
    server.process.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in parts), 60.0, "all parts end")


def test_settings_that_cannot_serve_end_it_with_status_2(folder: Path) -> None:
    wrong = settings(folder) | {"rank": {"rules_file": str(folder / "missing.toml")}}
    with pytest.raises(NotStartedError, match="exit status 2"):
        start_server(folder / "wrong", wrong)
