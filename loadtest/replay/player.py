"""Plays a history against a server: a batch per minute of the file, a feed every five."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from liverank.v1 import ingest_pb2 as pb
from liverank.v1 import ranking_pb2
from numpy.typing import NDArray

from loadtest.replay.connection import Connection
from loadtest.replay.growth import BIN_S, bins
from loadtest.replay.reader import History, Kind
from loadtest.replay.sessions import Sessions, minute_end
from server.clock import ManualClock

BASE_MS = 1_767_225_600_000
"""The Unix ms at which the file's clock shows 0: a full day (2026-01-01), the same in every run."""

FEED_LIMIT = 100
"""Streams asked for: enough to find ten among them that the truth can tell something about."""

MAX_CREATOR_BYTES = MAX_CATEGORY_BYTES = 64


@dataclass
class Tally:
    """What happened. Events are messages, of which a row of the file becomes one to five.

    rejected: events by reject code. lost: events that were neither accepted nor rejected. shown_after_end: places in
    feeds held by a stream, or session, whose end had been acknowledged. answered_by: feeds by model version.
    """

    events: int = 0
    accepted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    feeds: int = 0
    shown_after_end: int = 0
    peak_live: int = 0
    answered_by: Counter[str] = field(default_factory=Counter)

    @property
    def lost(self) -> int:
        return self.events - self.accepted - sum(self.rejected.values())


@dataclass(frozen=True)
class Rig:
    """What a player plays on.

    clock: the server's. refresh: scores and rules become those of the clock's moment. pace: told each moment
    (s of the file) before it is played; may wait.
    """

    connection: Connection
    clock: ManualClock
    refresh: Callable[[], None]
    pace: Callable[[int], None]


class Player:
    """Delivers every row at the first full minute not before it, with the clock at that minute.

    Args:
        max_batch: events per batch at most.
        on_feed: given (t_s, stream int32[<= FEED_LIMIT]), best first, at each full 5 minutes.
    """

    def __init__(
        self,
        history: History,
        sessions: Sessions,
        rig: Rig,
        surface: str,
        max_batch: int,
        on_feed: Callable[[int, NDArray[np.int32]], None],
    ) -> None:
        self._history, self._sessions, self._rig = history, sessions, rig
        self._surface, self._max_batch, self._on_feed = surface, max_batch, on_feed
        self._index = {name: i for i, name in enumerate(history.ids)}
        self._epoch = np.zeros(len(history.ids), np.int64)  # of the newest session that was acknowledged
        self._over = np.zeros(len(history.ids), np.bool_)  # and whether its end was
        self._sequence = 0
        self.tally = Tally()

    def play(self) -> Tally:
        """Plays the whole file. Raises grpc.RpcError when the server does not answer."""
        delivered_s = minute_end(self._history.t_s)
        asked = bins(int(self._history.t_s[0]), int(delivered_s[-1]))
        for moment_s in np.union1d(delivered_s, np.array(asked, np.int64)).tolist():
            self._rig.pace(moment_s)
            self._rig.clock.set(BASE_MS + moment_s * 1000)
            first, end = np.searchsorted(delivered_s, [moment_s, moment_s + 1]).tolist()
            if end > first:
                self._deliver(first, end)
            if moment_s % BIN_S == 0:
                self._ask(moment_s)
        return self.tally

    def _deliver(self, first: int, end: int) -> None:
        """Publishes rows [first, end) and waits until all are acknowledged; only then are their ends known."""
        events = [event for row in range(first, end) for event in events_of(self._history, self._sessions, row)]
        for event in events:
            self._sequence += 1
            event.sequence = self._sequence
        for begin in range(0, len(events), self._max_batch):
            batch = events[begin : begin + self._max_batch]
            ack = self._rig.connection.publish(batch)
            self.tally.events += len(batch)
            self.tally.accepted += ack.accepted
            self.tally.rejected.update(pb.RejectCode.Name(rejected.code) for rejected in ack.rejected)
        for row in range(first, end):
            stream = self._history.stream[row]
            if self._sessions.opens[row]:
                self._over[stream] = False
            if self._history.kind[row] == Kind.END:
                self._over[stream] = True
            self._epoch[stream] = self._sessions.epoch[row]
        self.tally.peak_live = max(self.tally.peak_live, self._rig.connection.live())

    def _ask(self, moment_s: int) -> None:
        self._rig.refresh()
        reply = self._rig.connection.rank(f"replay-{moment_s}", self._surface, FEED_LIMIT)
        shown = self._check(reply)
        self.tally.feeds += 1
        self.tally.answered_by[reply.model_version] += 1
        self._on_feed(moment_s, shown)

    def _check(self, reply: ranking_pb2.RankResponse) -> NDArray[np.int32]:
        """The streams of a feed, int32[n]; counts those that were over."""
        shown = np.array([self._index[ranked.stream_id] for ranked in reply.streams], np.int32)
        epochs = np.array([ranked.epoch for ranked in reply.streams], np.int64)
        self.tally.shown_after_end += int((self._over[shown] | (epochs < self._epoch[shown])).sum())
        return shown


def events_of(history: History, sessions: Sessions, row: int) -> list[pb.Event]:
    """What a row says in the API's words, in order, without sequence numbers.

    A snapshot that arrived proves that media flowed in that minute, so it is a heartbeat too.
    """
    stream, epoch, kind = int(history.stream[row]), int(sessions.epoch[row]), history.kind[row]
    payloads: list[dict[str, Any]] = []
    if sessions.opens[row]:
        payloads.append(
            {
                "started": pb.Started(
                    creator_id=cut(history.creators[stream], MAX_CREATOR_BYTES),
                    category=cut(history.categories[stream], MAX_CATEGORY_BYTES),
                )
            }
        )
    if kind == Kind.SNAPSHOT:
        payloads.append({"heartbeat": pb.Heartbeat(media_sequence=int(sessions.media[row]))})
        payloads.append({"viewer_count": pb.ViewerCount(count=int(history.viewers[row]))})
    if kind != Kind.END:  # a session that is over counts nothing any more
        if history.likes[row] > 0:
            payloads.append({"liked": pb.Interaction(count=int(history.likes[row]))})
        if history.chats[row] > 0:
            payloads.append({"chatted": pb.Interaction(count=int(history.chats[row]))})
    else:
        payloads.append({"ended": pb.Ended(reason="creator")})
    at_ms, name = BASE_MS + int(history.t_s[row]) * 1000, history.ids[stream]
    return [pb.Event(stream_id=name, epoch=epoch, event_time_ms=at_ms, **payload) for payload in payloads]


def cut(text: str, max_bytes: int) -> str:
    """The text, or as many of its first characters as fit: names of channels can be longer than an id may be."""
    return text.encode()[:max_bytes].decode(errors="ignore")
