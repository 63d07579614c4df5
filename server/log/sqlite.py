"""The embedded log: one SQLite table in WAL mode, fsynced at every commit."""

from __future__ import annotations

import logging
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from server.errors import LogError, LogFull
from server.log.base import Record

logger = logging.getLogger(__name__)

PAGE_BYTES = 16_384
"""Every page costs two system calls on its way to the WAL and two more to the file, whatever its size; and a commit
writes at least one. Four times SQLite's default costs a commit of one small batch nothing yet."""
CHECKPOINT_BYTES = 4 << 20
"""The WAL grows to about this, SQLite's default with pages of its default size."""

REPAIR = (
    "Nothing was changed. `liverank log verify` shows what is intact; `liverank log truncate --from N` gives up "
    "record N and everything after it (a copy is kept); or restore the file from a backup"
)


class SqliteLog:
    """`EventLog` in one file. ``synchronous=FULL`` makes a commit return after fsync of the WAL.

    A last record that is not what was written is removed, loudly: a torn write was never acknowledged. Any other
    damage is left alone. ``read_only``: changes nothing, whatever it finds, and may stand beside a server.

    Raises:
        LogError: the file cannot be opened, is no liverank log, or its last two records are damaged.
    """

    def __init__(self, path: Path, read_only: bool = False) -> None:
        self.path, self._read_only = path, read_only
        self.truncated: int | None = None
        """Offset of the damaged last record that was removed."""
        try:
            self._db = self._opened() if read_only else self._made()
            self._last = self._intact_last()
            first = self._db.execute("SELECT MIN(record) FROM log").fetchone()[0]
        except (sqlite3.Error, OSError) as error:
            raise _error(path, "cannot open the event log", error) from error
        self._first: int | None = first

    def _opened(self) -> sqlite3.Connection:
        return sqlite3.connect(f"file:{quote(str(self.path.resolve()))}?mode=ro", uri=True, isolation_level=None)

    def _made(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
        db.execute(f"PRAGMA page_size={PAGE_BYTES}")  # these two for a new file; they change nothing in an old one
        db.execute("PRAGMA auto_vacuum=INCREMENTAL")
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        page_bytes = int(db.execute("PRAGMA page_size").fetchone()[0])
        db.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_BYTES // page_bytes}")
        db.execute(
            "CREATE TABLE IF NOT EXISTS log ("
            "  record INTEGER PRIMARY KEY, applied_ms INTEGER NOT NULL,"
            "  checksum INTEGER NOT NULL, payload BLOB NOT NULL)"
        )
        return db

    def _intact_last(self) -> Record | None:
        rows = self._db.execute(
            "SELECT record, applied_ms, checksum, payload FROM log ORDER BY record DESC LIMIT 2"
        ).fetchall()
        intact = [_is_intact(payload, checksum) for _, _, checksum, payload in rows]
        if rows and not intact[0]:
            # Were more than the last one removed, restarts would eat the log record by record.
            if not intact[-1] or len(rows) == 1 or self._read_only:
                damaged = rows[0 if self._read_only else -1][0]
                raise LogError(f"{self.path}: record {damaged} is damaged (checksum differs). {REPAIR}")
            self.truncated = rows[0][0]
            logger.error(
                "%s: record %d, the last one, is damaged (checksum differs) and was REMOVED; "
                "if it was acknowledged, its events must be published again",
                self.path, self.truncated,
            )  # fmt: skip
            self._db.execute("DELETE FROM log WHERE record = ?", (self.truncated,))
            del rows[0]
        return Record(rows[0][0], rows[0][1], b"") if rows else None

    @property
    def first_offset(self) -> int:
        return self._first if self._first is not None else 1

    @property
    def last(self) -> Record | None:
        return self._last

    def append(self, records: Sequence[Record]) -> None:
        expected = (self._last.offset if self._last else 0) + 1
        for place, record in enumerate(records):
            if record.offset != expected + place:
                raise LogError(f"{self.path}: offset {expected + place} expected, got {record.offset}")
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany(
                "INSERT INTO log VALUES (?, ?, ?, ?)",
                [(r.offset, r.applied_ms, zlib.crc32(r.payload), r.payload) for r in records],
            )
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise _error(self.path, "cannot write", error) from error
        if records:
            self._last = Record(records[-1].offset, records[-1].applied_ms, b"")

    def read(self, after_offset: int) -> Iterator[Record]:
        expected = after_offset + 1
        try:
            rows = self._db.execute(
                "SELECT record, applied_ms, checksum, payload FROM log WHERE record > ? ORDER BY record",
                (after_offset,),
            )
            for offset, applied_ms, checksum, payload in rows:
                if offset != expected:
                    raise LogError(f"{self.path}: record {expected} is missing (found {offset}). {REPAIR}")
                if not _is_intact(payload, checksum):
                    raise LogError(f"{self.path}: record {offset} is damaged (checksum differs). {REPAIR}")
                expected += 1
                yield Record(offset, applied_ms, payload)
        except sqlite3.Error as error:
            raise _error(self.path, "cannot read", error) from error

    def checksum(self, offset: int) -> int | None:
        """CRC-32 of a record's bytes; None when it is not there (any more)."""
        row = self._db.execute("SELECT checksum FROM log WHERE record = ?", (offset,)).fetchone()
        return None if row is None else int(row[0])

    def continue_after(self, offset: int, stamp_ms: int) -> None:
        self._last = Record(offset, stamp_ms, b"")

    def close(self) -> None:
        self._db.close()


def _is_intact(payload: object, checksum: object) -> bool:
    """Damage may also have changed a value's type."""
    return isinstance(payload, bytes) and zlib.crc32(payload) == checksum


def _error(path: Path, what: str, error: Exception) -> LogError:
    code = getattr(error, "sqlite_errorcode", None)
    if code == sqlite3.SQLITE_FULL:
        return LogFull(f"{path}: {what}: no space left on its disk; nothing was written")
    hint = f". {REPAIR}" if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) else ""
    return LogError(f"{path}: {what}: {error}{hint}")
