"""A restart: from the newest usable snapshot and the log after it, with the port bound but not serving meanwhile."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from liverank.v1 import liveness_pb2, ranking_pb2, ranking_pb2_grpc

from server import app as app_module
from server import recovery
from server.app import App
from server.clock import ManualClock
from server.config import parse_settings
from server.errors import ConfigError, Draining, LogError, SnapshotError
from server.export import opened, recovered
from server.live.state import StateBuffer
from server.log.base import Record
from server.log.sqlite import SqliteLog
from server.log.trim import LogTrimmer
from tests.app import SMALL, Client, running_app, status_of
from tests.events import T0, batch, event, started
from tests.triton_server import eventually
from tests.unit.test_snapshots import everything


def state(client: Client) -> dict[str, Any]:
    engine = client.app.engine
    return engine.call(lambda: {"offset": engine.applier.offset, **everything(engine.table)}).result(10.0)


def snapshots(folder: Path) -> list[Path]:
    return sorted((folder / "events.snapshots").glob("*.snapshot"))


def fill(client: Client, first: int, count: int) -> None:
    for i in range(first, first + count):
        client.publish(started(f"s{i}", 0, client.clock.now_ms(), title=f"title {i}", tags=["a"], category=f"g{i % 5}"))
        client.publish(event(f"s{i}", 0, client.clock.now_ms(), viewer="v", chatted={"count": i + 1}))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x55
    path.write_bytes(data)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(T0)


def test_a_restart_replays_only_what_came_after_the_snapshot_and_ends_with_the_same_table(
    tmp_path: Path, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    with running_app(tmp_path, clock) as client:
        fill(client, 0, 10)
        client.publish(event("s1", 0, T0, epoch=1, ended={"reason": "over"}))
        clock.advance(9_000)
        client.tick()
        assert client.app.snapshots.take() == 21
        fill(client, 10, 5)
        clock.advance(5_000)  # leases of the first ten run out
        client.tick()
        fill(client, 15, 1)
        before, ends = state(client), client.app.engine.ends.export()
        shown = client.shown(limit=50)
    with caplog.at_level(logging.INFO), running_app(tmp_path, clock) as client:
        assert state(client) == before and client.app.engine.ends.export() == ends
        assert client.shown(limit=50) == shown
    assert "snapshot of offset 21, then 12 records" in caplog.text


def test_the_feed_of_ends_resumes_where_a_subscriber_was_before_the_restart(tmp_path: Path, clock: ManualClock) -> None:
    with running_app(tmp_path, clock) as client:
        fill(client, 0, 4)
        for i in range(3):
            client.publish(event(f"s{i}", 0, T0, epoch=1, ended={"reason": f"r{i}"}))
        client.app.snapshots.take()
    with running_app(tmp_path, clock) as client:
        client.publish(event("s3", 0, T0, epoch=1, ended={"reason": "r3"}), producer="another")
        watch = client.liveness.WatchEnded(liveness_pb2.WatchEndedRequest(after_offset=1), timeout=10.0)
        heard = [next(watch) for _ in range(3)]
        assert [(e.offset, e.stream_id, e.reason) for e in heard] == [(2, "s1", "r1"), (3, "s2", "r2"), (4, "s3", "r3")]
        watch.cancel()


def test_a_resent_batch_is_recognised_after_a_restart_from_a_snapshot(tmp_path: Path, clock: ManualClock) -> None:
    with running_app(tmp_path, clock) as client:
        fill(client, 0, 2)
        client.app.snapshots.take()
    with running_app(tmp_path, clock) as client:  # a fresh client numbers from 1 again
        ack = client.publish(event("s0", 0, T0, liked={}))
        assert [r.message for r in ack.rejected] == ["sequence: already applied"]


def test_a_damaged_snapshot_is_skipped_loudly_and_the_older_one_used(
    tmp_path: Path, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    with running_app(tmp_path, clock) as client:
        fill(client, 0, 3)
        client.app.snapshots.take()
        fill(client, 3, 3)
        client.app.snapshots.take()
        before = state(client)
    flip(snapshots(tmp_path)[-1], 5_000)
    with running_app(tmp_path, clock) as client:
        assert state(client) == before
        assert client.app.metrics.snapshots.labels("skipped")._value.get() == 1
    assert "SKIPPED a snapshot" in caplog.text and "checksum differs" in caplog.text
    assert [p.suffix for p in sorted((tmp_path / "events.snapshots").iterdir())] == [".snapshot", ".unusable"]


def test_without_a_usable_snapshot_a_shortened_log_refuses_to_start_unless_told_so(
    tmp_path: Path, clock: ManualClock
) -> None:
    keep = {"snapshot": {"keep": 1, "every_ms": 20}}
    with running_app(tmp_path, clock, **keep) as client:
        fill(client, 0, 10)
        eventually(lambda: client.app.metrics.log_trimmed._value.get() > 5, what="the log is shortened")
    for path in snapshots(tmp_path):
        flip(path, 5_000)
    with pytest.raises(LogError, match=r"records 1 to \d+ are gone.*accept_lost_history = true"):
        running_app(tmp_path, clock).__enter__()
    with running_app(tmp_path, clock, log={"accept_lost_history": True}) as client:
        assert client.app.engine.applier.offset == 20
        assert not client.publish(started("new", 0, T0), producer="q").rejected


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"capacity": 5}, r"table\.capacity: the snapshot has 8 rows, 5 are too few"),
        ({"embedding_dim": 8}, r"table\.embedding_dim: the streams of the snapshot have 4, got 8"),
    ],
)
def test_a_snapshot_that_does_not_fit_the_settings_is_refused_with_the_key(
    tmp_path: Path, clock: ManualClock, table: dict[str, int], told: str
) -> None:
    with running_app(tmp_path, clock) as client:
        fill(client, 0, 8)
        client.app.snapshots.take()
    with pytest.raises(ConfigError, match=told):
        running_app(tmp_path, clock, table={**SMALL, **table}).__enter__()


def test_a_larger_table_takes_the_snapshot_of_a_smaller_one(tmp_path: Path, clock: ManualClock) -> None:
    with running_app(tmp_path, clock) as client:
        fill(client, 0, 8)
        client.app.snapshots.take()
    with running_app(tmp_path, clock, table={**SMALL, "capacity": 1_000}) as client:
        assert sorted(client.shown()) == sorted(f"s{i}" for i in range(8))


def test_a_log_that_was_replaced_does_not_continue_somebody_elses_snapshot(tmp_path: Path, clock: ManualClock) -> None:
    with running_app(tmp_path, clock) as client:
        fill(client, 0, 2)
        client.app.snapshots.take()
    for path in tmp_path.glob("events.sqlite3*"):
        path.unlink()
    log = SqliteLog(tmp_path / "events.sqlite3")
    log.append([Record(i, T0, b"something else") for i in range(1, 10)])
    log.close()
    with pytest.raises(LogError, match="record 4 is not the one that the newest snapshot ends with"):
        running_app(tmp_path, clock).__enter__()


def test_a_log_that_lost_its_end_goes_on_after_the_snapshot(tmp_path: Path, clock: ManualClock) -> None:
    with running_app(tmp_path, clock) as client:
        fill(client, 0, 3)
        client.app.snapshots.take()
    log = SqliteLog(tmp_path / "events.sqlite3")
    log._db.execute("DELETE FROM log WHERE record > 3")
    log.close()
    with running_app(tmp_path, clock) as client:
        assert client.publish(started("new", 0, T0), producer="q").offset == 7
        before = state(client)
    with running_app(tmp_path, clock) as client:
        assert state(client) == before


def test_while_recovering_the_port_is_bound_health_is_not_serving_and_calls_are_refused(
    tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_app(tmp_path, clock) as client:
        fill(client, 0, 2)
    begun, release = threading.Event(), threading.Event()
    original = app_module.recover

    def slow(*arguments: Any) -> Any:
        begun.set()
        assert release.wait(10.0)
        return original(*arguments)

    monkeypatch.setattr("server.app.recover", slow)
    about = {
        "serve": {"port": 0, "metrics_port": 0}, "table": SMALL, "log": {"path": str(tmp_path / "events.sqlite3")},
        "scoring": {"mode": "local", "model_repository": str(tmp_path / "models")},
    }  # fmt: skip
    app = App(parse_settings(about), clock, lambda: None)
    starting = threading.Thread(target=app.start)
    starting.start()
    assert begun.wait(10.0)
    with grpc.insecure_channel(f"127.0.0.1:{app.port}") as channel:
        request = health_pb2.HealthCheckRequest(service="liverank.v1.Ranking")
        assert health_pb2_grpc.HealthStub(channel).Check(request, timeout=10.0).status == 2  # NOT_SERVING
        rank = ranking_pb2_grpc.RankingStub(channel).Rank
        with pytest.raises(grpc.RpcError) as refused:
            rank(ranking_pb2.RankRequest(), timeout=10.0)
        assert status_of(refused.value)[0] == "UNAVAILABLE" and "recovers" in status_of(refused.value)[1]
        release.set()
        starting.join(30.0)
        assert health_pb2_grpc.HealthStub(channel).Check(request, timeout=10.0).status == 1
        assert rank(ranking_pb2.RankRequest(), timeout=10.0).applied_offset == 4
    app.drain()


def test_a_server_told_to_stop_while_it_recovers_stops(
    tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = SqliteLog(tmp_path / "events.sqlite3")
    log.append([Record(i, T0, batch(started(f"s{i}", i))) for i in range(1, 600)])
    log.close()
    about = {
        "serve": {"port": 0, "metrics_port": 0}, "table": SMALL, "log": {"path": str(tmp_path / "events.sqlite3")},
        "scoring": {"mode": "local", "model_repository": str(tmp_path / "models")},
    }  # fmt: skip
    app = App(parse_settings(about), clock, lambda: None)
    app.stop_starting()
    with pytest.raises(Draining, match="stopped while recovering"):
        app.start()
    assert app.engine.applier.offset == 256


def test_the_log_is_shortened_behind_the_oldest_kept_snapshot_and_its_file_stops_growing(
    tmp_path: Path, clock: ManualClock
) -> None:
    log = SqliteLog(tmp_path / "log.sqlite3")
    trimmer = LogTrimmer(tmp_path / "log.sqlite3")
    sizes = []
    for turn in range(12):
        first = turn * 400
        for start in range(first, first + 400, 50):
            log.append([Record(i + 1, T0, bytes(3_000)) for i in range(start, start + 50)])
        while trimmer.step(first + 300):
            pass
        sizes.append(sum(p.stat().st_size for p in tmp_path.glob("log.sqlite3*")))
    assert max(sizes[6:]) <= 1.2 * max(sizes[:6]), sizes
    while trimmer.step(10**9):
        pass
    assert [r.offset for r in log.read(12 * 400 - 1)] == [12 * 400], "the newest record always stays"
    trimmer.close()
    log.close()


def test_a_running_server_keeps_the_log_back_to_its_oldest_kept_snapshot(tmp_path: Path, clock: ManualClock) -> None:
    with running_app(tmp_path, clock, snapshot={"keep": 2, "every_ms": 10}, log={"retain_records": 3}) as client:
        for turn in range(1_000):
            fill(client, turn % 50, 1)
            if client.app.metrics.log_trimmed._value.get() > 20:
                break
        before = state(client)
    oldest = int(snapshots(tmp_path)[0].stem)
    assert len(snapshots(tmp_path)) == 2
    log = SqliteLog(tmp_path / "events.sqlite3")
    assert 1 < log.first_offset <= oldest - 3
    log.close()
    snapshots(tmp_path)[1].unlink()
    with running_app(tmp_path, clock) as client:
        assert state(client) == before


def exported(folder: Path) -> tuple[dict[str, Any], int, int]:
    """What `liverank table export` would write about."""
    settings = parse_settings({"table": SMALL, "log": {"path": str(folder / "events.sqlite3")}})
    with opened(settings) as history:
        table, offset, at_ms = recovered(history, settings)
    return everything(table), offset, at_ms


def test_an_export_needs_no_record_that_a_snapshot_covers_and_changes_nothing(
    tmp_path: Path, clock: ManualClock
) -> None:
    with running_app(tmp_path, clock) as client:
        fill(client, 0, 10)
        clock.advance(12_000)  # leases run out by the clock alone: the snapshot knows, the log does not
        client.tick()
        offset = client.app.snapshots.take()
        fill(client, 10, 3)
        trimmer = LogTrimmer(tmp_path / "events.sqlite3")
        while trimmer.step(offset + 1):
            pass
        trimmer.close()
        want = state(client)
        found, at, at_ms = exported(tmp_path)  # beside the running server
        assert {"offset": at, **found} == want and at_ms == clock.now_ms()
    newest = snapshots(tmp_path)[-1]
    flip(newest, newest.stat().st_size // 2)
    with pytest.raises(LogError, match=r"records 1 to \d+ are gone, and no usable snapshot covers them"):
        exported(tmp_path)
    assert newest.exists(), "setting it aside is the server's business"
    flip(newest, newest.stat().st_size // 2)
    flip(tmp_path / "events.sqlite3", (tmp_path / "events.sqlite3").read_bytes().rindex(b"title 12"))
    before = (tmp_path / "events.sqlite3").read_bytes()
    with pytest.raises(LogError, match=r"record \d+ is damaged"):
        exported(tmp_path)
    assert (tmp_path / "events.sqlite3").read_bytes() == before, "to remove it is a start's business"


def test_an_export_whose_snapshot_was_overtaken_while_it_read_begins_again(
    tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_app(tmp_path, clock, snapshot={"keep": 1}) as client:
        fill(client, 0, 5)
        client.app.snapshots.take()
        original = recovery.starting_point

        def overtaken(*arguments: Any) -> int:
            monkeypatch.setattr("server.export.starting_point", original)
            fill(client, 5, 5)
            client.app.snapshots.take()
            client.app.snapshots._trim()
            return original(*arguments)

        monkeypatch.setattr("server.export.starting_point", overtaken)
        found, at, _ = exported(tmp_path)
        assert {"offset": at, **found} == state(client)


def test_a_snapshot_folder_that_cannot_be_used_is_refused_with_its_key(
    tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(self: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("server.log.snapshot.SnapshotFolder.remove_half_written", read_only)
    with pytest.raises(ConfigError, match=r"snapshot\.path: .* cannot be used: .*Permission denied"):
        running_app(tmp_path, clock).__enter__()


def test_a_snapshot_from_before_a_restart_is_in_the_metrics_and_a_log_that_cannot_be_shortened_is_counted(
    tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stuck(self: Any, before: int) -> int:
        raise LogError("cannot delete old records")

    with running_app(tmp_path, clock, snapshot={"keep": 1}) as client:
        fill(client, 0, 5)
        offset = client.app.snapshots.take()
    monkeypatch.setattr("server.log.trim.LogTrimmer.step", stuck)
    with running_app(tmp_path, clock, snapshot={"keep": 1}) as client:
        assert client.app.metrics.snapshot_offset._value.get() == offset, "else it looks as if none were ever taken"
        with pytest.raises(LogError):
            client.app.snapshots._trim()
        assert client.app.metrics.log_errors.labels("trim")._value.get() == 1


def test_no_memory_at_first_is_not_the_end_of_snapshots(
    tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[int] = []
    original = StateBuffer.reserve

    def short(self: StateBuffer, table: Any) -> None:
        if len(refused) < 2:
            refused.append(1)
            raise MemoryError("not now")
        original(self, table)

    monkeypatch.setattr(StateBuffer, "reserve", short)
    with running_app(tmp_path, clock, snapshot={"every_ms": 20}) as client:
        fill(client, 0, 1)
        eventually(lambda: snapshots(tmp_path), what="a snapshot, once there is memory")
        assert client.app.metrics.snapshots.labels("failed")._value.get() == 1


def test_a_failed_snapshot_is_counted_and_tried_again(
    tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[float] = []
    original = app_module.SnapshotFolder.write

    def full_twice(self: Any, contents: Any) -> Path:
        tries.append(time.monotonic())
        if len(tries) <= 2:
            raise SnapshotError("no space left")
        return original(self, contents)

    monkeypatch.setattr("server.log.snapshot.SnapshotFolder.write", full_twice)
    with running_app(tmp_path, clock, snapshot={"every_ms": 20}) as client:
        fill(client, 0, 2)
        eventually(lambda: snapshots(tmp_path), what="a snapshot after two failures")
        assert client.app.metrics.snapshots.labels("failed")._value.get() == 2
