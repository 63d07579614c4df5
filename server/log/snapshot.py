"""Snapshots as files: the state of the table at one offset of the log.

One file: a 64-byte head, Arrow IPC streams one after another (rows, names, producers, ends, and one for each table of
the follower), and a checksum of all before it. The first stream's schema carries the `Manifest` as JSON. A file has
its final name only when all of it is on disk, so a half-written one is never taken for a snapshot.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from server.errors import SnapshotError
from server.live.state import COLUMNS, INTERNERS, LAYOUT, TableState, problem_of
from server.live.table import End
from server.log.arrow import array_of, numpy_of, string_lists_of, strings_of

logger = logging.getLogger(__name__)

HEAD = b"liverank snapshot 1\n".ljust(64, b"\0")
DIGEST_BYTES = 16
CHUNK_ROWS = 8_192
"""Rows turned into Arrow at once: a longer step would hold the interpreter's lock for longer."""
SUFFIX = ".snapshot"
FOLLOWER = b"liverank.follower"
"""Key in the schema of a follower's stream; its value is the name of the table."""


@dataclass(frozen=True)
class Manifest:
    """What a snapshot is of.

    offset, stamp_ms, record_crc: the last applied record, its stamp and the CRC-32 of its bytes. table_ms: time up to
    which leases were expired. log: which log, such as ``sqlite`` or ``kafka:topic``. ends_newest: number of the newest
    end. feature_schema is told, not needed: columns do not depend on it.
    """

    offset: int
    stamp_ms: int
    record_crc: int
    table_ms: int
    log: str
    layout: str
    feature_schema: str
    rows: int
    embedding_dim: int
    landmark_ms: int
    counters_seen: list[bool]
    ends_newest: int


@dataclass(frozen=True)
class Contents:
    """A whole snapshot. ends: those still remembered, oldest first."""

    manifest: Manifest
    state: TableState
    ends: list[End]


def manifest_of(
    state: TableState, *, offset: int, stamp_ms: int, record_crc: int, table_ms: int, log: str, feature_schema: str,
    ends_newest: int,
) -> Manifest:  # fmt: skip
    """The manifest of ``state`` in this version's layout."""
    return Manifest(
        offset, stamp_ms, record_crc, table_ms, log, LAYOUT, feature_schema, state.rows, state.embedding_dim,
        state.landmark_ms, state.counters_seen.tolist(), ends_newest,
    )  # fmt: skip


class _Digested:
    """A file that hashes what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.digest = file, hashlib.blake2b(digest_size=DIGEST_BYTES)
        self.closed = False

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self._file.write(data)
        return len(data)

    def flush(self) -> None: ...

    def close(self) -> None: ...


class SnapshotFolder:
    """The snapshots of one server, newest first by offset."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def paths(self) -> list[Path]:
        """Finished snapshots, newest first."""
        return sorted(self.folder.glob(f"*{SUFFIX}"), reverse=True)

    def remove_half_written(self) -> None:
        """Deletes what a killed server was writing."""
        for path in self.folder.glob("*.tmp"):
            path.unlink(missing_ok=True)

    def write(self, contents: Contents) -> Path:
        """Writes, syncs and names a snapshot. Leaves nothing behind when it fails.

        Raises:
            SnapshotError: it could not be written.
        """
        path = self.folder / f"{contents.manifest.offset:020d}{SUFFIX}"
        beside = path.with_suffix(".tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                with beside.open("wb") as file:
                    _write(file, contents)
                    file.flush()
                    os.fsync(file.fileno())
                beside.rename(path)
                _sync_folder(self.folder)
            finally:
                beside.unlink(missing_ok=True)
        except (OSError, pa.ArrowException) as error:
            raise SnapshotError(f"{path}: cannot write: {error}") from error
        return path

    def set_aside(self, path: Path) -> None:
        """Renames a snapshot that cannot be used, so that it neither counts as kept nor is tried again."""
        path.rename(path.with_suffix(".unusable"))

    def prune(self, keep: int) -> None:
        """Deletes all but the newest ``keep``, and what was set aside before them."""
        paths = self.paths()
        for path in paths[keep:]:
            path.unlink(missing_ok=True)
        for path in self.folder.glob("*.unusable"):
            if path.stem < paths[:keep][-1].stem:
                path.unlink(missing_ok=True)

    def oldest_offset(self, keep: int) -> int:
        """Offset of the oldest kept snapshot, once there are ``keep``; 0 before."""
        paths = self.paths()
        return offset_of(paths[keep - 1]) if len(paths) >= keep else 0


def offset_of(path: Path) -> int:
    """The offset that a snapshot's name tells. Raises SnapshotError when it tells none."""
    try:
        return int(path.stem)
    except ValueError as error:
        raise SnapshotError(f"{path}: a name like {0:020d}{SUFFIX} wanted") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(file: IO[bytes], contents: Contents) -> None:
    sink = _Digested(file)
    sink.write(HEAD)
    told = {b"liverank": json.dumps(asdict(contents.manifest)).encode()}
    state = contents.state
    _stream(sink, _row_batches(state), told)
    names = [(kind, name) for kind in INTERNERS for name in state.names[kind]]
    _stream(sink, _string_batches(names, ("interner", "name")))
    _stream(sink, iter([_producer_batch(state)]))
    _stream(sink, _end_batches(contents.ends))
    for name, columns in state.followed.items():
        _stream(sink, _follower_batches(columns), {FOLLOWER: name.encode()})
    file.write(sink.digest.digest())


def _stream(sink: _Digested, batches: Iterator[pa.RecordBatch], metadata: dict[bytes, bytes] | None = None) -> None:
    first = next(batches)
    schema = first.schema.with_metadata(metadata)
    with pa.ipc.new_stream(pa.PythonFile(sink, "w"), schema) as writer:
        writer.write_batch(first.replace_schema_metadata(metadata))
        for batch in batches:
            writer.write_batch(batch.replace_schema_metadata(metadata))


def _chunks(rows: int) -> Iterator[slice]:
    """Slices that cover ``rows``; at least one, so that an empty table has a schema too."""
    for start in range(0, max(1, rows), CHUNK_ROWS):
        yield slice(start, min(start + CHUNK_ROWS, rows))


def _row_batches(state: TableState) -> Iterator[pa.RecordBatch]:
    for chunk in _chunks(state.rows):
        arrays = {name: array_of(state.columns[name][chunk]) for name in COLUMNS}
        arrays["title"] = strings_of(state.titles[chunk])
        arrays["tags"] = string_lists_of(state.tags[chunk])
        yield pa.RecordBatch.from_pydict(arrays)


def _string_batches(rows: Sequence[tuple[str, ...]], names: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    for chunk in _chunks(len(rows)):
        columns = list(zip(*rows[chunk], strict=True)) or [()] * len(names)
        yield pa.RecordBatch.from_arrays([strings_of(c) for c in columns], list(names))


def _producer_batch(state: TableState) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict(
        {
            "producer": strings_of(state.producers),
            "used_ms": array_of(state.producer_used_ms),
            "highest": array_of(state.highest),
            "window": array_of(state.window_bits),
        }
    )


def _follower_batches(columns: dict[str, Any]) -> Iterator[pa.RecordBatch]:
    for chunk in _chunks(len(next(iter(columns.values())))):
        yield pa.RecordBatch.from_pydict({name: array_of(column[chunk]) for name, column in columns.items()})


def _end_batches(ends: list[End]) -> Iterator[pa.RecordBatch]:
    for chunk in _chunks(len(ends)):
        part = ends[chunk]
        yield pa.RecordBatch.from_pydict(
            {
                "stream_id": strings_of([e.stream_id for e in part]),
                "epoch": array_of(np.array([e.epoch for e in part], np.int64)),
                "ended_ms": array_of(np.array([e.ended_ms for e in part], np.int64)),
                "reason": strings_of([e.reason for e in part]),
            }
        )


def read_manifest(path: Path) -> Manifest:
    """Checks the whole file, then reads what it is of. Raises SnapshotError when it is not what was written."""
    with _checked(path) as source:
        return _manifest(path, pa.ipc.open_stream(source).schema)


def read(path: Path) -> Contents:
    """Reads a snapshot of this version's layout; its arrays lie in the mapped file.

    Raises:
        SnapshotError: it is not what was written, or another version wrote it.
    """
    with _checked(path) as source:
        try:
            rows = pa.ipc.open_stream(source)
            manifest = _manifest(path, rows.schema)
            if manifest.layout != LAYOUT:
                raise SnapshotError(f"{path}: written by another version (layout {manifest.layout}, not {LAYOUT})")
            parts = [rows.read_all(), *(pa.ipc.open_stream(source).read_all() for _ in range(3))]
            for part in parts:
                part.validate(full=True)  # a checksum says that these are the bytes that were written, not by whom
            contents = _contents(manifest, *parts, followed=_read_followed(source))
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            told = str(error).partition("\n")[0]
            raise SnapshotError(f"{path}: cannot read: {type(error).__name__}: {told}") from error
    if problem := problem_of(contents.state, manifest.rows, manifest.embedding_dim):
        raise SnapshotError(f"{path}: cannot be a table: {problem}")
    return contents


def _read_followed(source: pa.BufferReader) -> dict[str, dict[str, Any]]:
    """What is behind the four streams that every snapshot has: older ones have nothing there."""
    found: dict[str, dict[str, Any]] = {}
    while source.tell() < source.size():
        part = pa.ipc.open_stream(source).read_all()
        part.validate(full=True)
        found[part.schema.metadata[FOLLOWER].decode()] = {name: numpy_of(part[name]) for name in part.column_names}
    return found


def _contents(
    manifest: Manifest, table: Any, names: Any, producers: Any, ends: Any, *, followed: dict[str, dict[str, Any]]
) -> Contents:
    by_kind: dict[str, list[str]] = {kind: [] for kind in INTERNERS}
    for kind, name in zip(names["interner"].to_pylist(), names["name"].to_pylist(), strict=True):
        by_kind[kind].append(name)
    state = TableState(
        columns={name: numpy_of(table[name]) for name in COLUMNS},
        titles=table["title"].to_pylist(),
        tags=[tuple(tags) for tags in table["tags"].to_pylist()],
        names=by_kind,
        landmark_ms=manifest.landmark_ms,
        counters_seen=np.array(manifest.counters_seen, np.bool_),
        producers=producers["producer"].to_pylist(),
        producer_used_ms=numpy_of(producers["used_ms"]),
        highest=numpy_of(producers["highest"]),
        window_bits=numpy_of(producers["window"]),
        followed=followed,
    )
    columns = (ends[name].to_pylist() for name in ("stream_id", "epoch", "ended_ms", "reason"))
    return Contents(manifest, state, [End(*row) for row in zip(*columns, strict=True)])


@contextmanager
def _checked(path: Path) -> Iterator[pa.BufferReader]:
    """The Arrow streams of a file whose checksum is right."""
    offset_of(path)
    try:
        whole = pa.memory_map(str(path)).read_buffer()
    except (OSError, pa.ArrowException) as error:
        raise SnapshotError(f"{path}: cannot read: {error}") from error
    view = memoryview(whole)
    if len(view) < len(HEAD) + DIGEST_BYTES or bytes(view[: len(HEAD)]) != HEAD:
        raise SnapshotError(f"{path}: not a snapshot")
    if hashlib.blake2b(view[:-DIGEST_BYTES], digest_size=DIGEST_BYTES).digest() != bytes(view[-DIGEST_BYTES:]):
        raise SnapshotError(f"{path}: damaged (checksum differs)")
    yield pa.BufferReader(whole.slice(len(HEAD), len(whole) - len(HEAD) - DIGEST_BYTES))


def _manifest(path: Path, schema: pa.Schema) -> Manifest:
    try:
        manifest = Manifest(**json.loads(schema.metadata[b"liverank"]))
    except (KeyError, TypeError, ValueError) as error:
        raise SnapshotError(f"{path}: written by another version: {error}") from error
    for field in fields(Manifest):
        value = getattr(manifest, field.name)
        if type(value).__name__ != str(field.type).partition("[")[0] or (isinstance(value, int) and value < 0):
            raise SnapshotError(f"{path}: {field.name} is not what a manifest says: {value!r:.80}")
    if manifest.offset != offset_of(path):
        raise SnapshotError(f"{path}: it is of offset {manifest.offset}, its name says another")
    return manifest
