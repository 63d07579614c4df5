"""The same events as an Arrow batch: what a producer with columns would send."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from liverank.v1 import ingest_pb2 as pb

from server.live.arrow_schema import LISTS, NUMBERS, TEXTS

TYPES: dict[str, Any] = {
    **NUMBERS,
    **{name: pa.utf8() for name in TEXTS},
    **{name: pa.list_(kind) for name, kind in LISTS.items()},
    "kind": pa.dictionary(pa.int8(), pa.utf8()),
}


def to_rows(events: list[pb.Event]) -> list[dict[str, Any]]:
    """One row per event: header fields, kind, and the fields of its payload."""
    rows = []
    for event in events:
        row: dict[str, Any] = {
            "sequence": event.sequence, "stream_id": event.stream_id, "epoch": event.epoch,
            "event_time_ms": event.event_time_ms, "viewer_id": event.viewer_id, "kind": event.WhichOneof("payload"),
        }  # fmt: skip
        if row["kind"]:
            payload = getattr(event, row["kind"])
            for field, value in payload.ListFields():
                row[field.name] = list(value) if field.name in LISTS else value
        rows.append(row)
    return rows


def to_batch(rows: list[dict[str, Any]], types: dict[str, Any] | None = None, sparse: bool = True) -> Any:
    """A record batch; ``types`` replaces column types, ``sparse`` leaves out columns that no row has."""
    wanted = {**TYPES, **(types or {})}
    names = [n for n in wanted if not sparse or n in ("sequence", "stream_id", "event_time_ms", "kind")
             or any(row.get(n) is not None for row in rows)]  # fmt: skip
    columns = []
    for name in names:
        values = [row.get(name) for row in rows]
        kind = wanted[name]
        if pa.types.is_dictionary(kind):
            columns.append(pa.array(values, kind.value_type).dictionary_encode().cast(kind))
        else:
            columns.append(pa.array(values, kind))
    return pa.record_batch(columns, names=names)


def to_ipc(batch: Any, *more: Any, compression: str | None = None) -> bytes:
    """An IPC stream of these record batches."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
        for one in (batch, *more):
            writer.write_batch(one)
    return bytes(sink.getvalue())


def payload(ipc: bytes, producer: str = "p") -> bytes:
    """A serialised EventBatch in the columnar form."""
    return pb.EventBatch(producer_id=producer, arrow=ipc).SerializeToString()
