"""Ingest: Publish."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future

import grpc
from liverank.v1 import ingest_pb2 as pb
from liverank.v1 import ingest_pb2_grpc as pb_grpc

from kernels import fence
from server.applier import PublishResult
from server.engine import Engine
from server.errors import Forbidden, InvalidRequest
from server.live.events import DecodedBatch, Rejection, decode_batch
from server.log.commit import CommitPath, Submission
from server.recorder import Recorder
from server.rpc.auth import caller
from server.rpc.control import is_reserved
from server.rpc.slots import StreamSlots
from server.rpc.status import guarded_stream
from server.security.access import Identity
from server.security.roles import Role

_MESSAGES: dict[int, str] = {
    pb.TOO_LATE: "event_time_ms: older than the lateness bound of {max_lateness_ms} ms",
    pb.TOO_FAR_IN_FUTURE: "event_time_ms: more than {max_future_ms} ms ahead of the server's clock",
    pb.UNKNOWN_STREAM: "stream_id: never started here, or forgotten; send started first",
    pb.EPOCH_BACKWARDS: "epoch: lower than the stream's current epoch",
    pb.EPOCH_UNKNOWN: "epoch: higher than the current one, and its start was not seen; send started first",
    pb.STREAM_ENDED: "epoch: this session is over; end is final, start a higher epoch",
    pb.DUPLICATE_SEQUENCE: "sequence: already applied",
    pb.SEQUENCE_TOO_OLD: "sequence: more than 65,535 below this producer's highest",
    pb.RENEWED_SINCE: "ended.only_if_not_renewed_since_ms: media progress later than this was seen",
    pb.NOT_OWNER: "stream_id: started by another producer_id, which alone may change it",
    pb.TOO_MANY_STREAMS: "the streams of this producer_id take all rows they may ({max_streams})",
    pb.CAPACITY: "the table is full ({capacity} rows); no live stream is evicted for a new one",
}


class IngestService(pb_grpc.IngestServicer):
    """Decodes batches, hands them to the log, and acknowledges in order what was made durable and applied."""

    def __init__(self, engine: Engine, commit: CommitPath, recorder: Recorder, slots: StreamSlots) -> None:
        self._engine, self._commit, self.recorder, self._slots = engine, commit, recorder, slots
        security = engine.settings.security
        # Appended to what is logged: of a field that comes twice, protobuf takes the last.
        self._own_only, self._max_streams = security.producers_own_streams, security.max_streams_per_producer
        marks = pb.EventBatch(own_streams_only=self._own_only, max_streams=self._max_streams)
        self._marks = marks.SerializeToString()
        self._limits = engine.settings.table.model_dump()

    @guarded_stream
    def Publish(self, batches: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[pb.PublishAck]:
        """Takes the next batch only after the last was acknowledged: HTTP/2 flow control does the rest."""
        with self._slots.open("Publish", context) as place:
            for payload in batches:
                with self._slots.answering(place):
                    batch, done = self.submit(payload, caller())
                    yield self._acknowledge(batch, done.result())

    def submit(self, payload: bytes, producer: Identity) -> tuple[DecodedBatch, Future[PublishResult]]:
        """Decodes and queues one batch; the future resolves when it is durable and applied.

        Raises:
            InvalidRequest, Forbidden, Overloaded, Draining.
        """
        payload += self._marks
        batch = decode_batch(payload, self._engine.settings.table)
        if self._marks and not self._is_marked(batch):
            raise InvalidRequest("EventBatch", "not a valid message: its last field is cut off")
        producer_id = batch.events.producer_id
        if is_reserved(producer_id) or not producer.may_produce_as(producer_id):
            raise Forbidden(f"producer_id: {producer.name} may not publish as {producer_id!r}")
        if Role.ADMIN not in producer.roles and (batch.events.kind == fence.MODERATED).any():
            payload, batch = self._without_moderation(payload)
        self.recorder.malformed(batch.rejected)
        done: Future[PublishResult] = Future()
        self._commit.submit(Submission(payload, batch, self._engine.clock.now_ms(), done))  # type: ignore[arg-type]
        return batch, done

    def _is_marked(self, batch: DecodedBatch) -> bool:
        """Whether the marks were read: a cut-off field would have swallowed them, and the limits with them."""
        events = batch.events
        return (not self._own_only or events.own_streams_only) and (
            not self._max_streams or events.max_streams == self._max_streams
        )

    def _without_moderation(self, payload: bytes) -> tuple[bytes, DecodedBatch]:
        """The batch with its moderations emptied, which the log keeps: recovery must refuse them too."""
        message = pb.EventBatch.FromString(payload)
        if message.arrow:
            # Rows of a record batch cannot be emptied one by one without rewriting what is logged.
            raise Forbidden("arrow.kind: moderated wants the role admin; nothing of the batch was applied")
        emptied = set()
        for i, event in enumerate(message.events):
            if event.HasField("moderated"):
                event.ClearField("moderated")
                emptied.add(i)
        payload = message.SerializeToString()
        batch = decode_batch(payload, self._engine.settings.table)
        told = "moderated: the role admin is wanted"
        rejected = [
            Rejection(r.index, r.sequence, pb.NOT_PERMITTED, told) if r.index in emptied else r for r in batch.rejected
        ]
        return payload, DecodedBatch(batch.events, rejected)

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
                    message=_MESSAGES[code].format(max_streams=batch.events.max_streams, **self._limits),
                    index=int(batch.events.index[i]),
                )
            )
        rejected.sort(key=lambda r: r.index)
        return pb.PublishAck(
            offset=result.offset,
            accepted=int((result.codes == 0).sum()),
            rejected=rejected,
        )
