"""Health, reflection, metrics: what operators and tools see."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from liverank.v1 import ranking_pb2
from prometheus_client.parser import text_string_to_metric_families

from kernels.backend import Backend
from server.app import App
from server.clock import ManualClock
from server.config import parse_settings
from server.engine import Engine
from server.warmup import warm_up
from tests.app import SMALL, Client, queued_rows, running_app
from tests.events import T0, event, started
from tests.triton_server import eventually

SERVICES = {f"liverank.v1.{name}" for name in ("Ranking", "Liveness", "Ingest", "Admin")}


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with running_app(tmp_path) as client:
        yield client


def test_every_service_reports_its_health(client: Client) -> None:
    stub = health_pb2_grpc.HealthStub(client.channel)
    for service in ("", *SERVICES):
        reply = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10.0)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_a_server_says_serving_only_once_it_is_warm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, release = threading.Event(), threading.Event()
    told: list[int] = []

    def slow_warm_up(engine: Engine, backend: Backend) -> None:
        begun.set()
        assert release.wait(10.0)
        warm_up(engine, backend)

    monkeypatch.setattr("server.app.warm_up", slow_warm_up)
    settings = parse_settings(
        {
            "serve": {"port": 0, "metrics_port": 0},
            "table": SMALL,
            "log": {"path": str(tmp_path / "events.sqlite3")},
            "scoring": {"mode": "local", "model_repository": str(tmp_path)},
        }
    )
    app = App(settings, ManualClock(T0), lambda: None)
    starting = threading.Thread(target=app.start)
    starting.start()
    assert begun.wait(10.0)
    with grpc.insecure_channel(f"127.0.0.1:{app.port}") as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        request = health_pb2.HealthCheckRequest(service="liverank.v1.Ranking")
        told.append(check(request, timeout=10.0).status)
        release.set()
        starting.join(60.0)
        told.append(check(request, timeout=10.0).status)
    app.drain()
    health = health_pb2.HealthCheckResponse
    assert told == [health.NOT_SERVING, health.SERVING]


def test_a_drain_answers_what_is_in_flight_and_refuses_what_comes_later(tmp_path: Path) -> None:
    with running_app(tmp_path) as client:
        client.publish(started("s", 0))
        client.tick()
        held, release = threading.Event(), threading.Event()
        client.app.engine.call(lambda: (held.set(), release.wait(10.0)))
        assert held.wait(10.0)
        in_flight = client.ranking.Rank.future(ranking_pb2.RankRequest(), timeout=10.0)
        eventually(lambda: queued_rows(client.app) == 1, what="the call waits for the engine")
        drained: list[bool] = []
        draining = threading.Thread(target=lambda: drained.append(client.app.drain()))
        draining.start()

        def refused() -> bool:  # until the drain has begun, a call just waits for the engine
            with pytest.raises(grpc.RpcError) as failed:
                client.ranking.Rank(ranking_pb2.RankRequest(), timeout=0.2)
            return failed.value.code() is grpc.StatusCode.UNAVAILABLE

        eventually(refused, what="new calls are refused")
        release.set()
        assert [s.stream_id for s in in_flight.result(10.0).streams] == ["s"]
        draining.join(20.0)
        assert drained == [True]


def test_reflection_lists_every_service(client: Client) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(client.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (reply,) = stub.ServerReflectionInfo(iter([request]), timeout=10.0)
    assert {s.name for s in reply.list_services_response.service} >= SERVICES


def scrape(client: Client) -> dict[tuple[str, str], float]:
    """Samples by (name, label values in the order of their label names)."""
    url = f"http://127.0.0.1:{client.app.metrics_port}/metrics"
    text = urllib.request.urlopen(url, timeout=10.0).read().decode()
    return {
        (sample.name, ",".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_tell_what_happened(client: Client) -> None:
    client.publish(started("a", 0), started("b", 0), event("ghost", 0, liked={}))
    client.publish(event("a", 0, epoch=1, ended={}))
    client.tick()
    client.rank(exclude_stream_ids=["nobody"])
    client.tick()
    seen = scrape(client)
    assert seen["liverank_events_total", "started"] == 2 and seen["liverank_events_total", "ended"] == 1
    assert seen["liverank_events_rejected_total", "UNKNOWN_STREAM"] == 1
    assert seen["liverank_streams", "live"] == 1 and seen["liverank_streams", "ended"] == 1
    assert seen["liverank_ends_total", "end_event"] == 1
    assert seen["liverank_end_to_gone_seconds_count", ""] == 1
    assert seen["liverank_rank_requests_total", "none,ok"] >= 1
    assert seen["liverank_source_served_total", "trending"] >= 1
    assert seen["liverank_model_calls_total", "ok"] >= 1
    assert seen["liverank_degradation_level", ""] == 0
    assert seen["liverank_applied_offset", ""] == 2
    for stage in ("queue", "retrieve", "blend", "select", "verify"):
        assert seen["liverank_stage_seconds_count", stage] >= 1
    assert seen["liverank_streams_excluded", "ended"] == 0
    assert 0 <= seen["liverank_feature_missing_share", "joins_per_minute_1m,missing"] <= 1


def test_refused_calls_are_counted_by_method_and_code(client: Client) -> None:
    with pytest.raises(grpc.RpcError):
        client.rank(surface="nowhere")
    assert scrape(client)["liverank_rpc_errors_total", "INVALID_ARGUMENT,Rank"] == 1
