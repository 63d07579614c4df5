"""Health.v1 while watchers come and go: telling it must never wait for a watcher that leaves."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from server.rpc.direct import DirectServer
from server.rpc.health import Health

SERVING = health_pb2.HealthCheckResponse.SERVING
ROUNDS, WATCHERS = 20, 16


@pytest.fixture
def served() -> Iterator[tuple[Health, health_pb2_grpc.HealthStub]]:
    """Health on our own transport, and a client of it."""
    server = grpc.server(ThreadPoolExecutor(4))
    health = Health(server)
    port = server.add_insecure_port("127.0.0.1:0")
    calls = DirectServer(server, {})
    calls.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield health, health_pb2_grpc.HealthStub(channel)
    stopping = threading.Thread(target=lambda: calls.stop(1.0).wait(10.0), daemon=True)
    stopping.start()
    stopping.join(10.0)
    assert not stopping.is_alive(), "the server never stopped"


def test_health_changes_and_the_server_stops_while_watchers_leave(
    served: tuple[Health, health_pb2_grpc.HealthStub],
) -> None:
    health, stub = served
    told: list[int] = []

    def flip() -> None:
        for turn in range(10 * ROUNDS):
            health.tell(serves=turn % 2 == 0)
            told.append(turn)

    flipping = threading.Thread(target=flip, daemon=True)
    flipping.start()
    for _ in range(ROUNDS):
        watches = [stub.Watch(health_pb2.HealthCheckRequest(), timeout=10.0) for _ in range(WATCHERS)]
        for watch in watches:
            next(watch)
        for watch in watches:
            watch.cancel()
    flipping.join(10.0)
    assert not flipping.is_alive(), f"telling health waits since turn {len(told)}"
    health.tell(serves=True)
    assert stub.Check(health_pb2.HealthCheckRequest(), timeout=10.0).status == SERVING


def test_a_watcher_hears_of_every_lasting_change(served: tuple[Health, health_pb2_grpc.HealthStub]) -> None:
    health, stub = served
    watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=10.0)
    heard = [next(watch).status]
    for serves in (True, False, True):
        health.tell(serves)
        heard.append(next(watch).status)
    watch.cancel()
    assert [status == SERVING for status in heard] == [False, True, False, True]
