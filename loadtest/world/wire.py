"""Columns to protobuf, for whoever publishes to a server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from liverank.v1 import ingest_pb2 as pb

from loadtest.world.events import END_REASONS, REPORT_REASONS, EventKind, WorldEvents, viewer_name
from loadtest.world.streams import StreamColumns

# (streams, row, value, detail) to keyword arguments of Event
_Payload = Callable[[StreamColumns, int, float, int], dict[str, Any]]


def _interaction(field: str) -> _Payload:
    return lambda _s, _row, value, _d: {field: pb.Interaction(count=int(value))}


def _money(field: str) -> _Payload:
    return lambda s, row, value, _d: {field: pb.Money(amount_minor=int(value), currency=s.market_of(row).currency)}


_PAYLOADS: dict[int, _Payload] = {
    EventKind.STARTED: lambda s, row, _v, _d: {"started": started(s, row)},
    EventKind.HEARTBEAT: lambda _s, _row, v, _d: {"heartbeat": pb.Heartbeat(media_sequence=int(v))},
    EventKind.ENDED: lambda _s, _row, _v, d: {"ended": pb.Ended(reason=END_REASONS[d])},
    EventKind.VIEWER_COUNT: lambda _s, _row, v, _d: {"viewer_count": pb.ViewerCount(count=int(v))},
    EventKind.JOINED: _interaction("joined"),
    EventKind.LEFT: _interaction("left"),
    EventKind.WATCHED: lambda _s, _row, v, _d: {"watched": pb.Watched(seconds=v)},
    EventKind.CHATTED: _interaction("chatted"),
    EventKind.LIKED: _interaction("liked"),
    EventKind.FOLLOWED: _interaction("followed"),
    EventKind.SHARED: _interaction("shared"),
    EventKind.BID: _money("bid"),
    EventKind.PURCHASED: _money("purchased"),
    EventKind.REPORTED: lambda _s, _row, _v, d: {"reported": pb.Reported(reason=REPORT_REASONS[d])},
    EventKind.MODERATED: lambda _s, _row, v, _d: {"moderated": pb.Moderated(action=int(v))},  # type: ignore[arg-type]
}


def started(streams: StreamColumns, row: int) -> pb.Started:
    """The details with which stream ``row`` goes live."""
    market = streams.market_of(row)
    category = streams.category_of(row)
    return pb.Started(
        creator_id=streams.creator_name(row),
        title=streams.titles[row],
        language=market.language,
        category=category.name,
        region=market.region if streams.region_locked[row] else "",
        age_rating=category.age_rating,
        embedding=streams.embedding[row].tolist(),
        tags=[category.name, f"market-{market.region.lower()}"],
    )


def to_batches(events: WorldEvents, max_events: int) -> list[pb.EventBatch]:
    """See WorldEvents.to_batches."""
    if max_events < 1:
        raise ValueError(f"max_events must be at least 1, not {max_events}")
    streams, producer = events.streams, events.producer
    # A new batch where the producer changes, and wherever one would grow too long.
    starts = np.flatnonzero(np.diff(producer, prepend=np.int16(-1)))
    ends = np.append(starts[1:], len(producer))
    rows = list(
        zip(
            events.sequence.tolist(), events.stream.tolist(), events.epoch.tolist(),
            events.event_time_ms.tolist(), events.kind.tolist(), events.viewer.tolist(),
            events.value.tolist(), events.detail.tolist(),
        )
    )  # fmt: skip
    batches = []
    for first, end in zip(starts.tolist(), ends.tolist()):
        for begin in range(first, end, max_events):
            batch = pb.EventBatch(producer_id=events.producer_ids[int(producer[begin])])
            batch.events.extend(
                pb.Event(
                    sequence=sequence, stream_id=streams.ids[stream], epoch=epoch, event_time_ms=time_ms,
                    viewer_id=viewer_name(viewer), **_PAYLOADS[kind](streams, stream, value, detail),
                )
                for sequence, stream, epoch, time_ms, kind, viewer, value, detail
                in rows[begin : min(begin + max_events, end)]
            )  # fmt: skip
            batches.append(batch)
    return batches
