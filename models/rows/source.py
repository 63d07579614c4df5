"""Where records come from: the log of a server, or a file of per-minute history told as a server would be told."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from liverank.v1 import ingest_pb2 as pb

from loadtest.replay.player import BASE_MS, events_of
from loadtest.replay.reader import read_history
from loadtest.replay.run import replay_settings
from loadtest.replay.sessions import minute_end, split_sessions
from models.rows.cursor import Cursor
from server.config import Settings, TableSettings, ViewerSettings
from server.errors import ConfigError, InvalidRequest, LogError, SnapshotError
from server.live.events import decode_batch
from server.live.features import FeatureSet
from server.log import snapshot
from server.log.base import Record
from server.log.commit import Committed
from server.log.snapshot import Contents, SnapshotFolder
from server.log.sqlite import SqliteLog

logger = logging.getLogger(__name__)

LOG_NAME = "events.sqlite3"


class Source(Protocol):
    """A log to be read from its begin, more than once.

    name: for people. table: under which its records were accepted. start: the snapshot its first record comes after.
    viewers: what the server remembers of viewers.
    """

    name: str
    table: TableSettings
    start: Contents | None
    viewers: ViewerSettings

    def records(self) -> Iterator[Record]:
        """All records in order, as they were written. Raises LogError."""
        ...


def decode(record: Record, table: TableSettings) -> Committed:
    """Raises LogError: the record was accepted under other table settings."""
    try:
        return Committed(record, decode_batch(record.payload, table))
    except InvalidRequest as error:
        raise LogError(f"record {record.offset} was accepted under other [table] settings: {error}") from error


def cursor_at_start(source: Source, features: FeatureSet) -> Cursor:
    """A cursor before the first record of a source."""
    return Cursor(source.table, features, source.start, source.viewers)


@dataclass(frozen=True)
class LogSource:
    """The SQLite log of a server, which may be running."""

    name: str
    table: TableSettings
    start: Contents | None
    path: Path
    viewers: ViewerSettings = field(default_factory=ViewerSettings)

    def records(self) -> Iterator[Record]:
        log = SqliteLog(self.path, read_only=True)
        try:
            yield from log.read(max(log.first_offset - 1, 0 if self.start is None else self.start.manifest.offset))
        finally:
            log.close()


@dataclass(frozen=True)
class HistorySource:
    """A file in the format of `liverank replay`: a record per full minute, stamped with it, as a replay delivers it."""

    name: str
    table: TableSettings
    path: Path
    start: Contents | None = None
    viewers: ViewerSettings = field(default_factory=lambda: ViewerSettings(capacity=0))  # nobody in it has a name

    def records(self) -> Iterator[Record]:
        history = read_history(self.path)
        sessions = split_sessions(history, (self.table.lease_ms + self.table.grace_ms) // 1000)
        delivered_s = minute_end(history.t_s)
        sequence = offset = 0
        for moment_s in np.unique(delivered_s).tolist():
            first, end = np.searchsorted(delivered_s, [moment_s, moment_s + 1]).tolist()
            events = [event for row in range(first, end) for event in events_of(history, sessions, row)]
            for event in events:
                sequence += 1
                event.sequence = sequence
            for begin in range(0, len(events), self.table.max_events_per_batch):
                offset += 1
                batch = pb.EventBatch(
                    producer_id="replay", events=events[begin : begin + self.table.max_events_per_batch]
                )
                yield Record(offset, BASE_MS + moment_s * 1000, batch.SerializeToString())


def open_source(file: Path | None, log: Path | None, settings: Settings) -> Source:
    """The source that a command names: a history file, or a log file or folder.

    Raises:
        ConfigError: neither or both, or it is not there. LogError: the log lacks its begin, and no snapshot covers it.
    """
    if (file is None) == (log is None):
        raise ConfigError("a FILE of history or --log DIR wanted, and not both")
    if file is not None:
        return HistorySource(str(file), replay_settings(settings, file.parent).table, file)
    assert log is not None
    path = log / LOG_NAME if log.is_dir() else log
    if not path.exists():
        raise ConfigError(f"--log: {path} does not exist")
    return LogSource(str(path), settings.table, _start_of(path, settings), path, settings.viewers)


def _start_of(path: Path, settings: Settings) -> Contents | None:
    """What to begin with: nothing where the log has its first record, else the oldest snapshot that it continues."""
    log = SqliteLog(path, read_only=True)
    try:
        first, last = log.first_offset, log.last
        if first == 1 or last is None:
            return None
        folder = SnapshotFolder(settings.snapshot.path or path.with_suffix(".snapshots"))
        for candidate in reversed(folder.paths()):
            try:
                manifest = snapshot.read_manifest(candidate)
                if manifest.offset < first - 1 or manifest.offset > last.offset:
                    continue
                if log.checksum(manifest.offset) in (None, manifest.record_crc):
                    return snapshot.read(candidate)
            except SnapshotError as error:
                logger.warning("not used: %s", error)
    finally:
        log.close()
    raise LogError(
        f"{path}: records before {first} are gone (log.retain_records keeps more), and no snapshot in {folder.folder} "
        "continues there"
    )
