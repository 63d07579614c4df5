"""Producers that behave as badly as real ones: flapping streams, stalled encoders, skewed clocks, late,
duplicated, reordered and fenced events, batches sent again when the server went away."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
from liverank.v1 import ingest_pb2 as pb
from liverank.v1 import ingest_pb2_grpc

from loadtest.liveness.history import ENDED, HEARTBEAT, STARTED, VIEWERS, BatchSent, EventSent, History, Moment

CHANNEL_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.use_local_subchannel_pool", 1),
)
RETRY_S = 0.05
ACK_WITHIN_S = 10.0
KEPT_FOR_RESEND = 50


def to_message(batch: BatchSent) -> pb.EventBatch:
    """The batch as it goes over the wire."""
    events = []
    for sent in batch.events:
        event = pb.Event(
            sequence=sent.sequence, stream_id=sent.stream_id, epoch=sent.epoch, event_time_ms=sent.event_ms
        )
        if sent.kind == STARTED:
            event.started.creator_id = f"creator of {sent.stream_id}"
            event.started.category = f"category {sum(sent.stream_id.encode()) % 8}"
        elif sent.kind == HEARTBEAT:
            event.heartbeat.media_sequence = sent.value
        elif sent.kind == ENDED:
            event.ended.reason = "creator"
        else:
            event.viewer_count.count = sent.value
        events.append(event)
    return pb.EventBatch(producer_id=batch.producer_id, events=events)


class Outlet:
    """One Publish call at a time, reopened as often as it breaks. Used by one thread."""

    def __init__(self, address: str, history: History) -> None:
        self._history = history
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._outbox: queue.SimpleQueue[pb.EventBatch | None] = queue.SimpleQueue()
        self._acks: Iterator[pb.PublishAck] | None = None

    def send(self, producer_id: str, events: tuple[EventSent, ...], recorded: bool = True) -> BatchSent | None:
        """Sends once; None when no acknowledgement came. On record either way."""
        batch = BatchSent(producer_id, events, Moment.now())
        if recorded:
            self._history.batches.append(batch)
        try:
            if self._acks is None:
                self._outbox = queue.SimpleQueue()
                stub = ingest_pb2_grpc.IngestStub(self._channel)
                self._acks = stub.Publish(iter(self._outbox.get, None))
            self._outbox.put(to_message(batch))
            ack = next(self._acks)
        except (grpc.RpcError, StopIteration):
            self._history.failed_calls += 1
            self._hang_up()
            return None
        batch.offset = ack.offset
        batch.codes = {rejected.index: rejected.code for rejected in ack.rejected}
        batch.acked = Moment.now()  # last: from here on it counts
        return batch

    def _hang_up(self) -> None:
        self._outbox.put(None)
        self._acks = None

    def close(self) -> None:
        self._hang_up()
        self._channel.close()


@dataclass
class _Stream:
    stream_id: str
    epoch: int = 0
    live: bool = False
    media: int = 0
    mood: str = "flows"  # or stalled (heartbeats without progress), silent
    mood_until_s: float = 0.0
    beat_s: float = 0.0


class Producer:
    """One producer with its own streams. ``run`` until ``stop`` is set; every batch is on record.

    Args:
        skew_ms: how far its clock is ahead of the machine's. pause_s: between batches.

    Attributes:
        stop: ends `run` after the batch in progress. calm: no lapses, flaps and late events from now on.
    """

    def __init__(
        self, name: str, address: str, history: History, n_streams: int, lease_ms: int, skew_ms: int, seed: int,
        pause_s: float,
    ) -> None:  # fmt: skip
        self.name, self._history, self._lease_s, self._skew_ms = name, history, lease_ms / 1000, skew_ms
        self._outlet = Outlet(address, history)
        self._streams = [_Stream(f"{name}-{i:03}") for i in range(n_streams)]
        self._random = random.Random(seed)
        self._pause_s = pause_s
        self._sequence = time.time_ns() // 1_000
        self._sent: list[EventSent] = []  # accepted, newest last
        self.stop = threading.Event()
        self.calm = threading.Event()

    @property
    def stream_ids(self) -> list[str]:
        return [stream.stream_id for stream in self._streams]

    def run(self) -> None:
        """Until stopped. A batch that was not acknowledged is sent again until it is."""
        pending: tuple[EventSent, ...] = ()
        while not self.stop.is_set() or pending:
            pending = pending or tuple(self._make())
            if not pending:
                self.stop.wait(self._pause_s)
                continue
            batch = self._outlet.send(self.name, pending)
            if batch is None:
                if self.stop.is_set():
                    break
                time.sleep(RETRY_S)
                continue
            self._sent += [event for i, event in enumerate(pending) if i not in batch.codes]
            del self._sent[:-KEPT_FOR_RESEND]
            pending = ()
            if self._sent and self._random.random() < 0.03:
                self.resend(2)
            self.stop.wait(self._pause_s)
        self._outlet.close()

    def resend(self, count: int) -> None:
        """Sends acknowledged events once more: their sequence must be known, across restarts too."""
        again = tuple(self._sent[-count:])
        batch = self._outlet.send(self.name, again, recorded=False)
        if batch is not None:
            self._history.resent += [(event, batch.codes.get(i, 0)) for i, event in enumerate(again)]

    def _make(self) -> list[EventSent]:
        now_s, chance = time.monotonic(), self._random.random
        events: list[EventSent] = []
        for stream in self._streams:
            if not stream.live:
                if chance() < 0.05 or stream.epoch == 0 or self.calm.is_set():
                    stream.epoch, stream.live, stream.media, stream.beat_s = stream.epoch + 1, True, 0, now_s
                    stream.mood, stream.mood_until_s = "flows", now_s + chance() * self._lease_s
                    events.append(self._event(stream, STARTED))
                continue
            if self.calm.is_set():
                stream.mood = "flows"
            elif now_s > stream.mood_until_s:
                stream.mood = self._random.choices(("flows", "stalled", "silent"), (6, 2, 1))[0]
                stream.mood_until_s = now_s + (0.5 + 2 * chance()) * self._lease_s
            if now_s - stream.beat_s > self._lease_s / 5 and stream.mood != "silent":
                stream.beat_s = now_s
                stream.media += stream.mood == "flows"
                events.append(self._event(stream, HEARTBEAT, stream.media))
                if chance() < 0.3:
                    events.append(self._event(stream, VIEWERS, 1 + int(chance() * 1_000)))
            if chance() < 0.004 and not self.calm.is_set():
                events.append(self._event(stream, ENDED))
                stream.live = False
        if not self.calm.is_set():
            self._disturb(events)
        return events

    def _disturb(self, events: list[EventSent]) -> None:
        """Late events of sessions that are over, and events in the wrong order."""
        stream = self._random.choice(self._streams)
        if stream.epoch > 1 and self._random.random() < 0.15:
            kind = self._random.choice((STARTED, HEARTBEAT, ENDED))
            events.append(self._event(stream, kind, 1_000_000, epoch=stream.epoch - 1))
        elif not stream.live and stream.epoch and self._random.random() < 0.3:
            events.append(self._event(stream, HEARTBEAT, 1_000_000))
        if self._random.random() < 0.1:
            beats = [e for e in events if e.kind == HEARTBEAT]
            self._random.shuffle(beats)
            events[:] = [e for e in events if e.kind != HEARTBEAT] + beats

    def _event(self, stream: _Stream, kind: str, value: int = 0, epoch: int = 0) -> EventSent:
        self._sequence += 1
        event_ms = time.time_ns() // 1_000_000 + self._skew_ms
        return EventSent(self._sequence, stream.stream_id, epoch or stream.epoch, kind, event_ms, value)
