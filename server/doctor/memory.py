"""Memory for the configured table, and shared memory for Triton."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from server.doctor.base import Context, Finding, fail, ok, warn
from server.scoring.address import is_this_machine

PROCESS_BYTES = 300 << 20
"""A warm server with an empty table: libraries, compiled kernels, the model, gRPC's buffers."""
TEXT_BYTES_PER_ROW = 400
"""Title and tags: Python strings of usual length, and the lists that hold them."""
WORK_SHARE = 0.5
"""Work arrays of ticks and refreshes, and allocator slack, on top of a row's columns."""
SHM_BYTES_WANTED = 64 << 20
LARGEST_CALL_ROWS = 65_536
"""A refresh sends larger tables in parts (server/scoring/refresh.py)."""


def table_memory(context: Context) -> Iterator[Finding]:
    """Whether the table at its full capacity fits into what is free now, in this control group."""
    capacity = context.settings.table.capacity
    need = PROCESS_BYTES + capacity * bytes_per_row(context)
    free, where = available_bytes(context.root)
    told = f"{_mib(need)} for a full table of {capacity:,} rows"
    if free is None:
        yield ok("memory.table", f"{told}; how much is free is not known on this system")
    elif need <= free:
        yield ok("memory.table", f"{told}; {_mib(free)} free ({where})")
    elif context.neighbour is not None:
        # Its memory is what is missing: this is not about a second server.
        yield ok("memory.table", f"{told}; a liverank is running with its share, {_mib(free)} more free ({where})")
    else:
        fits = max(0, int((free - PROCESS_BYTES) / bytes_per_row(context)))
        yield fail(
            "memory.table",
            f"{told}, but {_mib(free)} free ({where}): it would be killed when the table fills",
            f"Set table.capacity to {fits:,} or less, or give the machine or container more memory."
            if fits
            else f"Give the machine or container {_mib(need)} of memory.",
        )


def viewer_memory(context: Context) -> Iterator[Finding]:
    """Whether a full table of viewers, and the copy of it that a snapshot takes, fit beside the live table."""
    from server.viewers.table import ViewerTable

    settings = context.settings.viewers
    if not settings.capacity:
        return
    one = settings.model_copy(update={"capacity": 1, "sessions": 1})
    per_viewer, per_session = ViewerTable(one, context.settings.table.embedding_dim).nbytes_per_row()
    sessions = settings.sessions * per_session
    need = 2 * (settings.capacity * per_viewer + sessions)
    free, where = available_bytes(context.root)
    told = f"{_mib(need)} once {settings.capacity:,} viewers are known, with the copy for a snapshot"
    left = None if free is None else free - PROCESS_BYTES - context.settings.table.capacity * bytes_per_row(context)
    if left is None:
        yield ok("memory.viewers", f"{told}; how much is free is not known on this system")
    elif need <= left or context.neighbour is not None:
        yield ok("memory.viewers", f"{told}; {_mib(left)} free beside the table ({where})")
    else:
        fits = max(0, int((left / 2 - sessions) / per_viewer))
        yield warn(
            "memory.viewers",
            f"{told}, but {_mib(max(0, left))} free beside the table ({where}): it would be killed when they fill it",
            f"Set viewers.capacity to {fits:,} or less, or give the machine or container more memory.",
        )


def snapshot_bytes_per_row(context: Context) -> int:
    """Estimated size on disk of one row; allocates one row."""
    import numpy as np

    from server.live.columns import Columns

    embedding = np.zeros((1, context.settings.table.embedding_dim), np.float32)
    return Columns.allocate(1, embedding).nbytes_per_row() + TEXT_BYTES_PER_ROW // 4  # text without Python's objects


def bytes_per_row(context: Context) -> int:
    """Estimated memory of one row of the table, with everything derived about it; allocates one row."""
    import numpy as np

    from server.live.table import LiveTable
    from server.retrieval.streams import StreamState
    from server.rules.rulebook import RuleBook

    settings = context.settings.table.model_copy(update={"capacity": 1})
    table = LiveTable(settings, np.zeros((1, settings.embedding_dim), np.float32))
    streams = StreamState(table, context.features, RuleBook({}, {}, ""))
    derived = sum(column.nbytes for column in vars(streams).values() if isinstance(column, np.ndarray))
    id_map = 16  # int32 buckets, a power of two of at least twice the rows
    # A refresh holds each row's features and their states twice: those being gathered, those being scored.
    features = 2 * 5 * len(context.features)
    columns = table.columns.nbytes_per_row() + derived + id_map + features
    return int(columns * (1 + WORK_SHARE)) + TEXT_BYTES_PER_ROW


def available_bytes(root: Path) -> tuple[int | None, str]:
    """Memory that can be taken now, and what limits it: the machine or the control group. None: not known."""
    found = []
    machine = _meminfo(root).get("MemAvailable")
    if machine is not None:
        found.append((machine, "this machine"))
    group = _group_free_bytes(root)
    if group is not None:
        found.append((group, "limit of the control group"))
    return min(found, default=(None, ""), key=lambda pair: pair[0] or 0)


def _meminfo(root: Path) -> dict[str, int]:
    """Bytes by name from /proc/meminfo; empty where there is none."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    parts = [line.split() for line in lines]
    return {part[0].rstrip(":"): int(part[1]) << 10 for part in parts if len(part) >= 2 and part[1].isdecimal()}


def _group_free_bytes(root: Path) -> int | None:
    """The least that any control group around this process leaves free, version 2 or 1."""
    free = []
    for folder in _groups(root):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            try:
                limit, used = ((folder / name).read_text().strip() for name in (limit_name, used_name))
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            if limit.isdecimal() and used.isdecimal():
                # Page cache counts as used, and is given up when needed.
                cache = int(stat.get("total_inactive_file", stat.get("inactive_file", "0")))
                free.append(max(0, int(limit) - int(used) + cache))
    return min(free, default=None)


def _groups(root: Path) -> list[Path]:
    """The folders of this process's memory control groups, innermost first, as far as they are visible."""
    folders = []
    mounts = {"": root / "sys/fs/cgroup", "memory": root / "sys/fs/cgroup/memory"}
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = ["0::/"]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        kind = "memory" if "memory" in controllers.split(",") else controllers
        if kind in mounts:
            inner = Path(path.lstrip("/"))
            folders += [mounts[kind] / part for part in (inner, *inner.parents)]
    return folders


def shared_memory(context: Context) -> Iterator[Finding]:
    """/dev/shm, over which a Triton on this machine talks to its Python processes."""
    scoring = context.settings.scoring
    if scoring.mode != "triton":
        yield ok("memory.shm", "not needed: scoring.mode is local")
        return
    here = is_this_machine(scoring.triton_address)
    if not here and scoring.transport != "system_shm":
        yield ok("memory.shm", f"not needed here: Triton is at {scoring.triton_address}")
        return
    mend = "Give it 64 MB or more: `docker run --shm-size=256m`, or a memory-backed emptyDir at /dev/shm."
    try:
        found = os.statvfs(context.root / "dev/shm")
    except OSError as error:
        yield fail("memory.shm", f"/dev/shm cannot be used: {error.strerror}; Triton's Python backend needs it", mend)
        return
    size, free = found.f_frsize * found.f_blocks, found.f_frsize * found.f_bavail
    region = _region_bytes(context) if scoring.transport in ("auto", "system_shm") else 0
    if here and size < SHM_BYTES_WANTED:
        yield fail("memory.shm", f"/dev/shm holds {_mib(size)}; Triton's Python backend needs 64 MiB", mend)
    elif region and free < region + (SHM_BYTES_WANTED if here else 0) and context.neighbour is None:
        told = f"/dev/shm has {_mib(free)} free; tensors of a full table take {_mib(region)}, Triton itself 64 MiB"
        wanted = _mib(region + 2 * SHM_BYTES_WANTED)
        mend = f"Give it {wanted} or more (docker run --shm-size), or set scoring.transport to plain."
        if scoring.transport == "auto":
            yield warn("memory.shm", f"{told}: they go inside the messages instead", mend)
        else:
            yield fail("memory.shm", told, mend)
    else:
        shared = "" if here or not region else "; Triton must see the same one"
        yield ok("memory.shm", f"/dev/shm holds {_mib(size)}, {_mib(free)} free{shared}")


def _region_bytes(context: Context) -> int:
    """Shared memory that the tensors of the largest call take; guessed while the feature file cannot be read."""
    from server.errors import ConfigError

    try:
        n_features = len(context.features)
    except (ConfigError, UnicodeDecodeError, ImportError):
        n_features = 64
    rows = 1 << (min(context.settings.table.capacity, LARGEST_CALL_ROWS) - 1).bit_length()
    return 4 * max(rows, 1024) * (n_features + 1)


def _mib(size: float) -> str:
    return f"{size / (1 << 20):,.0f} MiB"
