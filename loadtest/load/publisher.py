"""Publishes a fleet's events on a schedule, and times every acknowledgement from when its batch was due."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import grpc
from liverank.v1 import ingest_pb2 as pb
from liverank.v1 import ingest_pb2_grpc as pb_grpc

from loadtest.load.fleet import Fleet, numbered
from loadtest.load.schedule import Schedule

STEP_S = 0.1
MAX_BATCH_EVENTS = 2_000
Deed = Callable[[Fleet, int], list[pb.Event]]
"""(fleet, now_ms) → events; runs in the publisher's thread, the only one that may touch the fleet."""


@dataclass
class Published:
    """What was sent on schedule, and what was acknowledged; lists have an entry per batch.

    due_s: from the begin of the run. latency_s: due to acknowledged, and events: accepted ones, of as many of the first
    batches as were acknowledged.
    """

    due_s: list[float] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    sent: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    failure: str = ""


@dataclass(frozen=True)
class _Sent:
    batch: pb.EventBatch
    due_s: float
    done: Future[float]
    counted: bool


@dataclass
class Crowd:
    """A raid: joins and chats on the stream at ``place`` between two times (monotonic), and how many went so far."""

    begin_s: float
    end_s: float
    place: int
    joins: int
    chats: int
    joined: int = 0
    chatted: int = 0

    def due(self, at_s: float) -> tuple[int, int]:
        """Joins and chats that became due since the last call; all calls together give all of them."""
        share = min(1.0, max(0.0, (at_s - self.begin_s) / (self.end_s - self.begin_s)))
        joins, chats = round(self.joins * share) - self.joined, round(self.chats * share) - self.chatted
        self.joined, self.chatted = self.joined + joins, self.chatted + chats
        return joins, chats


class Publisher:
    """One Publish stream and two threads: one makes events become due, one reads acknowledgements.

    A slow server does not slow the schedule down: its batches queue, and their waiting counts.

    Attributes:
        ended_at: stream id → when its end was acknowledged, monotonic seconds.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        producer: str,
        fleet: Fleet,
        rate: Schedule,
        mix_at: Callable[[float], Mapping[Any, float]],
    ) -> None:
        self.fleet, self.producer = fleet, producer
        self.seen = Published()
        self.ended_at: dict[str, float] = {}
        self._rate, self._mix_at = rate, mix_at
        self._next_sequence = 1
        self._commands: queue.SimpleQueue[tuple[Deed, Future[float]]] = queue.SimpleQueue()
        self._crowds: list[Crowd] = []
        self._outbox: queue.SimpleQueue[_Sent | None] = queue.SimpleQueue()
        self._unacked: queue.SimpleQueue[_Sent | None] = queue.SimpleQueue()
        self._call = pb_grpc.IngestStub(channel).Publish(self._outgoing())
        self._refused_aside: Counter[str] = Counter()  # of what is not on schedule
        self._stop = threading.Event()
        self._begun_s = 0.0
        self._reader = threading.Thread(target=self._read, name="acknowledgements", daemon=True)
        self._maker = threading.Thread(target=self._make, name="publisher", daemon=True)
        self._reader.start()

    def now(self, deed: Deed, within_s: float = 60.0) -> float:
        """Before `start`: publishes what ``deed`` makes and waits for the acknowledgement; its latency, seconds.

        Raises:
            RuntimeError: an event was refused, or the call failed.
        """
        done: Future[float] = Future()
        self._publish(deed(self.fleet, _now_ms()), time.monotonic(), done, counted=False)
        taken_s = done.result(within_s)
        if self._refused_aside:
            raise RuntimeError(f"the server refused events: {dict(self._refused_aside)}")
        return taken_s

    def start(self, begun_s: float) -> None:
        """Begins the schedule at ``begun_s`` (monotonic)."""
        self._begun_s = begun_s
        self._maker.start()

    def soon(self, deed: Deed) -> Future[float]:
        """Has ``deed`` published with the next step; the future gets the latency of the acknowledgement.

        Raises:
            RuntimeError: publishing has failed.
        """
        if self.seen.failure:
            raise RuntimeError(self.seen.failure)
        done: Future[float] = Future()
        self._commands.put((deed, done))
        return done

    def raid(self, place: int, joins: int, chats: int, over_s: float) -> None:
        """From the next step on, a crowd arrives at one stream."""
        begin_s = time.monotonic()
        crowd = Crowd(begin_s, begin_s + over_s, place, joins, chats)

        def arrive(fleet: Fleet, now_ms: int) -> list[pb.Event]:
            self._crowds.append(crowd)
            return []

        self.soon(arrive)

    def stop(self, within_s: float = 10.0) -> None:
        """Ends all streams of the fleet, waits for what is not acknowledged, closes the stream of events."""
        self._stop.set()
        if self._maker.is_alive():
            self._maker.join(within_s)
        if not self.seen.failure:
            done: Future[float] = Future()
            over = self.fleet.ends(1.0, _now_ms())
            if over:
                self._publish(over, time.monotonic(), done, counted=False)
        self._outbox.put(None)
        self._unacked.put(None)
        self._reader.join(within_s)
        if self._reader.is_alive():
            self._call.cancel()
            self.seen.failure = self.seen.failure or f"batches were not acknowledged within {within_s:.0f} s"
            self._reader.join(within_s)

    def _outgoing(self) -> Iterator[pb.EventBatch]:
        while (sent := self._outbox.get()) is not None:
            yield sent.batch

    def _make(self) -> None:
        step = published = 0
        while not self._stop.is_set() and not self.seen.failure:
            due_s = self._begun_s + step * STEP_S
            self._stop.wait(max(0.0, due_s - time.monotonic()))
            since_s = step * STEP_S
            within = since_s <= self._rate.duration_s + STEP_S / 2  # later there are heartbeats only, until `stop`
            now_ms = _now_ms()
            due = self._rate.due_by(since_s)
            events = self.fleet.heartbeats(now_ms) + self.fleet.deeds(due - published, self._mix_at(since_s), now_ms)
            published = due
            self._publish(events + self._arriving(due_s, now_ms), due_s, counted=within)
            while not self._commands.empty():
                deed, done = self._commands.get()
                self._publish(deed(self.fleet, _now_ms()), time.monotonic(), done)
            step += 1

    def _arriving(self, due_s: float, now_ms: int) -> list[pb.Event]:
        events: list[pb.Event] = []
        for crowd in self._crowds:
            events += self.fleet.crowd(crowd.place, *crowd.due(due_s), now_ms)
        self._crowds = [crowd for crowd in self._crowds if crowd.end_s > due_s]
        return events

    def _publish(
        self, events: list[pb.Event], due_s: float, done: Future[float] | None = None, counted: bool = True
    ) -> None:
        """In batches; ``done`` gets the latency of the last one's acknowledgement."""
        if not events and done is not None:
            done.set_result(0.0)
        for first in range(0, len(events), MAX_BATCH_EVENTS):
            part = events[first : first + MAX_BATCH_EVENTS]
            self._next_sequence = numbered(part, self._next_sequence)
            last = first + len(part) == len(events)
            batch = pb.EventBatch(producer_id=self.producer, events=part)
            sent = _Sent(batch, due_s, done if last and done else Future(), counted)
            if counted:
                self.seen.sent += len(part)
                self.seen.due_s.append(due_s - self._begun_s)
            self._unacked.put(sent)
            self._outbox.put(sent)

    def _read(self) -> None:
        sent: _Sent | None = None
        try:
            while (sent := self._unacked.get()) is not None:
                ack = next(self._call)
                acked_s = time.monotonic()
                refused = {r.index for r in ack.rejected}
                rejected = self.seen.rejected if sent.counted else self._refused_aside
                rejected.update(pb.RejectCode.Name(r.code) for r in ack.rejected)
                for place, event in enumerate(sent.batch.events):
                    if event.WhichOneof("payload") == "ended" and place not in refused:
                        self.ended_at[event.stream_id] = acked_s
                if sent.counted:
                    self.seen.latency_s.append(acked_s - sent.due_s)
                    self.seen.events.append(ack.accepted)
                sent.done.set_result(acked_s - sent.due_s)
        except (grpc.RpcError, StopIteration) as error:  # told in the record: the run is not sound
            told = f"{error.code().name}: {error.details()}" if isinstance(error, grpc.RpcError) else "ended early"
            self.seen.failure = self.seen.failure or f"Publish: {told}"
            failed = RuntimeError(self.seen.failure)
            while sent is not None:  # nobody waits for ever
                sent.done.set_exception(failed)
                sent = None if self._unacked.empty() else self._unacked.get()


def _now_ms() -> int:
    return int(time.time() * 1000)
