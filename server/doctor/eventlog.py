"""Looks at the last record of an event log that a running server may be writing. Never changes anything.

SQLite must be told how: without a WAL beside the file it is read as immutable (no locks, no files made); with one,
through a shared-memory index that is opened for reading only, which never makes a writer wait.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import zlib
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote


class DamagedLogError(Exception):
    """The file is no event log, or its last record is not what was written; the message says which."""


class DamagedLastError(DamagedLogError):
    """Only the last record is damaged: a start removes it, and says so."""


class UnmergedLogError(Exception):
    """The newest records are in a WAL that no start has merged yet: they cannot be read without changing files."""


@dataclass(frozen=True)
class LastRecord:
    """The newest record. offset: 0 in an empty log. applied_ms: its stamp, Unix epoch."""

    offset: int
    applied_ms: int


def read_last(path: Path) -> LastRecord:
    """The newest record of the log at ``path``.

    Raises:
        DamagedLogError, DamagedLastError, UnmergedLogError: see there. OSError: the file cannot be read.
    """
    # Asked, not opened: closing a descriptor of its own would drop the locks of a log open in this process.
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    size_bytes = path.stat().st_size
    if not os.access(path, os.R_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    wal, shared = Path(f"{path}-wal"), Path(f"{path}-shm")
    if not shared.exists() and wal.exists() and wal.stat().st_size:
        raise UnmergedLogError(f"{path}: there is a -wal file, but no -shm (a restored backup?)")
    how = "mode=ro&readonly_shm=1" if shared.exists() else "mode=ro&immutable=1"
    try:
        database = sqlite3.connect(f"file:{quote(str(path.resolve()))}?{how}", uri=True)
        try:
            rows = database.execute(
                "SELECT record, applied_ms, checksum, payload FROM log ORDER BY record DESC LIMIT 2"
            ).fetchall()
        finally:
            database.close()
    except sqlite3.Error as error:
        if size_bytes == 0 and not wal.exists():
            return LastRecord(0, 0)  # made, but nothing was ever written
        raise DamagedLogError(f"{path}: {error}") from error
    if not rows:
        return LastRecord(0, 0)
    intact = [isinstance(payload, bytes) and zlib.crc32(payload) == checksum for _, _, checksum, payload in rows]
    if not intact[0]:
        told = f"{path}: record {rows[0][0]}, the last one, is damaged (checksum differs)"
        if len(rows) == 2 and intact[1]:
            raise DamagedLastError(told)
        raise DamagedLogError(f"{told}, and no intact one is before it")
    return LastRecord(rows[0][0], rows[0][1])
