"""A whole server inside the test process: real gRPC on a free port, real log file, injected clock."""

from __future__ import annotations

import os
import queue
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from liverank.v1 import (
    admin_pb2_grpc,
    ingest_pb2,
    ingest_pb2_grpc,
    liveness_pb2_grpc,
    ranking_pb2,
    ranking_pb2_grpc,
)

from server.app import App
from server.clock import Clock, ManualClock
from server.config import Settings, TableSettings, parse_settings
from server.edge import Edge
from server.live.features import FeatureSet
from tests.events import T0
from tests.triton_server import put_model, small_net

EDGES = "TESTS_BEHIND_AN_EDGE"
"""Set: every app that tests run serves through an edge."""
FEATURES = FeatureSet.load(TableSettings().features_file)
SMALL = {"capacity": 256, "embedding_dim": 4, "lease_ms": 10_000, "grace_ms": 20_000}


_EDGE_OF: dict[App, Edge] = {}


def queued_rows(app: App) -> int:
    """Viewers that wait to be ranked, those in the ring of an edge included."""
    return _EDGE_OF[app].link.queued_rows if app in _EDGE_OF else app.engine.queued_rows


def put_current_model(repository: Path, version: int = 1, seed: int = 1) -> None:
    """A small model of the current feature schema, as `trendiness`."""
    model = small_net(seed, len(FEATURES), FEATURES.schema)
    put_model(repository, "trendiness", model, version, FEATURES.schema, len(FEATURES))


class Client:
    """Stubs of one server, and an open Publish stream."""

    def __init__(self, app: App, clock: Clock, channel: grpc.Channel | None = None) -> None:
        self.app, self.clock = app, clock
        self.channel = channel or grpc.insecure_channel(f"127.0.0.1:{app.port}")
        self.ranking = ranking_pb2_grpc.RankingStub(self.channel)
        self.liveness = liveness_pb2_grpc.LivenessStub(self.channel)
        self.admin = admin_pb2_grpc.AdminStub(self.channel)
        self._sequence = 0
        self._outbox: queue.SimpleQueue[ingest_pb2.EventBatch | None] = queue.SimpleQueue()
        self._acks = ingest_pb2_grpc.IngestStub(self.channel).Publish(iter(self._outbox.get, None))

    def publish(self, *events: ingest_pb2.Event, producer: str = "p") -> ingest_pb2.PublishAck:
        """Sends one batch with fresh sequences and waits for its acknowledgement."""
        for event in events:
            self._sequence += 1
            event.sequence = self._sequence
        self._outbox.put(ingest_pb2.EventBatch(producer_id=producer, events=events))
        return next(self._acks)

    def rank(self, **fields: Any) -> ranking_pb2.RankResponse:
        """One Rank call."""
        return self.ranking.Rank(ranking_pb2.RankRequest(**fields), timeout=10.0)

    def tick(self) -> None:
        """Waits for one whole refresh: scores, rules and views are those of the table as it is now."""
        self.app.engine.call(self.app.engine.refresh_now).result(10.0)

    def shown(self, **fields: Any) -> list[str]:
        """Ids in the slate, after a refresh."""
        self.tick()
        return [s.stream_id for s in self.rank(**fields).streams]

    def close(self) -> None:
        self._outbox.put(None)
        self.channel.close()


@contextmanager
def running_app(
    folder: Path, clock: Clock | None = None, model: bool = True, **sections: dict[str, Any]
) -> Iterator[Client]:
    """A serving app and a client of it; see `serving_app`."""
    with serving_app(folder, clock, model, **sections) as app:
        client = Client(app, app.engine.clock)
        try:
            yield client
        finally:
            client.close()


@contextmanager
def serving_app(
    folder: Path, clock: Clock | None = None, model: bool = True, **sections: dict[str, Any]
) -> Iterator[App]:
    """A serving app with its files in ``folder``; a second one in the same folder recovers its log."""
    clock = clock or ManualClock(T0)
    repository = folder / "models"
    if model and not repository.exists():
        put_current_model(repository)
    defaults: dict[str, dict[str, Any]] = {
        "serve": {"port": 0, "metrics_port": 0},
        "table": SMALL,
        "log": {"path": str(folder / "events.sqlite3")},
        "scoring": {"mode": "local", "model_repository": str(repository)},
    }
    merged = {name: {**defaults.get(name, {}), **sections.get(name, {})} for name in {*defaults, *sections}}
    faults: list[str] = []
    settings = parse_settings(merged)
    if os.environ.get(EDGES):
        with _app_behind_an_edge(settings, clock, lambda: faults.append("engine")) as app:
            yield app
    else:
        app = App(settings, clock, lambda: faults.append("engine"))
        app.start()
        try:
            yield app
        finally:
            assert app.drain(), "calls were cut off"
    assert not faults, "the engine gave up"


@contextmanager
def _app_behind_an_edge(settings: Settings, clock: Clock, on_fault: Callable[[], None]) -> Iterator[App]:
    """The same, its port being that of an edge, with rings and sockets as between processes."""
    with tempfile.TemporaryDirectory(prefix="liverank-") as folder:
        app = App(settings, clock, on_fault, Path(folder))
        app.start()
        edge = Edge(settings, clock, Path(folder))
        try:
            edge.start()
            app.port, _EDGE_OF[app] = edge.port, edge
            yield app
        finally:
            _EDGE_OF.pop(app, None)
            assert edge.drain(), "calls were cut off at the edge"
            assert app.drain(), "calls were cut off"


def status_of(error: grpc.RpcError) -> tuple[str, str]:
    """(code name, details) of a failed call."""
    return error.code().name, error.details() or ""  # type: ignore[attr-defined]
