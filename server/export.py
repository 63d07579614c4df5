"""`liverank table export`: the live table, as the log has it, in one Parquet file for other tools."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow.parquet

from server.config import load_settings
from server.errors import ConfigError
from server.live.events import decode_batch
from server.live.frames import table_columns
from server.live.table import LiveTable
from server.log.sqlite import SqliteLog


def run_export(out: Path, config: Path | None) -> int:
    """Applies the whole log to an empty table and writes that, as of the last stamp. Says how many rows.

    A server may be running on the same log: it is only read. The file appears complete or not at all.

    Raises:
        ConfigError: there is no log, or ``out`` cannot be written. LogError: the log is damaged.
    """
    settings = load_settings(config)
    if not settings.log.path.exists():
        raise ConfigError(f"log.path: {settings.log.path} does not exist; nothing to export")
    table = LiveTable(settings.table, np.zeros((settings.table.capacity, settings.table.embedding_dim), np.float32))
    log = SqliteLog(settings.log.path)
    offset, at_ms = 0, 0
    try:
        for record in log.read(0):
            table.apply(decode_batch(record.payload, settings.table).events, record.applied_ms)
            offset, at_ms = record.offset, record.applied_ms
    finally:
        log.close()
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
