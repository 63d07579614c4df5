"""`liverank log`: what is intact (also beside a running server), and giving up what is not (of a stopped one)."""

from __future__ import annotations

import sqlite3
import zlib
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from server.config import Settings
from server.errors import ConfigError, LogError, SnapshotError
from server.log.snapshot import SnapshotFolder, read_manifest


@dataclass(frozen=True)
class Verified:
    """What was found. damage: one line per fault that keeps a server from starting; notes: the rest."""

    notes: list[str]
    damage: list[str]


def verify(settings: Settings) -> Verified:
    """Reads every record and every snapshot; changes nothing.

    Raises:
        LogError: there is no log file.
    """
    notes: list[str] = []
    covered = 0
    for path in SnapshotFolder(settings.snapshot_folder).paths():
        try:
            manifest = read_manifest(path)
        except SnapshotError as error:
            notes.append(f"unusable, would be skipped: {error}")
            continue
        notes.append(f"snapshot of offset {manifest.offset}: intact, {manifest.rows} rows ({path})")
        covered = max(covered, manifest.offset)
    if settings.log.kind == "kafka":
        notes.append("records of a Kafka topic are checked by its brokers; nothing more to verify here")
        return Verified(notes, [] if covered else ["no usable snapshot: a start needs the whole topic"])
    path = settings.log.path
    if not path.is_file():
        raise LogError(f"{path}: no such log")
    damage, harmless, count, newest = _walk(path, covered)
    notes.append(f"{count} records, newest {newest} ({path})")
    notes += [f"covered by a snapshot, so no harm: {fault}" for fault in harmless]
    return Verified(notes, damage)


def _walk(path: Path, covered: int) -> tuple[list[str], list[str], int, int]:
    """Faults after record ``covered``, faults up to it, number of records, newest offset."""
    damage: list[str] = []
    harmless: list[str] = []
    count = newest = newest_ms = 0
    try:
        with _opened(path, "ro") as db:
            damage += [f"{path}: {row[0]}" for row in db.execute("PRAGMA quick_check(10)") if row[0] != "ok"]
            for offset, applied_ms, checksum, payload in db.execute("SELECT * FROM log ORDER BY record"):
                faults = damage if offset > covered else harmless
                if newest and offset != newest + 1 and newest + 1 > covered:
                    damage.append(f"records {newest + 1} to {offset - 1} are missing")
                elif not newest and offset > covered + 1:
                    damage.append(f"records {covered + 1} to {offset - 1} are missing, and no snapshot covers them")
                if not isinstance(payload, bytes) or zlib.crc32(payload) != checksum:
                    faults.append(f"record {offset} is damaged (checksum differs)")
                if applied_ms < newest_ms:
                    faults.append(f"record {offset} is stamped before the one before it")
                count, newest, newest_ms = count + 1, offset, max(newest_ms, applied_ms)
    except sqlite3.Error as error:
        damage.append(f"{path}: cannot be read beyond record {newest}: {error}")
    return damage, harmless, count, newest


class _opened:  # noqa: N801 - used like a function
    """A connection that is closed at the end of the block (sqlite3's own only ends the transaction)."""

    def __init__(self, path: Path, mode: str) -> None:
        self._db = sqlite3.connect(
            f"file:{quote(str(path.resolve()))}?mode={mode}", uri=True, isolation_level=None, timeout=1.0
        )

    def __enter__(self) -> sqlite3.Connection:
        return self._db

    def __exit__(self, *_: object) -> None:
        self._db.close()


def truncate(settings: Settings, first: int) -> tuple[int, Path]:
    """Removes record ``first`` and all after it, after copying the whole file; returns how many, and the copy.

    Raises:
        ConfigError: the log is not a SQLite file, or ``first`` is not in it. LogError: a server has it open, or it
        cannot be read or copied.
    """
    if settings.log.kind != "sqlite":
        raise ConfigError("log.kind: only a sqlite log can be truncated; use Kafka's own tools for a topic")
    path = settings.log.path
    copy = path.with_name(f"{path.name}.before-truncate-{first}")
    if not path.is_file():
        raise LogError(f"{path}: no such log")
    if copy.exists():
        raise LogError(f"{copy}: exists already; move it away first")
    try:
        with _opened(path, "rw") as db:
            db.execute("PRAGMA locking_mode=EXCLUSIVE")
            db.execute("BEGIN EXCLUSIVE")  # fails while a server has it open
            count = db.execute("SELECT COUNT(*) FROM log WHERE record >= ?", (first,)).fetchone()[0]
            if not count:
                raise ConfigError(f"--from: no record {first} or later is in {path}")
            db.execute("COMMIT")
            with _opened(copy, "rwc") as target:
                db.backup(target)
            db.execute("DELETE FROM log WHERE record >= ?", (first,))
    except sqlite3.Error as error:
        raise LogError(f"{path}: cannot be truncated (is a server running on it?): {error}") from error
    return int(count), copy


def run(settings: Settings, action: str, first: int | None, yes: bool) -> int:
    """The command; returns its exit status: 0 intact or done, 1 damaged, 2 not done."""
    if action == "verify":
        found = verify(settings)
        for line in found.notes:
            print(line)
        for line in found.damage:
            print(f"DAMAGED: {line}")
        print("a server cannot start from this" if found.damage else "intact: a server can start from this")
        return 1 if found.damage else 0
    if first is None or first < 1:
        raise ConfigError("--from: the first record to give up is wanted; `liverank log verify` names the damaged ones")
    if not yes:
        print(f"would remove record {first} and ALL after it, although they were acknowledged; repeat with --yes")
        return 2
    count, copy = truncate(settings, first)
    print(f"removed {count} records from {first} on; the log as it was: {copy}")
    return 0
