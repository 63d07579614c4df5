"""The streams that a load brings along: their starts, heartbeats, what viewers do there, and their ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from liverank.v1 import ingest_pb2 as pb
from numpy.typing import NDArray

LANGUAGES, CATEGORIES = ("en", "de", "fr", "ja", "id"), tuple(f"category-{i}" for i in range(20))
_CREATORS_SHARE = 0.8  # distinct creators per stream

_Payload = Callable[[np.random.Generator], dict[str, Any]]


def _one(kind: str) -> _Payload:
    return lambda rng: {kind: pb.Interaction(count=1)}


def _money(kind: str, currency: str) -> _Payload:
    return lambda rng: {kind: pb.Money(amount_minor=int(rng.integers(100, 20_000)), currency=currency)}


_PAYLOADS: dict[str, _Payload] = {
    "viewer_count": lambda rng: {"viewer_count": pb.ViewerCount(count=int(rng.pareto(1.2) * 20) % 1_000_000)},
    "joined": lambda rng: {"joined": pb.Interaction(count=1), "viewer_id": f"viewer-{rng.integers(1_000_000)}"},
    "watched": lambda rng: {"watched": pb.Watched(seconds=float(rng.random() * 60))},
    "bid": _money("bid", "EUR"),
    "purchased": _money("purchased", "USD"),
    "reported": lambda rng: {"reported": pb.Reported(reason="spam")},
    **{kind: _one(kind) for kind in ("left", "chatted", "liked", "followed", "shared")},
}


def zipf_draws(count: int, exponent: float, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """int64[n] of 0 … count − 1, where i is drawn in proportion to 1 / (i + 1) ** exponent; 0: all alike."""
    shares = np.cumsum(1.0 / np.arange(1, count + 1) ** exponent)
    return np.searchsorted(shares, rng.random(n) * shares[-1], side="right").clip(max=count - 1)


class Fleet:
    """Streams of one producer. Every method returns Events without sequence numbers; the publisher gives them.

    Used by one thread. Times are Unix epoch, ms.

    Args:
        prefix: of all stream ids; unique per run, so that they never meet a server's other streams.
        dim: of the embeddings; 0: none.
        zipf: exponent of the streams' popularity.
    """

    def __init__(self, prefix: str, heartbeat_ms: int, dim: int, zipf: float, rng: np.random.Generator) -> None:
        self._prefix, self._heartbeat_ms, self._dim, self._zipf, self._rng = prefix, heartbeat_ms, dim, zipf, rng
        self._started = 0
        self.live: list[int] = []
        """Numbers of the streams that are live, most popular first."""
        self._next_heartbeat_ms: dict[int, int] = {}

    def stream_id(self, number: int) -> str:
        return f"{self._prefix}-{number}"

    @property
    def started(self) -> int:
        """Streams ever started: their numbers are 0 … started − 1."""
        return self._started

    def starts(self, count: int, now_ms: int) -> list[pb.Event]:
        """``count`` new streams go live, less popular than all before."""
        events = []
        for number in range(self._started, self._started + count):
            start = pb.Event(stream_id=self.stream_id(number), epoch=1, event_time_ms=now_ms)
            start.started.creator_id = f"{self._prefix}-creator-{int(number * _CREATORS_SHARE)}"
            start.started.title = f"Load test stream {number}"
            start.started.language = LANGUAGES[number % len(LANGUAGES)]
            start.started.category = CATEGORIES[number % len(CATEGORIES)]
            if self._dim:
                start.started.embedding.extend(self._rng.standard_normal(self._dim).tolist())
            events.append(start)
            # Spread over the period, or all heartbeats would come at once for ever.
            self._next_heartbeat_ms[number] = now_ms + int(self._rng.integers(1, self._heartbeat_ms + 1))
            self.live.append(number)
        self._started += count
        return events

    def heartbeats(self, now_ms: int) -> list[pb.Event]:
        """Proof of media of every stream whose time has come."""
        due = [number for number in self.live if self._next_heartbeat_ms[number] <= now_ms]
        events = []
        for number in due:
            self._next_heartbeat_ms[number] = now_ms + self._heartbeat_ms
            beat = pb.Heartbeat(media_sequence=now_ms)
            events.append(pb.Event(stream_id=self.stream_id(number), epoch=1, event_time_ms=now_ms, heartbeat=beat))
        return events

    def deeds(self, n: int, mix: Mapping[Any, float], now_ms: int) -> list[pb.Event]:
        """``n`` events of the kinds in ``mix`` (by weight) on live streams (by popularity); none when none is live."""
        if not n or not self.live:
            return []
        kinds, weights = list(mix), np.array(list(mix.values()))
        drawn = self._rng.choice(len(kinds), n, p=weights / weights.sum())
        rows = zipf_draws(len(self.live), self._zipf, n, self._rng)
        return [self._deed(self.live[row], kinds[kind], now_ms) for row, kind in zip(rows, drawn, strict=True)]

    def crowd(self, place: int, joins: int, chats: int, now_ms: int) -> list[pb.Event]:
        """Joins of distinct viewers and chats on the stream at ``place`` (from 1, or the last one there is)."""
        if not self.live:
            return []
        number = self.live[min(place, len(self.live)) - 1]
        return [self._deed(number, "joined", now_ms) for _ in range(joins)] + [
            self._deed(number, "chatted", now_ms) for _ in range(chats)
        ]

    def ends(self, share: float, now_ms: int) -> list[pb.Event]:
        """A share of the live streams, at least one, is over; which, is drawn at random."""
        if not self.live:
            return []
        count = max(1, round(share * len(self.live)))
        over = set(self._rng.choice(self.live, count, replace=False).tolist())
        self.live = [number for number in self.live if number not in over]
        return [
            pb.Event(stream_id=self.stream_id(number), epoch=1, event_time_ms=now_ms, ended=pb.Ended(reason="creator"))
            for number in sorted(over)
        ]

    def _deed(self, number: int, kind: str, now_ms: int) -> pb.Event:
        return pb.Event(stream_id=self.stream_id(number), event_time_ms=now_ms, **_PAYLOADS[kind](self._rng))


def numbered(events: Sequence[pb.Event], first: int) -> int:
    """Gives the events sequence numbers from ``first`` on; returns the next free one."""
    for place, event in enumerate(events):
        event.sequence = first + place
    return first + len(events)
