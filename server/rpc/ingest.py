"""Ingest: Publish."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future

import grpc
from liverank.v1 import ingest_pb2 as pb
from liverank.v1 import ingest_pb2_grpc as pb_grpc

from server.engine import Engine, PublishResult
from server.live.events import DecodedBatch, decode_batch
from server.log.commit import CommitPath, Submission
from server.recorder import Recorder
from server.rpc.slots import StreamSlots
from server.rpc.status import guarded_stream

_MESSAGES: dict[int, str] = {
    pb.TOO_LATE: "event_time_ms: older than the lateness bound of {max_lateness_ms} ms",
    pb.TOO_FAR_IN_FUTURE: "event_time_ms: more than {max_future_ms} ms ahead of the server's clock",
    pb.UNKNOWN_STREAM: "stream_id: never started here, or forgotten; send started first",
    pb.EPOCH_BACKWARDS: "epoch: lower than the stream's current epoch",
    pb.EPOCH_UNKNOWN: "epoch: higher than the current one, and its start was not seen; send started first",
    pb.STREAM_ENDED: "epoch: this session is over; end is final, start a higher epoch",
    pb.DUPLICATE_SEQUENCE: "sequence: already applied",
    pb.SEQUENCE_TOO_OLD: "sequence: more than 65,535 below this producer's highest",
    pb.CAPACITY: "the table is full ({capacity} rows); no live stream is evicted for a new one",
}


class IngestService(pb_grpc.IngestServicer):
    """Decodes batches, hands them to the log, and acknowledges in order what was made durable and applied."""

    def __init__(self, engine: Engine, commit: CommitPath, recorder: Recorder, slots: StreamSlots) -> None:
        self._engine, self._commit, self.recorder, self._slots = engine, commit, recorder, slots
        self._limits = engine.settings.table.model_dump()

    @guarded_stream
    def Publish(self, batches: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[pb.PublishAck]:
        """Takes the next batch only after the last was acknowledged: HTTP/2 flow control does the rest."""
        with self._slots.open("Publish", context) as place:
            for payload in batches:
                with self._slots.answering(place):
                    batch, done = self.submit(payload)
                    yield self._acknowledge(batch, done.result())

    def submit(self, payload: bytes) -> tuple[DecodedBatch, Future[PublishResult]]:
        """Decodes and queues one batch; the future resolves when it is durable and applied.

        Raises:
            InvalidRequest, Overloaded, Draining.
        """
        batch = decode_batch(payload, self._engine.settings.table)
        self.recorder.malformed(batch.rejected)
        done: Future[PublishResult] = Future()
        self._commit.submit(Submission(payload, batch, self._engine.clock.now_ms(), done))  # type: ignore[arg-type]
        return batch, done

    def _acknowledge(self, batch: DecodedBatch, result: PublishResult) -> pb.PublishAck:
        rejected = [
            pb.RejectedEvent(sequence=r.sequence, code=r.code, message=r.message, index=r.index)  # type: ignore[arg-type]
            for r in batch.rejected
        ]
        for i in result.codes.nonzero()[0]:
            code = int(result.codes[i])
            rejected.append(
                pb.RejectedEvent(
                    sequence=int(batch.events.sequence[i]),
                    code=code,  # type: ignore[arg-type]
                    message=_MESSAGES[code].format(**self._limits),
                    index=int(batch.events.index[i]),
                )
            )
        rejected.sort(key=lambda r: r.index)
        return pb.PublishAck(
            offset=result.offset,
            accepted=int((result.codes == 0).sum()),
            rejected=rejected,
        )
