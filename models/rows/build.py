"""One machine: a source through one job into one file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.rows.base import Emit, Job, Shard
from models.rows.cursor import Cursor
from models.rows.impressions import LOOK_AHEAD_MS, ImpressionRows
from models.rows.source import Source, cursor_at_start, decode
from models.rows.streams import StreamRows
from models.schema import Kind, RowWriter
from server.live.features import FeatureSet
from server.log.commit import Committed


@dataclass(frozen=True)
class Plan:
    """What rows are wanted. every_minutes: for streams. look_ahead_ms: for impressions."""

    kind: Kind
    every_minutes: int = 1
    look_ahead_ms: int = LOOK_AHEAD_MS

    def job(self, cursor: Cursor, emit: Emit, shard: Shard | None = None) -> Job:
        """The job of one shard."""
        if self.kind == "streams":
            return StreamRows(cursor, emit, self.every_minutes, shard)
        return ImpressionRows(cursor, emit, shard, self.look_ahead_ms)


@dataclass(frozen=True)
class Built:
    """What was written, and what was not, name → rows."""

    path: Path
    rows: int
    data_hash: str
    schema_hash: str
    told: dict[str, int]


def build(source: Source, features: FeatureSet, plan: Plan, out: Path, say: Callable[[str], None]) -> Built:
    """Writes a dataset file.

    Raises:
        ConfigError: ``out`` cannot be written. LogError: the log is damaged. LeakError: a row knew its future.
    """
    with writer_of(source, features, plan, out) as writer:
        job = plan.job(cursor_at_start(source, features), writer.write)
        for committed in decoded(source, say):
            job.feed(committed)
        job.finish()
    return told_of(writer, job.told)


def decoded(source: Source, say: Callable[[str], None]) -> Iterable[Committed]:
    """The records of a source, decoded; says now and then where it is."""
    for number, record in enumerate(source.records(), 1):
        if number % 5_000 == 0:
            say(f"record {record.offset}")
        yield decode(record, source.table)


def writer_of(source: Source, features: FeatureSet, plan: Plan, out: Path) -> RowWriter:
    """The writer of one file of this plan."""
    writer = RowWriter(out, plan.kind, features, source.table.embedding_dim, source.viewers.capacity > 0)
    writer.extra["liverank.source"] = source.name
    writer.extra["liverank.plan"] = json.dumps(
        {"every_minutes": plan.every_minutes, "look_ahead_ms": plan.look_ahead_ms}
    )
    return writer


def told_of(writer: RowWriter, told: Counter[Any]) -> Built:
    """The outcome of a job whose writer was closed."""
    counts = {name: count for name, count in sorted(told.items()) if count}
    return Built(writer.path, writer.rows, writer.data_hash, writer.schema_hash, counts)
