"""Bringing the table back: the newest usable snapshot, then the log after it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from server.applier import Applier
from server.config import Settings
from server.engine import Engine
from server.errors import ConfigError, Draining, InvalidRequest, LogError, SnapshotError
from server.live import state as live_state
from server.live.events import decode_batch
from server.log import snapshot
from server.log.commit import Committed
from server.log.snapshot import Contents, SnapshotFolder
from server.log.sqlite import SqliteLog
from server.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

PROGRESS_S = 2.0


class History(Protocol):
    """A log as recovery reads it."""

    name: str
    """Which log: a snapshot of another one is refused."""

    @property
    def first_offset(self) -> int:
        """Offset of the oldest record there is; of the next one in an empty log."""
        ...

    @property
    def last_offset(self) -> int:
        """Offset of the newest record now; 0 in a log that never had one."""
        ...

    def read(self, after: int, stamp_ms: int) -> Iterator[Committed]:
        """Decoded records after offset ``after`` up to `last_offset` as it is then; stamps from ``stamp_ms`` on.

        Raises:
            LogError: damage, or a gap.
        """
        ...

    def checksum(self, offset: int) -> int | None:
        """CRC-32 of a record's bytes, or None when it is not there."""
        ...


class SqliteHistory:
    """The embedded log, decoded."""

    name = "sqlite"

    def __init__(self, log: SqliteLog, settings: Settings) -> None:
        self._log, self._settings = log, settings

    @property
    def first_offset(self) -> int:
        return self._log.first_offset

    @property
    def last_offset(self) -> int:
        return self._log.last.offset if self._log.last else 0

    def read(self, after: int, stamp_ms: int) -> Iterator[Committed]:
        if after > self.last_offset:
            logger.error("the log ends at %d, before the snapshot of %d: going on after it", self.last_offset, after)
        for record in self._log.read(after):
            try:
                batch = decode_batch(record.payload, self._settings.table)
            except InvalidRequest as error:  # it was decoded once: the settings must have changed
                raise LogError(f"record {record.offset} was accepted under other [table] settings: {error}") from error
            yield Committed(record, batch)

    def checksum(self, offset: int) -> int | None:
        return self._log.checksum(offset)


@dataclass(frozen=True)
class Recovered:
    """Where the table is. snapshot_offset: 0 without one. stamp_ms: no later stamp may be smaller."""

    snapshot_offset: int
    replayed_records: int
    offset: int
    stamp_ms: int
    seconds: float


def recover(
    engine: Engine, history: History, folder: SnapshotFolder, metrics: Metrics, stopping: threading.Event
) -> Recovered:
    """Restores the engine's table and ends, before its loop. Damaged snapshots are skipped, loudly.

    Raises:
        ConfigError: the table of these settings cannot hold the state. LogError: the log is damaged, is not the
        one of the snapshot, or lacks records. Draining: ``stopping`` was set meanwhile.
    """
    started_s, applier = time.monotonic(), engine.applier

    def skipped(path: Path, error: SnapshotError) -> None:
        logger.error("SKIPPED a snapshot, an older one or the whole log is used: %s", error)
        metrics.snapshots.labels("skipped").inc()
        folder.set_aside(path)

    try:
        folder.remove_half_written()
        found = newest_usable(folder, skipped)
    except OSError as error:
        raise ConfigError(f"snapshot.path: {folder.folder} cannot be used: {error}") from error
    offset = starting_point(history, found, engine.settings)
    if found is not None:
        try:
            live_state.restore(engine.table, found.state)
        except ValueError as error:
            raise ConfigError(
                f"snapshot.path: what the newest one knows of viewers cannot be taken over: {error}. Raise "
                "viewers.capacity or viewers.sessions, or start once with viewers.capacity = 0 to drop it"
            ) from error
        engine.ends.restore(found.manifest.ends_newest, found.ends)
        manifest = found.manifest
        applier.restored(offset, manifest.stamp_ms, manifest.table_ms, manifest.record_crc, found.ends)
        if manifest.feature_schema != engine.features.schema:
            logger.info("the snapshot is older than the feature file; columns do not depend on it")
    records = _replay(applier, history, offset, metrics, stopping)
    applier.recovered()
    done = Recovered(
        offset, records, applier.offset, max(applier.stamp_ms, applier.table_ms),
        time.monotonic() - started_s,
    )  # fmt: skip
    logger.info(
        "recovered to offset %d in %.1f s: snapshot of offset %d, then %d records",
        done.offset, done.seconds, done.snapshot_offset, done.replayed_records,
    )  # fmt: skip
    return done


def newest_usable(folder: SnapshotFolder, skipped: Callable[[Path, SnapshotError], None]) -> Contents | None:
    """The newest snapshot that can be read; tells ``skipped`` of those that cannot."""
    for path in folder.paths():
        try:
            return snapshot.read(path)
        except SnapshotError as error:
            skipped(path, error)
    return None


def starting_point(history: History, found: Contents | None, settings: Settings) -> int:
    """The offset after which the log is to be read: the snapshot's, or 0 without one.

    Raises:
        ConfigError: the table of these settings cannot hold the snapshot. LogError: the log is not the one of the
        snapshot, or lacks records after it.
    """
    offset = 0
    if found is not None:
        _check_fits(found, settings, history)
        _check_same_log(history, found)
        offset = found.manifest.offset
    _check_reaches(history, offset, settings)
    return offset


def _check_fits(found: Contents, settings: Settings, history: History) -> None:
    manifest, table = found.manifest, settings.table
    if manifest.log != history.name:
        raise ConfigError(
            f"snapshot.path: its snapshots are of the log {manifest.log!r}, not {history.name!r}; "
            "give every log its own folder"
        )
    if manifest.embedding_dim != table.embedding_dim:
        raise ConfigError(
            f"table.embedding_dim: the streams of the snapshot have {manifest.embedding_dim}, got "
            f"{table.embedding_dim}; to change it, begin with an empty log and snapshot folder"
        )
    if manifest.rows > table.capacity:
        raise ConfigError(f"table.capacity: the snapshot has {manifest.rows} rows, {table.capacity} are too few")


def _check_same_log(history: History, found: Contents) -> None:
    """The record that the snapshot ends with must be the one in the log, if it is still there."""
    offset = found.manifest.offset
    there = history.checksum(offset)
    if there is not None and there != found.manifest.record_crc:
        raise LogError(
            f"{history.name}: record {offset} is not the one that the newest snapshot ends with. The log was replaced "
            "(or the snapshots are of another one): move the snapshot folder away to begin from the log alone"
        )


def _check_reaches(history: History, offset: int, settings: Settings) -> None:
    """Records between the snapshot and the oldest in the log are gone for good."""
    first = history.first_offset
    if first > offset + 1:
        gone = f"{history.name}: records {offset + 1} to {first - 1} are gone, and no usable snapshot covers them"
        if not settings.log.accept_lost_history:
            raise LogError(
                f"{gone}. Copy a newer snapshot into {settings.snapshot_folder} (from a replica or a backup), or set "
                "log.accept_lost_history = true to start without what they held"
            )
        logger.error("%s: STARTING WITHOUT THEM (log.accept_lost_history)", gone)


def _replay(applier: Applier, history: History, after: int, metrics: Metrics, stopping: threading.Event) -> int:
    records, last, told_s = 0, history.last_offset, time.monotonic()
    skipped_to = max(after, history.first_offset - 1)
    metrics.recovery_lag_records.set(max(0, last - skipped_to))
    for committed in history.read(skipped_to, applier.stamp_ms):
        applier.replay(committed)
        records += 1
        if records % 256 == 0:
            metrics.recovery_lag_records.set(max(0, last - applier.offset))
            if stopping.is_set():
                raise Draining("stopped while recovering")
            if time.monotonic() - told_s > PROGRESS_S:
                told_s = time.monotonic()
                logger.info("recovering: offset %d of %d", applier.offset, last)
    metrics.recovery_lag_records.set(0)
    return records
