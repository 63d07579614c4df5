"""The clock: leases, event times and stamps of the log all depend on it."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

from server.doctor.base import Context, Finding, fail, ok, warn
from server.doctor.eventlog import DamagedLogError, LastRecord, UnmergedLogError, read_last

READINGS = 1_000
TIMEX_BYTES = 512  # struct timex has 208 on 64-bit Linux
NOT_SYNCHRONISED = 5  # TIME_ERROR of adjtimex(2)
SYNCHRONISE = "Run an NTP client (chrony or systemd-timesyncd) here, or on the machine that hosts this container."


def wall_clock(context: Context) -> Iterator[Finding]:
    """Never goes back, and is neither before the newest stamp of the log nor before liverank was installed."""
    last = _last_record(context.settings.log.path)  # before the clock is read: a server may be writing
    readings = [context.clock.now_ms() for _ in range(READINGS)]
    if any(later < earlier for earlier, later in pairwise(readings)):
        yield fail("clock.monotone", f"went back within {READINGS} readings", SYNCHRONISE)
    now_ms = readings[-1]
    told = f"{_utc(now_ms)} UTC"
    behind_ms = last.applied_ms - now_ms
    if behind_ms > context.settings.table.max_future_ms:
        yield fail(
            "clock.wall",
            f"{told}, {behind_ms / 1000:,.0f} s before the log's newest stamp ({_utc(last.applied_ms)}): the server "
            "would begin there, ahead of its producers, and refuse or outdate their events",
            f"Set the clock. {SYNCHRONISE} If the log was written with a wrong clock, wait or move it aside.",
        )
    elif behind_ms > 0:
        yield warn("clock.wall", f"{told}, {behind_ms} ms before the log's newest stamp", SYNCHRONISE)
    elif now_ms < installed_ms():
        yield fail(
            "clock.wall",
            f"{told}, before this liverank was installed ({_utc(installed_ms())}): events would be refused as "
            "too far in the future",
            f"Set the clock. {SYNCHRONISE}",
        )
    else:
        yield ok(
            "clock.wall", told + (f", after the log's newest stamp ({_utc(last.applied_ms)})" if last.offset else "")
        )


def synchronised(context: Context) -> Iterator[Finding]:
    """Whether the kernel says that something keeps its clock right."""
    answer = ntp_state()
    if answer is None:
        yield ok("clock.ntp", "the kernel does not tell whether its clock is synchronised")
    elif answer:
        yield ok("clock.ntp", "synchronised, says the kernel")
    else:
        yield warn("clock.ntp", "not synchronised, says the kernel (some containers always say so)", SYNCHRONISE)


def installed_ms() -> int:
    """When this file was written to this disk; the time now cannot be earlier."""
    return int(Path(__file__).stat().st_mtime * 1000)


def ntp_state() -> bool | None:
    """adjtimex(2), reading only. None: not known."""
    if not sys.platform.startswith("linux"):
        return None
    timex = ctypes.create_string_buffer(TIMEX_BYTES)  # zeroed: modes 0 asks for nothing to be set
    try:
        answer = int(ctypes.CDLL(None).adjtimex(timex))
    except (OSError, AttributeError):
        return None
    return None if answer < 0 else answer != NOT_SYNCHRONISED


def _last_record(path: Path) -> LastRecord:
    """The newest record; a log that is not there or damaged says nothing about the clock."""
    try:
        return read_last(path)
    except (DamagedLogError, UnmergedLogError, OSError):
        return LastRecord(0, 0)


def _utc(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
