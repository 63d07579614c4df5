"""Freshness as a caller sees it: a stream is started, looked for until it shows, ended, looked for again."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
import numpy as np
from liverank.v1 import ingest_pb2, ingest_pb2_grpc, liveness_pb2, liveness_pb2_grpc, ranking_pb2, ranking_pb2_grpc

VISIBLE_WITHIN_S = 10.0
_LOOK_EVERY_S = 0.005


@dataclass
class Freshness:
    """Seconds, an entry per probe; NaN where it did not happen in time. begun_s: from the begin of the run.

    start_acked_s: start sent to acknowledged. visible_s: acknowledged to the arrival of the first reply that has it.
    end_acked_s: end sent to acknowledged: from then on no later request may see it. gone_s: acknowledged to the
    arrival of the first reply without it, asked for after the acknowledgement. told_s: acknowledged to WatchEnded's
    word (negative: it came before). shed: looks that were turned away and repeated; the waiting counts.
    """

    begun_s: list[float] = field(default_factory=list)
    start_acked_s: list[float] = field(default_factory=list)
    visible_s: list[float] = field(default_factory=list)
    end_acked_s: list[float] = field(default_factory=list)
    gone_s: list[float] = field(default_factory=list)
    told_s: list[float] = field(default_factory=list)
    never_visible: int = 0
    never_told: int = 0
    shown_after_end: int = 0
    shed: int = 0
    failure: str = ""


class Prober:
    """A thread with its own Publish stream. The probes' creators are followed by the one who looks for them.

    Args:
        on_end: told (stream id, monotonic seconds) of each acknowledged end.
    """

    def __init__(
        self, channel: grpc.Channel, prefix: str, dim: int, every_s: float, on_end: Callable[[str, float], None]
    ) -> None:
        self.seen = Freshness()
        self._prefix, self._dim, self._every_s, self._on_end = prefix, dim, every_s, on_end
        self._rng = np.random.default_rng(11)
        self._rank = ranking_pb2_grpc.RankingStub(channel).Rank
        self._watch = liveness_pb2_grpc.LivenessStub(channel).WatchEnded(liveness_pb2.WatchEndedRequest())
        self._told: queue.SimpleQueue[tuple[str, float]] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[ingest_pb2.EventBatch | None] = queue.SimpleQueue()
        self._acks = ingest_pb2_grpc.IngestStub(channel).Publish(iter(self._outbox.get, None))
        self._sequence = 0
        self._stop = threading.Event()
        self._listener = threading.Thread(target=self._listen, name="ends", daemon=True)
        self._thread = threading.Thread(target=self._run, name="prober", daemon=True)
        self._begun_s = 0.0

    def start(self, begun_s: float) -> None:
        """Probes from now on; ``begun_s``: of the run, monotonic."""
        self._begun_s = begun_s
        self._watch.initial_metadata()  # from here on no end is missed
        self._listener.start()
        self._thread.start()

    def stop(self) -> None:
        """Finishes the probe in progress."""
        self._stop.set()
        self._thread.join(VISIBLE_WITHIN_S + 2.0)
        if self._thread.is_alive():
            self._acks.cancel()  # the server hangs; the probe fails, and says so
            self._thread.join(10.0)

    def close(self) -> None:
        """After `stop`, or without a start."""
        self._outbox.put(None)
        self._watch.cancel()
        if self._listener.is_alive():
            self._listener.join(5.0)

    def _run(self) -> None:
        number, next_s = 0, max(self._begun_s, time.monotonic())
        try:
            self._stop.wait(max(0.0, next_s - time.monotonic()))
            while not self._stop.is_set():
                self._probe(number)
                number += 1
                next_s = max(next_s + self._every_s, time.monotonic())
                self._stop.wait(max(0.0, next_s - time.monotonic()))
        except grpc.RpcError as error:  # told in the record: the run is not sound
            self.seen.failure = f"probe {number}: {error.code().name}: {error.details()}"
        except (StopIteration, RuntimeError) as error:
            self.seen.failure = f"probe {number}: {error or 'Publish ended early'}"

    def _probe(self, number: int) -> None:
        stream, creator = f"{self._prefix}-{number}", f"{self._prefix}-creator-{number}"
        embedding = self._rng.standard_normal(self._dim).tolist() if self._dim else []
        start = ingest_pb2.Event(stream_id=stream, epoch=1, event_time_ms=int(time.time() * 1000))
        start.started.creator_id, start.started.title = creator, "A probe of the load test"
        start.started.embedding.extend(embedding)
        request = ranking_pb2.RankRequest(
            viewer_id=self._prefix, followed_creator_ids=[creator], viewer_embedding=embedding, limit=50
        )
        self.seen.begun_s.append(time.monotonic() - self._begun_s)
        taken_s, acked_s = self._publish(start)
        self.seen.start_acked_s.append(taken_s)
        while not self._shows(stream, request):
            if time.monotonic() - acked_s > VISIBLE_WITHIN_S:
                self.seen.never_visible += 1
                self.seen.visible_s.append(float("nan"))
                break
            self._stop.wait(_LOOK_EVERY_S)
        else:
            self.seen.visible_s.append(time.monotonic() - acked_s)
        end = ingest_pb2.Event(stream_id=stream, epoch=1, event_time_ms=int(time.time() * 1000))
        end.ended.reason = "creator"
        taken_s, acked_s = self._publish(end)
        self._on_end(stream, acked_s)
        self.seen.end_acked_s.append(taken_s)
        while self._shows(stream, request):
            self.seen.shown_after_end += 1  # asked for after the acknowledgement: must not happen
            if time.monotonic() - acked_s > VISIBLE_WITHIN_S:
                self.seen.gone_s.append(float("nan"))
                return
        self.seen.gone_s.append(time.monotonic() - acked_s)
        self._await_word(stream, acked_s)

    def _await_word(self, stream: str, acked_s: float) -> None:
        while True:
            try:
                told, told_s = self._told.get(timeout=max(0.0, acked_s + 5.0 - time.monotonic()))
            except queue.Empty:
                self.seen.never_told += 1
                return
            if told == stream:
                self.seen.told_s.append(told_s - acked_s)
                return

    def _shows(self, stream: str, request: ranking_pb2.RankRequest) -> bool:
        return any(s.stream_id == stream for s in self._answer(request).streams)

    def _answer(self, request: ranking_pb2.RankRequest) -> ranking_pb2.RankResponse:
        """A reply; asks again when it is turned away, after as long as the server wants."""
        ends_s = time.monotonic() + VISIBLE_WITHIN_S
        while True:
            try:
                reply: ranking_pb2.RankResponse = self._rank(request, timeout=5.0)
                return reply
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED or time.monotonic() > ends_s:
                    raise
                self.seen.shed += 1
                asked = dict(error.trailing_metadata() or ()).get("grpc-retry-pushback-ms", "")
                time.sleep(int(asked) / 1000 if asked.isdigit() else _LOOK_EVERY_S)

    def _publish(self, event: ingest_pb2.Event) -> tuple[float, float]:
        """(seconds to the acknowledgement, when it came)."""
        self._sequence += 1
        event.sequence = self._sequence
        sent_s = time.monotonic()
        self._outbox.put(ingest_pb2.EventBatch(producer_id=self._prefix, events=[event]))
        ack = next(self._acks)
        acked_s = time.monotonic()
        if ack.rejected:
            raise RuntimeError(f"the server refused a probe's event: {ack.rejected[0].message}")
        return acked_s - sent_s, acked_s

    def _listen(self) -> None:
        try:
            for end in self._watch:
                if end.stream_id.startswith(self._prefix):
                    self._told.put((end.stream_id, time.monotonic()))
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.CANCELLED:
                self.seen.failure = self.seen.failure or f"WatchEnded: {error.code().name}: {error.details()}"
