"""A simulated platform through the server's own table: columns in, columns out, no messages in between."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kernels.idmap import pack_ids
from loadtest.world import END_REASONS, EventKind, StreamColumns, WorldEvents, WorldSettings
from models.telling import mix64
from server.config import TableSettings
from server.live.event_checks import StartedRow
from server.live.events import EventColumns
from server.live.table import LiveTable

_INTERACTIONS = [
    EventKind.JOINED, EventKind.LEFT, EventKind.CHATTED, EventKind.LIKED, EventKind.FOLLOWED, EventKind.SHARED,
]  # fmt: skip
_MONEY = [EventKind.BID, EventKind.PURCHASED]
_NEEDS_NO_VALUE = [EventKind.STARTED, EventKind.HEARTBEAT, EventKind.ENDED]


def table_settings(world: WorldSettings, slowness: int = 1) -> TableSettings:
    """A table that never runs out of rows, with a lease that fits the world's heartbeats."""
    tombstone_ms, lease_ms = 700_000, max(60_000, 3 * world.heartbeat_ms * slowness)
    turnover = world.target_live * (tombstone_ms + 2 * lease_ms) / (world.mean_session_ms * slowness)
    return TableSettings(
        capacity=1_000 + 3 * world.target_live + int(4 * turnover),
        embedding_dim=world.embedding_dim,
        lease_ms=lease_ms,
        tombstone_ms=tombstone_ms,
    )


def new_table(settings: TableSettings) -> LiveTable:
    """An empty table around its own embedding matrix."""
    return LiveTable(settings, np.zeros((settings.capacity, settings.embedding_dim), np.float32))


def event_columns(events: WorldEvents, settings: TableSettings) -> Iterator[EventColumns]:
    """The events of one step as the table takes them: one batch per producer, in the order of delivery.

    The same columns that `server.live.events.decode_batch` makes of the same events' messages, but for
    ``viewer_hash``, which is a scramble of the viewer's number instead of a hash of the name.
    """
    streams, kind = events.streams, events.kind
    known, inverse = np.unique(events.stream, return_inverse=True)
    packed, lengths = pack_ids([streams.ids[row].encode() for row in known])
    value = np.where(np.isin(kind, _NEEDS_NO_VALUE), 0.0, events.value)
    value[np.isin(kind, _INTERACTIONS)] = np.maximum(value[np.isin(kind, _INTERACTIONS)], 1.0)
    value[kind == EventKind.REPORTED] = 1.0
    money = np.isin(kind, _MONEY)
    # A market's money in the reference currency, the same for all its streams.
    market, market_row = np.unique(streams.market, return_index=True)
    rate = np.zeros(int(market[-1]) + 1 if len(market) else 0)
    rate[market] = [settings.currencies[streams.market_of(int(row)).currency] for row in market_row]
    value[money] *= rate[streams.market[events.stream[money]]]
    viewer = np.where(events.viewer >= 0, mix64(events.viewer.astype(np.uint64)) | np.uint64(1 << 63), 0)
    media = np.where(kind == EventKind.HEARTBEAT, events.value, 0).astype(np.int64)

    edges = np.flatnonzero(np.diff(events.producer, prepend=np.int16(-1), append=np.int16(-1)))
    for first, end in zip(edges[:-1].tolist(), edges[1:].tolist()):
        batch = slice(first, end)
        started = np.flatnonzero(kind[batch] == EventKind.STARTED).tolist()
        ended = np.flatnonzero(kind[batch] == EventKind.ENDED).tolist()
        yield EventColumns(
            producer_id=events.producer_ids[int(events.producer[first])],
            index=np.arange(end - first, dtype=np.int32),
            sequence=events.sequence[batch],
            ids=packed[inverse[batch]],
            id_lengths=lengths[inverse[batch]],
            kind=kind[batch].astype(np.uint8),
            epoch=events.epoch[batch],
            time_ms=events.event_time_ms[batch],
            value=value[batch],
            media_sequence=media[batch],
            viewer_hash=viewer[batch].astype(np.uint64),
            started={i: _started(streams, int(events.stream[first + i])) for i in started},
            ended_reason={i: END_REASONS[int(events.detail[first + i])] for i in ended},
        )


def apply_events(table: LiveTable, events: WorldEvents) -> None:
    """Applies one step of a world to the table, as of the world's clock."""
    for batch in event_columns(events, table.settings):
        table.apply(batch, events.now_ms)


def _started(streams: StreamColumns, row: int) -> StartedRow:
    market, category = streams.market_of(row), streams.category_of(row)
    return StartedRow(
        creator_id=streams.creator_name(row),
        title=streams.titles[row],
        language=market.language,
        category=category.name,
        region=market.region if streams.region_locked[row] else "",
        age_rating=category.age_rating,
        embedding=np.asarray(streams.embedding[row], np.float32),
        tags=(category.name, f"market-{market.region.lower()}"),
    )
