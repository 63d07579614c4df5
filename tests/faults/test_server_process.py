"""The server as a process: orderly drain, kill -9 in the middle of writing, bad settings."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from liverank.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    ingest_pb2,
    ingest_pb2_grpc,
    liveness_pb2,
    liveness_pb2_grpc,
    ranking_pb2,
    ranking_pb2_grpc,
)

from loadtest.processes import ROOT, Server, start_server, to_toml
from server.clock import SystemClock
from tests.app import SMALL, put_current_model
from tests.events import event, started
from tests.triton_server import eventually


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, dict[str, Any]]:
    put_current_model(tmp_path / "models")
    return {
        "table": {**SMALL, "capacity": 5_000, "lease_ms": 600_000},
        "scoring": {"mode": "local", "model_repository": str(tmp_path / "models")},
        "serve": {"drain_grace_ms": 5_000},
    }


@pytest.fixture
def server(tmp_path: Path, settings: dict[str, dict[str, Any]]) -> Iterator[Server]:
    running = start_server(tmp_path / "server", settings)
    yield running
    running.process.kill()
    running.process.wait()


def starts(first: int, count: int) -> ingest_pb2.EventBatch:
    now_ms = SystemClock().now_ms()
    events = [started(f"s{i}", i + 1, now_ms) for i in range(first, first + count)]
    return ingest_pb2.EventBatch(producer_id="p", events=events)


def test_sigterm_finishes_what_is_in_flight_turns_readiness_off_and_exits_with_zero(server: Server) -> None:
    with grpc.insecure_channel(server.address) as channel:
        list(ingest_pb2_grpc.IngestStub(channel).Publish(iter([starts(0, 200)])))
        health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="liverank.v1.Ranking"))
        assert next(health).status == health_pb2.HealthCheckResponse.SERVING
        watch = liveness_pb2_grpc.LivenessStub(channel).WatchEnded(liveness_pb2.WatchEndedRequest())
        watch.initial_metadata()
        idle = threading.Event()
        publish = ingest_pb2_grpc.IngestStub(channel).Publish(iter(lambda: idle.wait(60) or None, None))
        rank = ranking_pb2_grpc.RankingStub(channel).RankBatch
        batch = ranking_pb2.RankBatchRequest(requests=[ranking_pb2.RankRequest(limit=50)] * 1_000)
        in_flight = rank.future(batch, timeout=30.0)
        eventually(lambda: in_flight.running() or in_flight.done())
        server.process.send_signal(signal.SIGTERM)
        statuses = [update.status for update in _until_closed(health)]
        assert statuses[:1] in ([], [health_pb2.HealthCheckResponse.NOT_SERVING])
        if in_flight.exception() is not None:
            # It had not been taken up yet: refused by us, or dropped by gRPC's core as it closed the port.
            # That a call which was taken up is answered is proven in tests/e2e/test_service.py.
            assert in_flight.exception().code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        else:
            assert len(in_flight.result().responses) == 1_000
        with pytest.raises(grpc.RpcError) as ended:
            next(watch)
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        assert server.process.wait(60) == 0
        idle.set()
        publish.cancel()
    assert "drained cleanly" in server.log.read_text()


def _until_closed(stream: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from stream
    except grpc.RpcError:
        return


def test_kill_9_while_writing_loses_nothing_that_was_acknowledged(
    tmp_path: Path, settings: dict[str, dict[str, Any]]
) -> None:
    folder = tmp_path / "server"
    server = start_server(folder, settings)
    acknowledged: list[int] = []
    ended: list[int] = []

    def batches() -> Iterator[ingest_pb2.EventBatch]:
        now_ms, sequence = SystemClock().now_ms(), 10_000
        for i in range(0, 4_000, 10):
            yield starts(i, 10)
            sequence += 1
            end = event(f"s{i}", sequence, now_ms, 1, ended={})
            yield ingest_pb2.EventBatch(producer_id="q", events=[end])

    try:
        with grpc.insecure_channel(server.address) as channel:
            acks = _until_closed(ingest_pb2_grpc.IngestStub(channel).Publish(batches()))
            for number, ack in enumerate(acks):
                assert not ack.rejected
                (ended if number % 2 else acknowledged).append(number // 2 * 10)
                if number == 61:
                    server.process.kill()  # the next batches are on their way
    finally:
        server.process.kill()
    assert server.process.wait(10) == -signal.SIGKILL
    again = start_server(folder, settings)
    try:
        with grpc.insecure_channel(again.address) as channel:
            wanted = [liveness_pb2.StreamRef(stream_id=f"s{i + k}") for i in acknowledged for k in range(10)]
            check = liveness_pb2_grpc.LivenessStub(channel).CheckLive
            states = {
                s.stream_id: s.state
                for start in range(0, len(wanted), 1_000)
                for s in check(liveness_pb2.CheckLiveRequest(streams=wanted[start : start + 1_000])).streams
            }
            assert len(acknowledged) > 20 and all(states[f"s{i}"] == liveness_pb2.LiveStatus.ENDED for i in ended)
            live = [f"s{i + k}" for i in acknowledged for k in range(1, 10)]
            assert all(states[s] == liveness_pb2.LiveStatus.LIVE for s in live)
            status = admin_pb2_grpc.AdminStub(channel).Status(admin_pb2.StatusRequest())
            assert status.applied_offset >= len(acknowledged) + len(ended)
            shown = ranking_pb2_grpc.RankingStub(channel).Rank(ranking_pb2.RankRequest(limit=100), timeout=10.0)
            assert not {s.stream_id for s in shown.streams} & {f"s{i}" for i in ended} and shown.streams
    finally:
        again.stop()


def test_a_part_that_fails_before_the_server_serves_ends_it_with_a_failure(
    tmp_path: Path, settings: dict[str, dict[str, Any]]
) -> None:
    """Exit status 0 would tell a supervisor that all is well and nothing needs a restart."""
    settings = {**settings, "log": {"path": str(tmp_path / "events.sqlite3")}, "serve": {"port": 0, "metrics_port": 0}}
    (tmp_path / "config.toml").write_text(to_toml(settings))
    program = """
import server.app
from server.__main__ import main

def fails(engine, backend):
    engine._on_fault()  # as its thread would, beside the one that starts

server.app.warm_up = fails
raise SystemExit(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", program, "serve", "--config", str(tmp_path / "config.toml")],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[table]\ncapactiy = 5\n", "table.capactiy"),
        ("[serve]\nport = 70000\n", "serve.port"),
        ("[table]\ntombstone_ms = 10\nmax_lateness_ms = 20\n", "tombstone_ms (10) must be larger"),
        ("[rank]\nrules_file = '/nowhere/rules.toml'\n", "/nowhere/rules.toml"),
        ("not toml", "config.toml"),
    ],
)
def test_wrong_settings_end_the_start_with_the_key_and_what_is_allowed(tmp_path: Path, text: str, told: str) -> None:
    config = tmp_path / "config.toml"
    config.write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "server", "serve", "--config", str(config)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and told in done.stderr


def test_a_damaged_log_refuses_to_start_and_names_the_record(
    tmp_path: Path, settings: dict[str, dict[str, Any]]
) -> None:
    import sqlite3

    folder = tmp_path / "server"
    server = start_server(folder, settings)
    with grpc.insecure_channel(server.address) as channel:
        list(ingest_pb2_grpc.IngestStub(channel).Publish(iter([starts(0, 1), starts(1, 1)])))
    assert server.stop() == 0
    with sqlite3.connect(folder / "events.sqlite3") as log:
        log.execute("UPDATE log SET payload = x'00' WHERE record = 1")
    from loadtest.processes import NotStartedError

    with pytest.raises(NotStartedError, match="record 1 is damaged"):
        start_server(folder, settings)
