"""The declared files, and the place where the event log lies."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from server.doctor.base import Context, Finding, fail, ok, warn
from server.doctor.eventlog import DamagedLastError, DamagedLogError, UnmergedLogError, read_last
from server.errors import ConfigError

LEAST_FREE_BYTES, WANTED_FREE_BYTES = 64 << 20, 1 << 30


def declared(context: Context) -> Iterator[Finding]:
    """The feature file and the rules file."""
    from server.rules.rulebook import RuleBook

    table, rank = context.settings.table, context.settings.rank
    try:
        features = context.features
    except (ConfigError, UnicodeDecodeError) as error:
        yield fail(
            "files.features",
            f"{table.features_file}: {error}" if isinstance(error, UnicodeDecodeError) else str(error),
            "Correct the file, or unset table.features_file to use the shipped one.",
        )
        return  # rules are checked against features
    yield ok("files.features", f"{len(features)} features, schema {features.schema} ({table.features_file})")
    try:
        book = RuleBook.load(rank.rules_file, features.names)
    except ConfigError as error:
        yield fail("files.rules", str(error), "Correct the file, or unset rank.rules_file to use the shipped one.")
    else:
        yield ok("files.rules", f"{len(book.rules)} rules, {len(book.surfaces)} surfaces ({rank.rules_file})")


def rollout(context: Context) -> Iterator[Finding]:
    """The file that says which version of a model serves."""
    from server.rollout.store import RolloutFile

    settings = context.settings
    decided = None
    try:
        if settings.rollout_file.exists():  # a folder that cannot be used is another check's finding
            decided = RolloutFile(settings.rollout_file).load().get(settings.scoring.model_name)
    except ConfigError as error:
        yield fail("files.rollout", str(error), "Restore the file from a backup, or move it away and push again.")
        return
    told = f"version {decided.serving} serves" if decided and decided.serving else "nobody chose: the newest serves"
    yield ok("files.rollout", f"{settings.scoring.model_name}: {told} ({settings.rollout_file})")


def _writable(check: str, folder: Path, mend: str) -> tuple[Finding, Path | None]:
    """Whether a folder can be written, or made; and the existing one that it is or will be in, None when it cannot."""
    there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not there.is_dir():
        return fail(check, f"{there} is not a folder, so {folder} cannot be used", mend), None
    if not os.access(there, os.W_OK | os.X_OK):
        return fail(check, f"{there} cannot be written by user {os.getuid()}", mend), None
    return ok(check, f"{folder}" + ("" if there == folder else f" (will be made in {there})")), there


def log_folder(context: Context) -> Iterator[Finding]:
    """Whether the log's folder is there, or can be made, and can be written; and the room on its disk.

    With Kafka there is no such log; the snapshots' folder is looked at by `snapshots`.
    """
    if context.settings.log.kind == "kafka":
        return
    folder = context.settings.log.path.absolute().parent
    mend = "Set log.path (LIVERANK_LOG__PATH) to a file in a folder that the server's user may write."
    finding, there = _writable("files.log_folder", folder, mend)
    yield finding
    if there is None:
        return
    free = shutil.disk_usage(there).free
    told = f"{free / (1 << 30):,.1f} GiB free at {there}"
    mend = "Free some space there, or move log.path to a larger disk."
    if free < LEAST_FREE_BYTES:
        yield fail("files.disk", f"{told}: events would soon be refused", mend)
    elif free < WANTED_FREE_BYTES:
        yield warn("files.disk", told, mend)
    else:
        yield ok("files.disk", told)


def log_file(context: Context) -> Iterator[Finding]:
    """The event log, if there is one: readable, writable, its last record as it was written."""
    if context.settings.log.kind == "kafka":
        return
    path = context.settings.log.path
    if not os.path.lexists(path) or not path.parent.is_dir():
        yield ok("files.log", f"{path}: none yet; the first start makes it")
        return
    try:
        last = read_last(path)
    except DamagedLastError as error:
        yield warn(
            "files.log",
            f"{error}: the next start removes it, and with it events that may have been acknowledged",
            f"Restore {path} (with its -wal and -shm files) from a backup, or start and publish those events again.",
        )
    except DamagedLogError as error:
        yield fail(
            "files.log",
            str(error),
            f"Ask `liverank log verify`. Restore {path} (with its -wal and -shm files) from a backup; or give up "
            "acknowledged events, as docs/operations.md says.",
        )
    except UnmergedLogError as error:
        yield warn(
            "files.log",
            f"{error}: its last record was not examined",
            "If the files were restored, check that they are of one backup. The next start merges them.",
        )
    except OSError as error:
        yield fail(
            "files.log",
            f"{path} cannot be read: {error.strerror}",
            "Set log.path (LIVERANK_LOG__PATH) to a file, and let the server's user read and write it.",
        )
    else:
        if not os.access(path, os.W_OK):
            yield fail(
                "files.log", f"{path} cannot be written by user {os.getuid()}", f"chown or chmod {path} and its folder."
            )
        else:
            told = f"last of {last.offset:,} records intact" if last.offset else "no records yet"
            yield ok("files.log", f"{path}: {told}")


def snapshots(context: Context) -> Iterator[Finding]:
    """The snapshots' folder: writable, and with room for the snapshots that are kept, and one more, of a full table."""
    from server.doctor.memory import snapshot_bytes_per_row

    settings = context.settings
    mend = "Set snapshot.path (LIVERANK_SNAPSHOT__PATH) to a folder that the server's user may write."
    finding, there = _writable("files.snapshots", settings.snapshot_folder.absolute(), mend)
    yield finding
    if there is None:
        return
    free, files = shutil.disk_usage(there).free, settings.snapshot.keep + 1
    need = files * settings.table.capacity * snapshot_bytes_per_row(context)
    told = f"{need / (1 << 30):,.2f} GiB for {files} snapshots of a full table, {free / (1 << 30):,.2f} GiB free"
    if free < need:
        yield warn(
            "files.snapshots_disk",
            f"{told}: snapshots would fail when the table fills, and a start replay the log for longer",
            "Move snapshot.path to a larger disk, or lower snapshot.keep or table.capacity.",
        )
    else:
        yield ok("files.snapshots_disk", told)
