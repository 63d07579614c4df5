"""Changes that the server makes on somebody's behalf: they go through the log like any event."""

from __future__ import annotations

import threading
from concurrent.futures import Future

from liverank.v1 import ingest_pb2 as pb

from server.applier import PublishResult
from server.engine import Engine
from server.errors import NotFound, Refused
from server.live.events import decode_batch
from server.log.commit import TIME_PRODUCER, CommitPath, Submission

PRODUCER = "liverank-control"


def is_reserved(producer_id: str) -> bool:
    """Whether a server numbers its own events under this one (with Kafka each has a name of its own): nobody else may,
    or the sequences it uses up are the ones that blocks and reconciled ends would need."""
    return producer_id in (PRODUCER, TIME_PRODUCER) or producer_id.startswith(f"{PRODUCER}-")


class Control:
    """Publishes blocks, unblocks and reconciled ends as durable events. Thread-safe.

    Args:
        producer: no other server that writes to the same log may use it.
    """

    def __init__(self, engine: Engine, commit: CommitPath, producer: str = PRODUCER) -> None:
        self._engine, self._commit, self._producer = engine, commit, producer
        self._lock = threading.Lock()
        self._last_sequence = 0

    def moderate(self, stream_id: str, action: int) -> int:
        """Applies a Moderated action; returns its offset. Raises NotFound when the stream is unknown."""
        event = pb.Event(stream_id=stream_id, event_time_ms=self._engine.clock.now_ms())
        event.moderated.action = action  # type: ignore[assignment]
        result = self._publish([event])
        if result.codes[0] == pb.UNKNOWN_STREAM:
            raise NotFound(f"stream_id: {stream_id!r} was never started here, or is forgotten")
        if result.codes[0] != 0:  # a decision of trust & safety must never be lost quietly
            code = pb.RejectCode.Name(int(result.codes[0]))
            raise Refused(f"stream_id: {stream_id!r} was not moderated: {code}")
        return result.offset

    def end_streams(self, streams: list[tuple[str, int]], as_of_ms: int, reason: str) -> tuple[list[str], int]:
        """Ends sessions (stream_id, epoch) not renewed since ``as_of_ms``; returns the ids that ended, and the
        last offset (0: none).

        Whoever asks decided on a table of a moment ago. A session that ended or restarted in the meantime is
        left alone because its epoch fences it, one that was renewed because each end is conditional.
        """
        ended: list[str] = []
        offset = 0
        step = self._engine.settings.table.max_events_per_batch
        for start in range(0, len(streams), step):
            chunk = streams[start : start + step]
            events = []
            for stream_id, epoch in chunk:
                event = pb.Event(stream_id=stream_id, epoch=epoch, event_time_ms=as_of_ms)
                event.ended.reason = reason
                event.ended.only_if_not_renewed_since_ms = as_of_ms
                events.append(event)
            result = self._publish(events)
            offset = result.offset
            ended += [stream_id for (stream_id, _), code in zip(chunk, result.codes, strict=True) if code == 0]
        return ended, offset

    def _publish(self, events: list[pb.Event]) -> PublishResult:
        with self._lock:  # sequences must reach the log in order
            # Above everything a control batch of an earlier run used: each of those has a smaller offset.
            sequence = max(self._last_sequence, (self._engine.applier.offset + 1) << 20)
            for event in events:
                sequence += 1
                event.sequence = sequence
            self._last_sequence = sequence
            payload = pb.EventBatch(producer_id=self._producer, events=events).SerializeToString()
            batch = decode_batch(payload, self._engine.settings.table)
            assert not batch.rejected, batch.rejected
            done: Future[PublishResult] = Future()
            self._commit.submit(Submission(payload, batch, self._engine.clock.now_ms(), done))  # type: ignore[arg-type]
        return done.result()
