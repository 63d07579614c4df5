"""Servers with files of their own: what happens to those files is no other scenario's business. Shared with tests."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
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

from loadtest.faults.base import CannotPlay
from loadtest.faults.probe import Probe
from loadtest.processes import Server, start_server, wait_for

Settings = dict[str, dict[str, Any]]
WITHIN_S = 60.0
CHECKED = 1_000
SMALL_DISK_MIB = 24


def settings_of(repository: Path) -> Settings:
    """Leases that no scenario outlives, scores from a model in ``repository``."""
    return {
        "table": {"capacity": 20_000, "embedding_dim": 4, "lease_ms": 600_000, "grace_ms": 20_000},
        "scoring": {"mode": "local", "model_repository": str(repository), "refresh_ms": 100},
        "serve": {"drain_grace_ms": 5_000},
    }


@dataclass
class OwnServer:
    """A folder, and the server on it that is started, killed and started again at one address.

    acknowledged: ids of streams whose start was.
    """

    folder: Path
    settings: Settings
    acknowledged: list[str] = field(default_factory=list)
    server: Server | None = None

    def start(self, **sections: dict[str, Any]) -> Server:
        """Starts it, with ``sections`` on top of its settings."""
        merged = {name: {**self.settings.get(name, {}), **values} for name, values in sections.items()}
        self.server = start_server(self.folder, {**self.settings, **merged})
        self.settings["serve"]["port"] = int(self.server.address.rpartition(":")[2])
        return self.server

    def publish_starts(self, *counts: int) -> ingest_pb2.PublishAck:
        """One batch of as many new streams per count; notes those that were acknowledged. Raises grpc.RpcError."""
        assert self.server is not None
        for count in counts:
            first = len(self.acknowledged)
            (ack,) = publish(self.server, starts(first, count))
            self.acknowledged += [stream_id(i) for i in range(first, first + ack.accepted)]
        return ack

    def lost(self) -> list[str]:
        """Streams that were acknowledged and are not live."""
        assert self.server is not None
        there = set(live(self.server, self.acknowledged))
        return [one for one in self.acknowledged if one not in there]

    @contextmanager
    def probe(self) -> Iterator[Probe]:
        """A caller of Rank that has had a usual answer already."""
        assert self.server is not None
        probe = Probe(self.server.address)
        try:
            probe.wait_usual(0.0, WITHIN_S)
            yield probe
        finally:
            probe.close()

    def restarted(self, **sections: dict[str, Any]) -> float:
        """Starts it; seconds from then to a usual answer."""
        begun_s = time.monotonic()
        self.start(**sections)
        with self.probe() as probe:
            return probe.wait_usual(begun_s, WITHIN_S).at_s - begun_s

    def close(self) -> None:
        """Ends it at once, if it runs."""
        if self.server is not None:
            self.server.process.kill()
            self.server.process.wait()


@contextmanager
def own_server(folder: Path, settings: Settings) -> Iterator[OwnServer]:
    """One that is ended at the end, however that comes."""
    own = OwnServer(folder, {section: dict(values) for section, values in settings.items()})
    try:
        yield own
    finally:
        own.close()


# --- asking a server ------------------------------------------------------------------------------


def stream_id(number: int) -> str:
    return f"stream-{number:05d}"


def starts(first: int, count: int) -> ingest_pb2.EventBatch:
    """A batch that starts streams ``first`` and on."""
    batch = ingest_pb2.EventBatch(producer_id="p")
    now_ms = time.time_ns() // 1_000_000
    for i in range(first, first + count):
        event = batch.events.add(stream_id=stream_id(i), sequence=i + 1, epoch=1, event_time_ms=now_ms)
        event.started.creator_id, event.started.title = f"creator-{i}", f"title {i}"
    return batch


def publish(server: Server, *batches: ingest_pb2.EventBatch) -> list[ingest_pb2.PublishAck]:
    with grpc.insecure_channel(server.address) as channel:
        return list(ingest_pb2_grpc.IngestStub(channel).Publish(iter(batches), timeout=30.0))


def status(server: Server) -> admin_pb2.StatusResponse:
    with grpc.insecure_channel(server.address) as channel:
        return admin_pb2_grpc.AdminStub(channel).Status(admin_pb2.StatusRequest(), timeout=10.0)


def live(server: Server, ids: list[str]) -> list[str]:
    """Those of ``ids`` that are live by the table's word, in their order."""
    found: list[str] = []
    with grpc.insecure_channel(server.address) as channel:
        check = liveness_pb2_grpc.LivenessStub(channel).CheckLive
        for start in range(0, len(ids), CHECKED):
            refs = [liveness_pb2.StreamRef(stream_id=one) for one in ids[start : start + CHECKED]]
            statuses = check(liveness_pb2.CheckLiveRequest(streams=refs), timeout=10.0).streams
            found += [s.stream_id for s in statuses if s.state == liveness_pb2.LiveStatus.LIVE]
    return found


def rank(server: Server) -> ranking_pb2.RankResponse:
    with grpc.insecure_channel(server.address) as channel:
        return ranking_pb2_grpc.RankingStub(channel).Rank(ranking_pb2.RankRequest(limit=20), timeout=10.0)


def metric(server: Server, name: str) -> float:
    """Value of a metric by its exposed name and labels; 0 when it is not there."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=10.0).read().decode()
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found.group(1)) if found else 0.0


def refused(error: grpc.RpcError) -> tuple[str, str]:
    """(code name, details) of a failed call."""
    return error.code().name, error.details() or ""


# --- breaking -------------------------------------------------------------------------------------


def kill(server: Server) -> None:
    """kill -9; returns when it is gone."""
    server.process.kill()
    if (code := server.process.wait(10)) != -signal.SIGKILL:
        raise AssertionError(f"the server was gone before it was killed: exit status {code}")


def flip(path: Path, marker: bytes) -> None:
    """Damages one byte at the end of the first place where ``marker`` stands in a file."""
    data = bytearray(path.read_bytes())
    data[data.index(marker) + len(marker) - 1] ^= 1
    path.write_bytes(data)


def tear(path: Path, torn_bytes: int = 1_000) -> None:
    """Cuts off the end of a file."""
    os.truncate(path, path.stat().st_size - torn_bytes)


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A real file system of 24 MiB at ``folder``. Raises CannotPlay where none may be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_MIB}m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CannotPlay(f"cannot mount a small tmpfs: {error}") from error
    if mounted.returncode != 0:
        raise CannotPlay(f"cannot mount a small tmpfs: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
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


def wait_for_metric(server: Server, name: str, least: float, within_s: float = WITHIN_S) -> None:
    """Raises TimeoutError when it does not get there."""
    wait_for(lambda: metric(server, name) >= least, within_s, f"{name} is {least:g} or more")
