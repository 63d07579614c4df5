"""When our own code fails: the caller hears of it, and a table that may be half-changed serves nobody."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from liverank.v1 import ranking_pb2

from server.app import App
from server.clock import ManualClock
from server.config import parse_settings
from server.errors import Draining
from tests.app import SMALL, Client, put_current_model, running_app, status_of
from tests.events import T0, started
from tests.triton_server import eventually


@contextmanager
def failing_app(tmp_path: Path) -> Iterator[tuple[App, Client, list[str]]]:
    """A server whose fault a test wants to see: (app, client, what was told of faults)."""
    put_current_model(tmp_path / "models")
    faults: list[str] = []
    settings = parse_settings(
        {
            "serve": {"port": 0, "metrics_port": 0, "drain_grace_ms": 2_000}, "table": SMALL,
            "log": {"path": str(tmp_path / "log.sqlite3")},
            "scoring": {"mode": "local", "model_repository": str(tmp_path / "models")},
        }
    )  # fmt: skip
    app = App(settings, ManualClock(T0), lambda: faults.append("engine"))
    app.start()
    client = Client(app, app.clock)
    try:
        yield app, client, faults
    finally:
        client.close()
        app.drain()


def broken(*_: Any) -> None:
    raise RuntimeError("half-way through a row")


def test_a_fault_while_leases_expire_stops_the_engine_too(tmp_path: Path) -> None:
    """Rows may have changed whose ends nobody was told of: that is no periodic step that may fail."""
    with failing_app(tmp_path) as (app, client, faults):
        client.publish(started("s", 0))
        app.engine.table.expire = broken  # type: ignore[method-assign, assignment]
        eventually(lambda: faults, what="the process is told to end")
        with pytest.raises(grpc.RpcError) as failed:
            client.rank()
        assert status_of(failed.value)[0] == "UNAVAILABLE"


def test_a_caller_that_leaves_while_the_engine_fails_does_not_keep_the_fault_a_secret(tmp_path: Path) -> None:
    class Leaving(Future[Any]):
        """Cancelled by its caller just after it was looked at."""

        def done(self) -> bool:
            return self.cancel() and False

    with failing_app(tmp_path) as (app, _, faults):
        waiting = Leaving()
        with app.engine._wake:  # its thread must not answer first
            app.engine._calls.append((lambda: None, waiting))
            app.engine._fail_everything(Draining("a test"))
            app.engine._calls.clear()  # nor later
        assert waiting.cancelled() or isinstance(waiting.exception(0), Draining)
        original = app.engine._fail_everything

        def fails(error: Any) -> None:
            original(error)
            raise RuntimeError("while telling everybody")

        app.engine._fail_everything = fails  # type: ignore[method-assign]
        app.engine._loop = broken  # type: ignore[method-assign, assignment]
        with pytest.raises(RuntimeError):
            app.engine._run()
        assert faults == ["engine"]


def test_a_fault_while_applying_stops_the_engine_and_everybody_hears_of_it(tmp_path: Path) -> None:
    with failing_app(tmp_path) as (app, client, faults):
        app.engine.table.apply = broken  # type: ignore[method-assign, assignment]
        with pytest.raises(grpc.RpcError) as failed:
            client.publish(started("s", 0))
        assert status_of(failed.value)[0] == "UNAVAILABLE"
        assert faults == ["engine"], "the process is told to end; a supervisor restarts it from its log"
        with pytest.raises(grpc.RpcError) as failed:
            client.ranking.Rank(ranking_pb2.RankRequest(), timeout=5.0)
        assert status_of(failed.value)[0] == "UNAVAILABLE"


def test_a_fault_while_ranking_fails_that_batch_only(tmp_path: Path) -> None:
    with running_app(tmp_path) as client:
        client.publish(started("s", 0))
        client.tick()
        pipeline = client.app.engine.pipeline
        original = pipeline.start

        def broken(*_: Any) -> Any:
            pipeline.start = original  # type: ignore[method-assign]
            raise RuntimeError("a bug")

        pipeline.start = broken  # type: ignore[method-assign]
        with pytest.raises(grpc.RpcError) as failed:
            client.rank()
        code, details = status_of(failed.value)
        assert code == "INTERNAL" and "a bug" not in details, "the log has the traceback, callers do not"
        assert client.rank().streams


def test_a_fault_in_a_tick_does_not_stop_answers(tmp_path: Path) -> None:
    with running_app(tmp_path) as client:
        client.publish(started("s", 0))
        client.tick()
        recorder = client.app.recorder
        seen: list[int] = []
        original = recorder.ticked

        def broken(*arguments: Any) -> None:
            seen.append(1)
            recorder.ticked = original  # type: ignore[method-assign]
            raise RuntimeError("a bug")

        recorder.ticked = broken  # type: ignore[method-assign]
        with pytest.raises(RuntimeError):
            client.app.engine.call(client.app.engine._tick).result(10.0)
        assert seen and client.rank().streams
