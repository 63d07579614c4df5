"""The platform's side of the demo: publishes the simulated world in real time and times its ends."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import grpc
import numpy as np
from liverank.v1 import ingest_pb2 as pb
from liverank.v1 import ingest_pb2_grpc as pb_grpc
from liverank.v1 import ranking_pb2

from loadtest.world import Viewer, World
from loadtest.world.feedback import Feedback

Session = tuple[str, int]
"""(stream id, epoch)"""
ON_SCREEN = 8
"""Streams of a reply that a viewer's screen has room for."""


class Platform:
    """Steps the world once per simulated second of real time and publishes what happened.

    Attributes, for other threads to read:
        ended_at: when the end of a session was acknowledged, monotonic seconds.
        end_to_gone_ms: per end event, sent to acknowledged (from then on no reply contains it).
    """

    def __init__(self, world: World, channel: grpc.Channel) -> None:
        self.world = world
        self.lock = threading.Lock()
        """Held while the world moves; whoever asks it for the truth takes it."""
        self.feedback = Feedback(world.viewing, world.streams, ON_SCREEN)
        self.ended_at: dict[Session, float] = {}
        self.end_to_gone_ms: list[float] = []
        self.applied = 0
        self.rejected: Counter[str] = Counter()
        self.failure: Exception | None = None
        self._outbox: queue.SimpleQueue[pb.EventBatch | None] = queue.SimpleQueue()
        self._acks: Iterator[pb.PublishAck] = pb_grpc.IngestStub(channel).Publish(self._sent())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="platform", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the stream of events and waits for the thread."""
        self._stop.set()
        self._thread.join(10)

    def title(self, stream_id: str) -> str:
        """The title its creator gave it."""
        return self.world.streams.titles[int(self.world.streams.rows_of([stream_id])[0])]

    def seen(self, viewer: Viewer, reply: ranking_pb2.RankResponse, rng: np.random.Generator) -> None:
        """A viewer looks at a reply; the impressions, and what comes of them, are published in time."""
        with self.lock:
            self.feedback.seen(viewer, reply, rng)

    def _sent(self) -> Iterator[pb.EventBatch]:
        while (batch := self._outbox.get()) is not None:
            yield batch

    def _run(self) -> None:
        try:
            self._publish_until(self._stop.is_set)
        except (grpc.RpcError, StopIteration) as error:  # told to the main thread, which fails the demo
            self.failure = error
        finally:
            self._outbox.put(None)

    def _publish_until(self, stopped: Callable[[], bool]) -> None:
        next_s = time.monotonic()
        while not stopped():
            with self.lock:
                batches = self.world.step().to_batches() + self.feedback.due(int(time.time() * 1000))
            for batch in batches:
                self._publish(batch)
            next_s += self.world.settings.step_ms / 1000
            self._stop.wait(max(0.0, next_s - time.monotonic()))

    def _publish(self, batch: pb.EventBatch) -> None:
        sent_s = time.monotonic()
        self._outbox.put(batch)
        ack = next(self._acks)
        acked_s = time.monotonic()
        refused = {r.index for r in ack.rejected}
        self.applied += ack.accepted
        self.rejected.update(pb.RejectCode.Name(r.code) for r in ack.rejected)
        for i, event in enumerate(batch.events):
            if event.WhichOneof("payload") == "ended" and i not in refused:
                self.ended_at[event.stream_id, event.epoch] = acked_s
                self.end_to_gone_ms.append((acked_s - sent_s) * 1000)
