"""The configured log with all that goes with it: how it is read back, written to, caught up with and shortened."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from server.clock import Clock
from server.config import Settings
from server.engine import Engine
from server.errors import ConfigError, Draining, LogError, LogFull
from server.log.commit import CommitPath, GroupCommit
from server.log.sqlite import SqliteLog
from server.log.trim import LogTrimmer
from server.recovery import History, SqliteHistory
from server.rpc.control import PRODUCER
from server.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from server.log.kafka_commit import KafkaCommit

logger = logging.getLogger(__name__)


class Log(Protocol):
    """What the composition root needs of a log. Methods are called in this order.

    control_producer: under which this server's own events are numbered. trimmer: None when the log shortens itself.
    """

    history: History
    commit: CommitPath
    trimmer: LogTrimmer | None
    control_producer: str

    def connect(self, stopping: threading.Event) -> None:
        """Makes it readable. Raises ConfigError, LogError; Draining once ``stopping`` is set."""
        ...

    def start(self, offset: int, stamp_ms: int) -> None:
        """Begins to write, and to hand records after ``offset`` to the engine."""
        ...

    def catch_up(self, stopping: threading.Event) -> None:
        """Waits until the engine has applied what was in the log when this was called."""
        ...

    def close(self) -> None:
        """Releases files and connections; the commit path was stopped before."""
        ...


def open_log(
    settings: Settings, clock: Clock, engine: Engine, metrics: Metrics, on_fault: Callable[[], None]
) -> Log:  # fmt: skip
    """The log of ``log.kind``; the Kafka client is loaded only for Kafka."""
    if settings.log.kind == "kafka":
        try:
            from server.log.kafka_commit import KafkaCommit
        except ImportError as error:
            raise ConfigError(f"log.kind: kafka needs the package confluent-kafka: {error}") from error
        return _Kafka(KafkaCommit(settings, clock, metrics, engine.committed, on_fault), settings, engine, metrics)
    return _Embedded(settings, clock, engine, metrics, on_fault)


class _Embedded:
    """log.kind = "sqlite"."""

    def __init__(
        self, settings: Settings, clock: Clock, engine: Engine, metrics: Metrics, on_fault: Callable[[], None]
    ) -> None:
        def refused(error: LogError) -> None:
            metrics.log_errors.labels("full" if isinstance(error, LogFull) else "other").inc()

        self._log = SqliteLog(settings.log.path)
        if self._log.truncated is not None:
            metrics.log_truncated.inc()
        self.history: History = SqliteHistory(self._log, settings)
        self.commit: CommitPath = GroupCommit(
            self._log, clock, settings.log.group_commit_rows, engine.committed, on_fault, refused
        )
        self.trimmer: LogTrimmer | None = LogTrimmer(settings.log.path)
        self.control_producer = PRODUCER

    def connect(self, stopping: threading.Event) -> None:
        """It is open already."""

    def start(self, offset: int, stamp_ms: int) -> None:
        if self.history.last_offset < offset:
            self._log.continue_after(offset, stamp_ms)
        self.commit.start(offset, stamp_ms)

    def catch_up(self, stopping: threading.Event) -> None:
        """Nobody else writes to it."""

    def close(self) -> None:
        if self.trimmer is not None:
            self.trimmer.close()
        self._log.close()


class _Kafka:
    """log.kind = "kafka". Brokers shorten the topic themselves, by its retention."""

    trimmer: LogTrimmer | None = None

    def __init__(self, commit: KafkaCommit, settings: Settings, engine: Engine, metrics: Metrics) -> None:
        self.commit: CommitPath = commit
        self.history: History = commit.log
        self._log, self._engine, self._metrics = commit.log, engine, metrics
        self.control_producer = f"{PRODUCER}-{_server_id(settings.snapshot_folder)}"

    def connect(self, stopping: threading.Event) -> None:
        self._log.connect(stopping)

    def start(self, offset: int, stamp_ms: int) -> None:
        self.commit.start(offset, stamp_ms)

    def catch_up(self, stopping: threading.Event) -> None:
        last = self._log.last_offset
        while (lag := last - self._engine.applier.offset) > 0:
            self._metrics.recovery_lag_records.set(lag)
            if stopping.wait(0.01):
                raise Draining("stopped while catching up")
        logger.info("caught up with %s at offset %d", self._log.name, self._engine.applier.offset)

    def close(self) -> None:
        """The commit path closes its clients."""


def _server_id(folder: Path) -> str:
    """A name that stays with these files: servers that share a log number their own events separately."""
    path = folder / "server-id"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            beside = path.with_suffix(".new")
            beside.write_text(uuid.uuid4().hex[:12])
            beside.rename(path)
        return path.read_text().strip()
    except OSError as error:
        raise ConfigError(f"snapshot.path: {folder} cannot be used: {error}") from error
