"""The log under faults: killed while snapshotting, torn and flipped bytes, a full disk, brokers that go."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
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

from loadtest.processes import ROOT, NotStartedError, Server, start_server, to_toml
from server.__main__ import main
from server.clock import SystemClock
from tests.app import SMALL, put_current_model, status_of
from tests.events import started
from tests.kafka_broker import running_broker
from tests.triton_server import eventually

Settings = dict[str, dict[str, Any]]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    put_current_model(tmp_path / "models")
    return {
        "table": {**SMALL, "capacity": 20_000, "lease_ms": 600_000},
        "scoring": {"mode": "local", "model_repository": str(tmp_path / "models")},
        "serve": {"drain_grace_ms": 5_000},
    }


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    running: list[Server] = []

    def starter(settings: Settings, folder: Path | None = None) -> Server:
        running.append(start_server(folder or tmp_path / "server", settings))
        return running[-1]

    yield starter
    for server in running:
        server.process.kill()
        server.process.wait()


def starts(first: int, count: int) -> ingest_pb2.EventBatch:
    now_ms = SystemClock().now_ms()
    events = [started(f"stream-{i:05d}", i + 1, now_ms, title=f"title {i}") for i in range(first, first + count)]
    return ingest_pb2.EventBatch(producer_id="p", events=events)


def publish(server: Server, *batches: ingest_pb2.EventBatch) -> list[ingest_pb2.PublishAck]:
    with grpc.insecure_channel(server.address) as channel:
        return list(ingest_pb2_grpc.IngestStub(channel).Publish(iter(batches), timeout=30.0))


def status(server: Server) -> admin_pb2.StatusResponse:
    with grpc.insecure_channel(server.address) as channel:
        return admin_pb2_grpc.AdminStub(channel).Status(admin_pb2.StatusRequest(), timeout=10.0)


def live(server: Server, ids: list[str]) -> list[str]:
    refs = [liveness_pb2.StreamRef(stream_id=i) for i in ids]
    with grpc.insecure_channel(server.address) as channel:
        check = liveness_pb2_grpc.LivenessStub(channel).CheckLive
        found = check(liveness_pb2.CheckLiveRequest(streams=refs), timeout=10.0).streams
    return [s.stream_id for s in found if s.state == liveness_pb2.LiveStatus.LIVE]


def rank(server: Server) -> ranking_pb2.RankResponse:
    with grpc.insecure_channel(server.address) as channel:
        return ranking_pb2_grpc.RankingStub(channel).Rank(ranking_pb2.RankRequest(limit=20), timeout=10.0)


def metric(server: Server, name: str) -> float:
    text = urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=10.0).read().decode()
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found.group(1)) if found else 0.0


def kill(server: Server) -> None:
    server.process.kill()
    assert server.process.wait(10) == -signal.SIGKILL


def flip(path: Path, marker: bytes) -> None:
    """Damages one byte right after the first place where ``marker`` stands in a file."""
    data = bytearray(path.read_bytes())
    data[data.index(marker) + len(marker) - 1] ^= 1
    path.write_bytes(data)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs `liverank` with arguments in this process; gives its exit status and all it printed."""

    def run(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main(list(arguments))
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def test_kill_9_while_a_snapshot_is_written_loses_nothing_and_leaves_no_half_file(
    tmp_path: Path, settings: Settings, start: Callable[..., Server]
) -> None:
    settings["snapshot"] = {"every_ms": 1}
    server = start(settings)
    snapshots = tmp_path / "server" / "events.snapshots"
    acknowledged = 0
    with grpc.insecure_channel(server.address) as channel:
        acks = ingest_pb2_grpc.IngestStub(channel).Publish(starts(i, 100) for i in range(0, 19_000, 100))
        for ack in acks:
            assert not ack.rejected
            acknowledged += 100
            suffixes = {name.rsplit(".", 1)[-1] for name in os.listdir(snapshots)} if snapshots.exists() else set()
            if suffixes >= {"tmp", "snapshot"}:  # one is finished, the next is being written
                kill(server)
                break
    assert 100 < acknowledged < 19_000
    again = start({**settings, "snapshot": {"every_ms": 600_000}})
    assert status(again).live >= acknowledged
    assert len(live(again, [f"stream-{i:05d}" for i in range(0, acknowledged, 20)])) == acknowledged // 20
    assert not list(snapshots.glob("*.tmp"))
    assert "snapshot of offset 0" not in again.log.read_text().rsplit("recovered to", 1)[1]


def killed_after(start: Callable[..., Server], settings: Settings, batches: int) -> None:
    """A server that made that many records, each durable, and was killed: its WAL is as the last fsync left it."""
    server = start(settings)
    publish(server, *(starts(i, 1) for i in range(batches)))
    kill(server)


def test_a_wal_torn_in_its_last_frame_loses_that_record_only(
    tmp_path: Path, settings: Settings, start: Callable[..., Server]
) -> None:
    killed_after(start, settings, 5)
    wal = tmp_path / "server" / "events.sqlite3-wal"
    os.truncate(wal, wal.stat().st_size - 1_000)
    again = start(settings)
    assert live(again, [f"stream-{i:05d}" for i in range(5)]) == [f"stream-{i:05d}" for i in range(4)]
    (ack,) = publish(again, ingest_pb2.EventBatch(producer_id="q", events=[starts(4, 1).events[0]]))
    assert ack.offset == 5 and not ack.rejected


def test_a_damaged_last_record_is_removed_loudly_and_the_server_starts(
    tmp_path: Path, settings: Settings, start: Callable[..., Server]
) -> None:
    server = start(settings)
    publish(server, *(starts(i, 1) for i in range(5)))
    assert server.stop() == 0
    flip(tmp_path / "server" / "events.sqlite3", b"stream-00004")
    again = start(settings)
    assert live(again, [f"stream-{i:05d}" for i in range(5)]) == [f"stream-{i:05d}" for i in range(4)]
    assert "record 5, the last one, is damaged (checksum differs) and was REMOVED" in again.log.read_text()
    assert metric(again, "liverank_log_truncated_records_total") == 1


def test_a_flipped_byte_in_the_middle_refuses_to_start_until_the_operator_decides(
    tmp_path: Path, settings: Settings, start: Callable[..., Server], command: Callable[..., tuple[int, str]]
) -> None:
    server = start(settings)
    publish(server, *(starts(i, 1) for i in range(5)))
    folder = tmp_path / "server"
    config = str(folder / "liverank.toml")
    truncate = ("log", "truncate", "--config", config, "--from", "3")
    code, said = command(*truncate, "--yes")
    assert code == 2 and "is a server running on it?" in said
    assert server.stop() == 0
    assert command("log", "verify", "--config", config)[0] == 0
    flip(folder / "events.sqlite3", b"stream-00002")
    with pytest.raises(
        NotStartedError, match=r"record 3 is damaged.*liverank log verify.*liverank log truncate --from"
    ):
        start(settings)
    code, said = command("log", "verify", "--config", config)
    assert code == 1 and "DAMAGED: record 3 is damaged" in said
    code, said = command(*truncate)
    assert code == 2 and "--yes" in said
    assert command("log", "verify", "--config", config)[0] == 1, "nothing was changed yet"
    code, said = command(*truncate, "--yes")
    assert code == 0 and "removed 3 records" in said
    assert (folder / "events.sqlite3.before-truncate-3").exists()
    assert command("log", "verify", "--config", config)[0] == 0
    again = start(settings)
    assert live(again, [f"stream-{i:05d}" for i in range(5)]) == ["stream-00000", "stream-00001"]


def test_damage_that_a_snapshot_covers_does_no_harm(
    tmp_path: Path, settings: Settings, start: Callable[..., Server], command: Callable[..., tuple[int, str]]
) -> None:
    server = start({**settings, "snapshot": {"every_ms": 20}})
    publish(server, *(starts(i, 1) for i in range(5)))
    eventually(lambda: metric(server, "liverank_snapshot_offset") == 5, what="a snapshot of all")
    publish(server, starts(5, 1), starts(6, 1))
    assert server.stop() == 0
    folder = tmp_path / "server"
    flip(folder / "events.sqlite3", b"stream-00002")
    code, said = command("log", "verify", "--config", str(folder / "liverank.toml"))
    assert code == 0 and "covered by a snapshot, so no harm: record 3" in said
    assert len(live(start(settings), [f"stream-{i:05d}" for i in range(7)])) == 7


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small tmpfs: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_disk(folder: Path) -> Path:
    """A file that takes all the space there is left."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue
    return filler


def test_a_full_disk_refuses_publish_ranks_on_and_recovers_by_itself(
    settings: Settings, start: Callable[..., Server], small_disk: Path
) -> None:
    settings["snapshot"] = {"every_ms": 100}
    server = start(settings, small_disk)
    publish(server, starts(0, 200))
    eventually(lambda: rank(server).streams, what="streams are ranked")
    eventually(lambda: metric(server, 'liverank_snapshots_total{outcome="written"}') >= 1, what="a snapshot")
    filler = fill_disk(small_disk)

    def refused() -> grpc.RpcError | None:
        nonlocal acknowledged
        try:
            publish(server, starts(acknowledged, 200))
        except grpc.RpcError as error:
            return error
        acknowledged += 200  # into space the log had reserved already
        return None

    acknowledged = 200
    code, details = status_of(eventually(refused, what="Publish is refused"))
    assert code == "RESOURCE_EXHAUSTED" and "no space left" in details
    assert rank(server).streams, "ranking goes on"
    assert metric(server, 'liverank_log_errors_total{reason="full"}') >= 1
    snapshots = small_disk / "events.snapshots"
    if acknowledged > 200:
        eventually(lambda: metric(server, 'liverank_snapshots_total{outcome="failed"}') >= 1, what="a failed snapshot")
        assert not list(snapshots.glob("*.tmp"))
    filler.unlink()
    (ack,) = publish(server, starts(acknowledged, 200))
    assert not ack.rejected and ack.accepted == 200
    eventually(lambda: metric(server, "liverank_snapshot_offset") >= ack.offset, what="a snapshot, by itself")
    kill(server)
    assert status(start(settings, small_disk)).live == acknowledged + 200


def kafka_settings(settings: Settings, servers: str) -> Settings:
    kafka = {"bootstrap_servers": servers, "topic": "events", "ack_timeout_ms": 1_000, "time_record_ms": 100}
    return {**settings, "log": {"kind": "kafka"}, "log.kafka": kafka, "log.kafka.options": {"fetch.wait.max.ms": "10"}}


def test_brokers_that_go_refuse_publish_ranking_goes_on_and_all_is_well_when_they_are_back(
    tmp_path: Path, settings: Settings, start: Callable[..., Server]
) -> None:
    with running_broker("events") as broker:
        about = kafka_settings(settings, broker.servers)
        server = start(about, tmp_path / "a")
        publish(server, starts(0, 10))
        broker.down()
        with pytest.raises(grpc.RpcError) as failed:
            publish(server, starts(10, 10))
        code, details = status_of(failed.value)
        assert code == "UNAVAILABLE" and "may or may not be in the log" in details
        eventually(lambda: rank(server).streams, what="ranking goes on")
        broker.up()
        acks = eventually(lambda: _published(server, starts(10, 10)), within_s=20.0, what="Publish works again")
        assert acks[0].accepted + len(acks[0].rejected) == 10  # the first try may have arrived after all
        kill(server)
        again = start(about, tmp_path / "a")
        other = start(about, tmp_path / "b")
        for one in (again, other):
            assert live(one, [f"stream-{i:05d}" for i in range(20)]) == [f"stream-{i:05d}" for i in range(20)]


def _published(server: Server, batch: ingest_pb2.EventBatch) -> list[ingest_pb2.PublishAck]:
    try:
        return publish(server, batch)
    except grpc.RpcError:
        return []


def test_a_start_without_brokers_waits_not_serving_and_can_be_stopped(tmp_path: Path, settings: Settings) -> None:
    with running_broker("events") as broker:
        about = kafka_settings(settings, broker.servers)
    config, log = tmp_path / "config.toml", tmp_path / "log"
    about["serve"] = {"port": 0, "metrics_port": 0}
    about["log"]["path"] = str(tmp_path / "events")
    config.write_text(to_toml(about))
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "server", "serve", "--config", str(config)], cwd=ROOT, stdout=out, stderr=out
        )
    try:
        eventually(
            lambda: "waiting for the brokers" in log.read_text(), within_s=30.0, what="it says what it waits for"
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(20.0) == 0
    finally:
        process.kill()
        process.wait()


def test_a_record_deleted_at_the_brokers_before_it_was_read_ends_the_server_and_names_it(
    tmp_path: Path, settings: Settings, start: Callable[..., Server]
) -> None:
    with running_broker("events") as broker:
        about = kafka_settings(settings, broker.servers)
        about["snapshot"] = {"every_ms": 20}
        server = start(about, tmp_path / "a")
        publish(server, starts(0, 1), starts(1, 1))
        eventually(lambda: metric(server, "liverank_snapshot_offset") >= 2, what="a snapshot")
        kill(server)
        writer = start(about, tmp_path / "b")
        offset = publish(writer, *(starts(i, 1) for i in range(2, 8)))[-1].offset
        broker.delete_before("events", offset - 1)
        with pytest.raises(NotStartedError, match=r"records \d+ to \d+ are gone, and no usable snapshot covers them"):
            start(about, tmp_path / "a")
        assert status(writer).live == 8
