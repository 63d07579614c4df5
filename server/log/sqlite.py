"""The embedded log: one SQLite table in WAL mode, fsynced at every commit."""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from server.errors import LogError
from server.log.base import Record


class SqliteLog:
    """`EventLog` in one file. ``synchronous=FULL`` makes a commit return after fsync of the WAL.

    Raises:
        LogError: the file cannot be opened, or is no liverank log.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS log ("
                "  record INTEGER PRIMARY KEY, applied_ms INTEGER NOT NULL,"
                "  checksum INTEGER NOT NULL, payload BLOB NOT NULL)"
            )
            row = self._db.execute("SELECT record, applied_ms FROM log ORDER BY record DESC LIMIT 1").fetchone()
        except (sqlite3.Error, OSError) as error:
            raise LogError(f"{path}: cannot open the event log: {error}") from error
        self._last = Record(row[0], row[1], b"") if row else None

    @property
    def last(self) -> Record | None:
        return self._last

    def append(self, records: Sequence[Record]) -> None:
        expected = (self._last.offset if self._last else 0) + 1
        for place, record in enumerate(records):
            if record.offset != expected + place:
                raise LogError(f"{self._path}: offset {expected + place} expected, got {record.offset}")
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
            raise LogError(f"{self._path}: cannot write: {error}") from error
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
                    raise LogError(f"{self._path}: record {expected} is missing (found {offset})")
                if zlib.crc32(payload) != checksum:
                    raise LogError(f"{self._path}: record {offset} is damaged (checksum differs)")
                expected += 1
                yield Record(offset, applied_ms, payload)
        except sqlite3.Error as error:
            raise LogError(f"{self._path}: cannot read: {error}") from error

    def close(self) -> None:
        self._db.close()
