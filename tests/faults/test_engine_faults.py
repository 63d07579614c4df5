"""When our own code fails: the caller hears of it, and a table that may be half-changed serves nobody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from liverank.v1 import ranking_pb2

from server.app import App
from server.clock import ManualClock
from server.config import parse_settings
from tests.app import SMALL, Client, put_current_model, running_app, status_of
from tests.events import T0, started


def test_a_fault_while_applying_stops_the_engine_and_everybody_hears_of_it(tmp_path: Path) -> None:
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

    def broken(*_: Any) -> None:
        raise RuntimeError("half-way through a row")

    app.engine.table.apply = broken  # type: ignore[method-assign, assignment]
    with pytest.raises(grpc.RpcError) as failed:
        client.publish(started("s", 0))
    assert status_of(failed.value)[0] == "UNAVAILABLE"
    assert faults == ["engine"], "the process is told to end; a supervisor restarts it from its log"
    with pytest.raises(grpc.RpcError) as failed:
        client.ranking.Rank(ranking_pb2.RankRequest(), timeout=5.0)
    assert status_of(failed.value)[0] == "UNAVAILABLE"
    client.close()
    app.drain()


def test_a_fault_while_ranking_fails_that_batch_only(tmp_path: Path) -> None:
    with running_app(tmp_path) as client:
        client.publish(started("s", 0))
        client.tick()
        pipeline = client.app.engine.pipeline
        original = pipeline.rank

        def broken(*_: Any) -> Any:
            pipeline.rank = original  # type: ignore[method-assign]
            raise RuntimeError("a bug")

        pipeline.rank = broken  # type: ignore[method-assign]
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
