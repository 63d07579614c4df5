"""Short ways to write a log and to make rows of it in tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
from liverank.v1 import ingest_pb2 as pb

from models.rows.base import Job
from models.schema import RowTable, _values
from server.config import TableSettings
from server.live.events import decode_batch
from server.log.base import Record
from server.log.commit import Committed
from tests.arrow_events import payload, to_batch, to_ipc, to_rows
from tests.events import T0, batch, event, small_settings

TABLE = small_settings(max_future_ms=10_000, lease_ms=10_000_000)
"""Sessions outlive any window of labels."""


class Log:
    """Batches as a server would log them; sequences are counted. Each gets the next offset, from 1."""

    def __init__(self, table: TableSettings = TABLE) -> None:
        self.table = table
        self.records: list[Committed] = []
        self._sequence = 0

    def add(self, after_ms: int, *events: pb.Event, producer: str = "p") -> int:
        """A batch stamped T0 + after_ms; returns its offset."""
        for one in events:
            if not one.sequence:
                self._sequence += 1
                one.sequence = self._sequence
        record = Record(len(self.records) + 1, T0 + after_ms, batch(*events, producer=producer))
        self.records.append(Committed(record, decode_batch(record.payload, self.table)))
        return record.offset

    def in_columns(self) -> Log:
        """The same events as a producer with columns would have sent them."""
        other = Log(self.table)
        for committed in self.records:
            sent = pb.EventBatch.FromString(committed.record.payload)
            columns = payload(to_ipc(to_batch(to_rows(list(sent.events)))), sent.producer_id)
            record = dataclasses.replace(committed.record, payload=columns)
            other.records.append(Committed(record, decode_batch(columns, self.table)))
        return other

    def play(self, job: Job) -> None:
        """Feeds everything to a job and ends it."""
        for committed in self.records:
            job.feed(committed)
        job.finish()


def act(stream_id: str, after_ms: int, viewer: str = "", **payload: Any) -> pb.Event:
    """An event at T0 + after_ms, numbered when it is logged."""
    return event(stream_id, 0, T0 + after_ms, viewer=viewer, **payload)


def impression(stream_id: str, after_ms: int, viewer: str = "v", **more: Any) -> pb.Event:
    """An impression of session 1, seen at T0 + after_ms, served at that moment unless said otherwise."""
    said = {"served_ms": T0 + after_ms, "verify_by_ms": T0 + after_ms + 10_000, **more}
    return event(stream_id, 0, T0 + after_ms, 1, viewer, impression=said)


def table_of(emitted: Iterable[Any]) -> RowTable:
    """What a job emitted, as arrays."""
    tables = list(emitted)
    if not tables:
        return RowTable({"at_ms": np.zeros(0, np.int64)}, {})
    table = pa.concat_tables(tables)
    return RowTable({name: _values(table.column(name)) for name in table.column_names}, {})
