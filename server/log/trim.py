"""Deletes records that no kept snapshot needs, a few at a time, beside the writer."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from server.errors import LogError

STEP_RECORDS = 256
STEP_BYTES = 1 << 20
"""Given back to the file system per step."""


class LogTrimmer:
    """A second connection to a `SqliteLog`'s file. For one thread; opened on first use.

    A lost deletion is made again, so it need not be synced: the writer waits for a step, never for a disk.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db: sqlite3.Connection | None = None
        self._step_pages = 0

    def step(self, before: int) -> int:
        """Deletes at most `STEP_RECORDS` records older than ``before``, but never the newest; returns how many.

        Raises:
            LogError: the file cannot be written now; try again later.
        """
        try:
            if self._db is None:
                self._db = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
                self._db.execute("PRAGMA synchronous=NORMAL")
                self._db.execute("PRAGMA journal_size_limit=16777216")
                self._step_pages = STEP_BYTES // int(self._db.execute("PRAGMA page_size").fetchone()[0])
            first, last = self._db.execute("SELECT MIN(record), MAX(record) FROM log").fetchone()
            if first is None or min(before, last) <= first:
                return 0
            end = min(before, last, first + STEP_RECORDS)
            deleted = self._db.execute("DELETE FROM log WHERE record < ?", (end,)).rowcount
            self._db.execute(f"PRAGMA incremental_vacuum({self._step_pages})").fetchall()
        except sqlite3.Error as error:
            raise LogError(f"{self._path}: cannot delete old records: {error}") from error
        return int(deleted)

    def close(self) -> None:
        """Releases the file."""
        if self._db is not None:
            self._db.close()
            self._db = None
