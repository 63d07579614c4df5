"""The audience's side of the contract: impressions of what a reply showed, then what viewers did with it, in time."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
from liverank.v1 import ingest_pb2 as pb
from liverank.v1 import ranking_pb2
from numpy.typing import NDArray

from loadtest.world.events import REPORT_REASONS
from loadtest.world.population import Viewer
from loadtest.world.streams import StreamColumns
from loadtest.world.viewing import Responses, Viewing

PRODUCER = "feed-0"
_GLANCE_MS = 150  # from one place to the next
_CLICK_AFTER_MS = 800
_WATCHED_EVERY_S = 10.0
_MAX_EVENTS = 2_000  # of one batch


class Feedback:
    """Keeps what viewers are going to do until it is due. Not thread-safe.

    Args:
        places: how many streams of a reply fit a viewer's screen; only those are impressions.
    """

    def __init__(self, viewing: Viewing, streams: StreamColumns, places: int) -> None:
        self._viewing, self._streams, self._places = viewing, streams, places
        self._due: list[tuple[int, int, pb.Event]] = []
        self._made = self._sequence = 0
        self.impressions = 0

    def __len__(self) -> int:
        """Events not sent yet."""
        return len(self._due)

    def seen(
        self, viewer: Viewer, reply: ranking_pb2.RankResponse, rng: np.random.Generator, *, shuffled: bool = False
    ) -> None:
        """A viewer sees a reply at the moment it was made; draws what follows. KeyError: a stream nobody knows.

        shuffled: the feed service puts what fits the screen in an order of chance, as one does to measure what a place
        is worth.
        """
        shown = list(reply.streams[: self._places])
        if not shown:
            return
        if shuffled:
            shown = [shown[i] for i in rng.permutation(len(shown))]
        rows = self._streams.rows_of([stream.stream_id for stream in shown])
        answer = self._viewing.respond(viewer.embedding, rows, np.arange(len(shown)), rng)
        chance = rng.random(len(shown))
        for place, stream in enumerate(shown):
            at_ms = reply.as_of_ms + place * _GLANCE_MS
            said = pb.Impression(
                request_id=reply.request_id,
                served_ms=reply.as_of_ms,
                verify_by_ms=stream.verify_by_ms,
                position=place + 1,
                propensity=stream.exploration,
                model_version=reply.model_version,
                applied_offset=reply.applied_offset,
            )
            self._add(at_ms, stream.stream_id, viewer, epoch=stream.epoch, impression=said)
            if answer.clicked[place]:
                self._follow_up(at_ms + _CLICK_AFTER_MS, viewer, int(rows[place]), answer, place, chance[place])
        self.impressions += len(shown)

    def due(self, now_ms: int) -> list[pb.EventBatch]:
        """What happened up to ``now_ms``, in order of time, numbered."""
        batches: list[pb.EventBatch] = []
        while self._due and self._due[0][0] <= now_ms:
            if not batches or len(batches[-1].events) >= _MAX_EVENTS:
                batches.append(pb.EventBatch(producer_id=PRODUCER))
            event = heapq.heappop(self._due)[2]
            self._sequence += 1
            event.sequence = self._sequence
            batches[-1].events.append(event)
        return batches

    def _follow_up(
        self, click_ms: int, viewer: Viewer, row: int, answer: Responses, place: int, chance: np.float64
    ) -> None:
        stream_id, watch_s = self._streams.ids[row], float(answer.watch_s[place])
        self._add(click_ms, stream_id, viewer, joined=pb.Interaction(count=1))
        for until_s in _chunks(watch_s):
            seconds = until_s % _WATCHED_EVERY_S or _WATCHED_EVERY_S
            self._add(click_ms + int(until_s * 1000), stream_id, viewer, watched=pb.Watched(seconds=seconds))
        meanwhile_ms = click_ms + int(chance * watch_s * 1000)
        if answer.spent_minor[place]:
            currency = self._streams.market_of(row).currency
            money = pb.Money(amount_minor=int(answer.spent_minor[place]), currency=currency)
            self._add(meanwhile_ms, stream_id, viewer, purchased=money)
        if answer.reported[place]:
            reason = REPORT_REASONS[int(chance * len(REPORT_REASONS))]
            self._add(meanwhile_ms, stream_id, viewer, reported=pb.Reported(reason=reason))
        self._add(click_ms + int(watch_s * 1000), stream_id, viewer, left=pb.Interaction(count=1))

    def _add(self, at_ms: int, stream_id: str, viewer: Viewer, epoch: int = 0, **payload: Any) -> None:
        event = pb.Event(stream_id=stream_id, epoch=epoch, event_time_ms=at_ms, viewer_id=viewer.viewer_id, **payload)
        self._made += 1
        heapq.heappush(self._due, (at_ms, self._made, event))


def _chunks(watch_s: float) -> NDArray[np.float64]:
    """When players tell of watching, seconds after the click: every ten seconds, and at the end."""
    whole = np.arange(_WATCHED_EVERY_S, watch_s, _WATCHED_EVERY_S)
    return np.append(whole, watch_s) if watch_s > 0 else whole
