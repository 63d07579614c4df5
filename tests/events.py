"""Short ways to write events and a table in tests."""

from __future__ import annotations

from typing import Any

import numpy as np
from liverank.v1 import ingest_pb2 as pb

from server.config import TableSettings, ViewerSettings
from server.live.events import DecodedBatch, decode_batch
from server.live.table import Applied, LiveTable
from server.viewers.table import ViewerTable

T0 = 1_700_000_000_000
"""A round moment, Unix ms."""


def event(stream_id: str, sequence: int, at_ms: int = T0, epoch: int = 0, viewer: str = "", **payload: Any) -> pb.Event:
    """One event; ``payload`` is one oneof case with a dict of its fields, such as ``ended={"reason": "x"}``."""
    ((case, fields),) = payload.items()
    made = pb.Event(stream_id=stream_id, sequence=sequence, event_time_ms=at_ms, epoch=epoch, viewer_id=viewer)
    getattr(made, case).SetInParent()
    for name, value in fields.items():
        if isinstance(value, list | np.ndarray):
            getattr(getattr(made, case), name).extend(value)
        else:
            setattr(getattr(made, case), name, value)
    return made


def started(stream_id: str, sequence: int, at_ms: int = T0, epoch: int = 1, **fields: Any) -> pb.Event:
    """A started event with a creator."""
    return event(stream_id, sequence, at_ms, epoch, started={"creator_id": f"creator-{stream_id}", **fields})


def batch(*events: pb.Event, producer: str = "p") -> bytes:
    """A serialised EventBatch."""
    return pb.EventBatch(producer_id=producer, events=events).SerializeToString()


def small_settings(**changes: Any) -> TableSettings:
    """Settings of a small table with short times."""
    defaults: dict[str, Any] = {
        "capacity": 64, "embedding_dim": 4, "lease_ms": 10_000, "grace_ms": 20_000,
        "tombstone_ms": 700_000, "max_lateness_ms": 600_000,
    }  # fmt: skip
    return TableSettings(**{**defaults, **changes})


def new_table(settings: TableSettings, viewers: ViewerSettings | None = None) -> LiveTable:
    """An empty table with its own embedding matrix, and with ``viewers`` a table of viewers that follows it."""
    follower = None if viewers is None else ViewerTable(viewers, settings.embedding_dim)
    return LiveTable(settings, np.zeros((settings.capacity, settings.embedding_dim), np.float32), follower=follower)


def apply(table: LiveTable, *events: pb.Event, at_ms: int = T0, producer: str = "p") -> Applied:
    """Decodes and applies events that must all be well-formed."""
    decoded = decode(table, *events, producer=producer)
    assert not decoded.rejected, decoded.rejected
    return table.apply(decoded.events, at_ms)


def decode(table: LiveTable, *events: pb.Event, producer: str = "p") -> DecodedBatch:
    """Decodes events with the table's settings."""
    return decode_batch(batch(*events, producer=producer), table.settings)
