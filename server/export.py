"""`liverank table export`: the live table, as snapshots and log have it, in one Parquet file for other tools."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet

from server.config import Settings, load_settings
from server.errors import ConfigError, Draining, LogError, SnapshotError
from server.live import state as live_state
from server.live.frames import table_columns
from server.live.table import LiveTable
from server.log.snapshot import SnapshotFolder
from server.log.sqlite import SqliteLog
from server.recovery import History, SqliteHistory, newest_usable, starting_point
from server.world import make_viewers

logger = logging.getLogger(__name__)

BROKERS_WITHIN_S = 10.0
TRIES = 3


def run_export(out: Path, config: Path | None) -> int:
    """Recovers a table as a start would (newest usable snapshot, then the log after it) and writes it, as of the last
    stamp. Says how many rows.

    A server may be running on the same files: they are only read. The file appears complete or not at all.

    Raises:
        ConfigError: there is no log, or ``out`` cannot be written. LogError: the log is damaged or incomplete.
    """
    settings = load_settings(config)
    with opened(settings) as history:
        table, offset, at_ms = recovered(history, settings)
    columns = table_columns(table, at_ms).replace_schema_metadata({"offset": str(offset), "at_ms": str(at_ms)})
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        pyarrow.parquet.write_table(columns, beside)
        beside.replace(out)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ConfigError(f"{out} cannot be written: {error.strerror or error}") from error
    print(f"{columns.num_rows} rows and {columns.num_columns} columns as of offset {offset} in {out}")
    return 0


def recovered(history: History, settings: Settings) -> tuple[LiveTable, int, int]:
    """The table, the last applied offset, and the time the table is as of. Raises ConfigError, LogError."""
    folder = SnapshotFolder(settings.snapshot_folder)
    for left in reversed(range(TRIES)):
        newest = folder.paths()[:1]
        try:
            return _recovered(history, folder, settings)
        except LogError:
            # A running server may have taken a newer snapshot, and shortened the log up to it, while we read.
            if not left or folder.paths()[:1] == newest:
                raise
    raise AssertionError("returned or raised above")


def _recovered(history: History, folder: SnapshotFolder, settings: Settings) -> tuple[LiveTable, int, int]:
    def skipped(path: Path, error: SnapshotError) -> None:
        logger.warning("not used: %s", error)

    embedding = np.zeros((settings.table.capacity, settings.table.embedding_dim), np.float32)
    table = LiveTable(settings.table, embedding, follower=make_viewers(settings))
    found = newest_usable(folder, skipped)
    offset = starting_point(history, found, settings)
    stamp_ms = at_ms = 0
    if found is not None:
        live_state.restore(table, found.state)
        stamp_ms, at_ms = found.manifest.stamp_ms, max(found.manifest.stamp_ms, found.manifest.table_ms)
    for committed in history.read(max(offset, history.first_offset - 1), stamp_ms):
        if committed.batch is not None:
            table.apply(committed.batch.events, committed.record.applied_ms)
        offset, at_ms = committed.record.offset, max(at_ms, committed.record.applied_ms)
    return table, offset, at_ms


@contextmanager
def opened(settings: Settings) -> Iterator[History]:
    """The configured log, for reading only."""
    if settings.log.kind == "kafka":
        with _kafka(settings) as history:
            yield history
        return
    if not settings.log.path.exists():
        raise ConfigError(f"log.path: {settings.log.path} does not exist; nothing to export")
    log = SqliteLog(settings.log.path, read_only=True)
    try:
        yield SqliteHistory(log, settings)
    finally:
        log.close()


@contextmanager
def _kafka(settings: Settings) -> Iterator[History]:
    try:
        from server.log.kafka import KafkaLog
    except ImportError as error:
        raise ConfigError(f"log.kind: kafka needs the package confluent-kafka: {error}") from error
    log = KafkaLog(settings, lambda record, reason: None)  # told of in the log already; dead letters are the server's
    gave_up = threading.Event()
    patience = threading.Timer(BROKERS_WITHIN_S, gave_up.set)
    patience.start()
    try:
        log.connect(gave_up)
        patience.cancel()
        yield log
    except Draining as error:
        brokers = settings.log.kafka.bootstrap_servers
        raise ConfigError(
            f"log.kafka.bootstrap_servers: {brokers} did not answer within {BROKERS_WITHIN_S:.0f} s"
        ) from error
    finally:
        patience.cancel()
        log.close()
