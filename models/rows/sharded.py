"""The same job over a Ray cluster, sharded by stream: the same rows, in the same order, in the same file.

Decoding, which is most of the work, is done by tasks, each for some records. Every shard then applies *all* records, as
the table must (what a producer may send next depends on what it sent for other streams), and reads features and joins
labels of its own streams only. What the shards emit is sorted already, so it is merged and not sorted again.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from models.rows.base import Shard
from models.rows.build import Built, Plan, told_of, writer_of
from models.rows.cursor import Cursor
from models.rows.source import Source, decode
from models.schema import ROW_GROUP_ROWS, Kind, arrow_schema
from server.config import TableSettings, ViewerSettings
from server.errors import ConfigError
from server.live.features import FeatureSet
from server.log.base import Record
from server.log.commit import Committed
from server.log.snapshot import Contents

CHUNK_BYTES = 4 << 20
CHUNK_RECORDS = 256
CHUNKS_UNDER_WAY = 4
SORTED_BY: dict[Kind, tuple[str, str]] = {
    "impressions": ("impression_offset", "impression_index"),
    "streams": ("at_ms", "stream_id"),
}


@dataclass(frozen=True)
class Work:
    """What a shard is told: everything but the records."""

    table: TableSettings
    viewers: ViewerSettings
    start: Contents | None
    features: FeatureSet
    plan: Plan
    shard: Shard


class ShardWorker:
    """One shard, in a process of its own."""

    def __init__(self, work: Work) -> None:
        self._rows: list[Any] = []
        cursor = Cursor(work.table, work.features, work.start, work.viewers)
        self._job = work.plan.job(cursor, self._rows.append, work.shard)

    def feed(self, records: list[Committed]) -> list[Any]:
        """The next records of the log; returns Arrow tables of the rows that became final."""
        for committed in records:
            self._job.feed(committed)
        return self._taken()

    def finish(self) -> tuple[list[Any], Counter[str]]:
        """The last rows, and what was left out."""
        self._job.finish()
        return self._taken(), self._job.told

    def _taken(self) -> list[Any]:
        taken = list(self._rows)
        self._rows.clear()
        return taken


def decode_all(records: list[Record], table: TableSettings) -> list[Committed]:
    """A task: some records of the log, decoded. Raises LogError."""
    return [decode(record, table) for record in records]


def build_on_ray(
    source: Source,
    features: FeatureSet,
    plan: Plan,
    out: Path,
    address: str,
    shards: int,
    say: Callable[[str], None],
) -> Built:
    """Like `models.rows.build.build`. Records are read here and sent, so workers need no access to the log.

    Args:
        address: of a cluster on which this version of liverank is installed; "local": one is started on this machine.

    Raises:
        ConfigError: ray is not installed, or no cluster answers; else as `build`.
    """
    with cluster(address, shards) as ray:
        try:
            with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
                parts, told = _run(ray, source, features, plan, shards, Path(folder), say)
                with writer_of(source, features, plan, out) as writer:
                    for table in merged(parts, SORTED_BY[plan.kind]):
                        writer.write(table)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error  # what a worker raised, as one machine would raise it
    return told_of(writer, told)


@contextmanager
def cluster(address: str, shards: int) -> Iterator[Any]:
    """The module `ray`, connected; the connection that there is already, if any. Raises ConfigError."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError(f"--ray needs the package ray: pip install 'liverank[ray]' ({error})") from error
    if ray.is_initialized():
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would call home
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address == "local":
            ray.init(
                address="local", num_cpus=shards + 1, include_dashboard=False, object_store_memory=256 << 20,
                _node_ip_address="127.0.0.1", **quiet,
            )  # fmt: skip
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"--ray {address}: no cluster there: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _run(
    ray: Any, source: Source, features: FeatureSet, plan: Plan, shards: int, folder: Path, say: Callable[[str], None]
) -> tuple[list[Path], Counter[str]]:
    """Feeds every shard; returns one file of rows each, and what was left out by all."""
    schema = arrow_schema(plan.kind, len(features), source.table.embedding_dim, source.viewers.capacity > 0)
    decode_task, worker = ray.remote(decode_all), ray.remote(ShardWorker)
    table = ray.put(source.table)
    workers = [
        worker.remote(Work(source.table, source.viewers, source.start, features, plan, Shard(i, shards)))
        for i in range(shards)
    ]
    parts = [folder / f"{i}.parquet" for i in range(shards)]
    writers = [pq.ParquetWriter(part, schema) for part in parts]

    def take(results: list[Any]) -> None:
        for writer, result in zip(writers, results, strict=True):
            for rows in ray.get(result):
                writer.write_table(rows, row_group_size=ROW_GROUP_ROWS)

    under_way: deque[list[Any]] = deque()
    told: Counter[str] = Counter()
    try:
        for number, chunk in enumerate(chunks(source.records()), 1):
            decoded = decode_task.remote(chunk, table)
            under_way.append([w.feed.remote(decoded) for w in workers])
            if len(under_way) > CHUNKS_UNDER_WAY:
                take(under_way.popleft())
            if number % 20 == 0:
                say(f"record {chunk[-1].offset}")
        while under_way:
            take(under_way.popleft())
        for writer, result in zip(writers, [w.finish.remote() for w in workers], strict=True):
            rows, left_out = ray.get(result)
            told += left_out
            for one in rows:
                writer.write_table(one, row_group_size=ROW_GROUP_ROWS)
    finally:
        for writer in writers:
            writer.close()
    return parts, told


def chunks(records: Iterator[Record]) -> Iterator[list[Record]]:
    """Records in groups that are worth a task."""
    chunk: list[Record] = []
    size = 0
    for record in records:
        chunk.append(record)
        size += len(record.payload)
        if size >= CHUNK_BYTES or len(chunk) >= CHUNK_RECORDS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def merged(parts: list[Path], by: tuple[str, str]) -> Iterator[Any]:
    """The rows of sorted files as Arrow tables, sorted by two columns that together are unique.

    Holds a row group of each file.
    """
    runs = [_Run(part, by) for part in parts]
    while runs := [run for run in runs if run.load()]:
        # Up to the smallest key that any file's next group may follow, the rows of all files are here.
        borders = [run.last_key() for run in runs if run.goes_on]
        taken = [run.take(min(borders) if borders else None) for run in runs]
        yield pa.concat_tables(taken).sort_by([(name, "ascending") for name in by])


class _Run:
    """One sorted file, and what of it is not merged yet."""

    def __init__(self, part: Path, by: tuple[str, str]) -> None:
        self._file, self._by, self._next = pq.ParquetFile(part), by, 0
        self._held: Any = None

    @property
    def goes_on(self) -> bool:
        return bool(self._next < self._file.num_row_groups)

    def load(self) -> bool:
        """Makes sure that some rows are held; False when there are none left."""
        while (self._held is None or not len(self._held)) and self.goes_on:
            self._held = self._file.read_row_group(self._next)
            self._next += 1
        return self._held is not None and len(self._held) > 0

    def last_key(self) -> tuple[Any, Any]:
        """The key of the last row held."""
        first, second = (self._held.column(name)[-1].as_py() for name in self._by)
        return first, second

    def take(self, border: tuple[Any, Any] | None) -> Any:
        """The rows up to and with ``border``; None: all that are held."""
        end = len(self._held)
        if border is not None:
            first, second = (self._held.column(name) for name in self._by)
            begin = int(np.searchsorted(first.to_numpy(), border[0], side="left"))
            end = begin
            while end < len(first) and first[end].as_py() == border[0] and second[end].as_py() <= border[1]:
                end += 1
        taken, self._held = self._held.slice(0, end), self._held.slice(end)
        return taken
