"""Liveness: CheckLive, WatchEnded, Reconcile."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
from liverank.v1 import liveness_pb2 as pb
from liverank.v1 import liveness_pb2_grpc as pb_grpc

from server.config import TableSettings
from server.engine import Engine
from server.errors import InvalidRequest
from server.live.event_checks import MAX_TIME_MS
from server.ranking.liveness import check_live
from server.ranking.reconcile import find_absent
from server.recorder import Recorder
from server.rpc.auth import caller
from server.rpc.control import Control
from server.rpc.decode import check_short, check_stream_id
from server.rpc.slots import StreamSlots
from server.rpc.status import guarded, guarded_stream

MAX_CHECKED = 1_000
MAX_RECONCILED = 1_000_000


class LivenessService(pb_grpc.LivenessServicer):
    """Answers from the newest table, on the engine thread."""

    def __init__(self, engine: Engine, control: Control, recorder: Recorder, slots: StreamSlots) -> None:
        self._engine, self._control, self.recorder, self._slots = engine, control, recorder, slots

    @guarded
    def CheckLive(self, request: pb.CheckLiveRequest, context: grpc.ServicerContext) -> pb.CheckLiveResponse:
        if len(request.streams) > MAX_CHECKED:
            raise InvalidRequest("streams", f"at most {MAX_CHECKED} allowed, got {len(request.streams)}")
        for i, stream in enumerate(request.streams):
            check_stream_id(f"streams[{i}].stream_id", stream.stream_id)
        wanted = [(stream.stream_id, stream.epoch) for stream in request.streams]
        engine = self._engine
        statuses, as_of_ms, offset = engine.call(
            lambda: (*check_live(engine.table, engine.streams, engine.clock, wanted), engine.applier.offset)
        ).result()
        return pb.CheckLiveResponse(
            streams=[
                pb.LiveStatus(
                    stream_id=s.stream_id, state=s.state, showable=s.showable, epoch=s.epoch,  # type: ignore[arg-type]
                    verify_by_ms=s.verify_by_ms, reason=s.reason,
                )
                for s in statuses
            ],
            as_of_ms=as_of_ms,
            applied_offset=offset,
        )  # fmt: skip

    @guarded_stream
    def WatchEnded(self, request: pb.WatchEndedRequest, context: grpc.ServicerContext) -> Iterator[pb.EndedStream]:
        feed, metrics = self._engine.ends, self.recorder.metrics
        with self._slots.open("WatchEnded", context) as place, metrics.watchers.track_inprogress():
            place.busy = True  # the closing feed ends it, with everything published before
            context.add_callback(feed.wake)
            after = feed.start_after(request.after_offset)
            context.send_initial_metadata(())  # from here on the caller knows that no end will be missed
            while context.is_active():
                for number, end in feed.read(after, context.is_active):
                    yield pb.EndedStream(
                        stream_id=end.stream_id,
                        epoch=end.epoch,
                        ended_ms=end.ended_ms,
                        reason=end.reason,
                        offset=number,
                    )
                    after = number

    @guarded
    def Reconcile(self, request: pb.ReconcileRequest, context: grpc.ServicerContext) -> pb.ReconcileResponse:
        engine = self._engine
        ids = checked_ids(request, engine.settings.table, engine.clock.now_ms())
        owners = None
        if engine.settings.security.producers_own_streams:
            owners = caller().producer_ids
        found = engine.call(lambda: find_absent(engine.table, ids, request.as_of_ms, owners)).result()
        ended, offset = self._control.end_streams(found.absent, request.as_of_ms, "reconciled")
        return pb.ReconcileResponse(
            confirmed=found.confirmed,
            ended_stream_ids=ended,
            unknown_stream_ids=[request.live_stream_ids[i] for i in found.unknown],
            applied_offset=offset or engine.applier.offset,
        )


def checked_ids(request: pb.ReconcileRequest, table: TableSettings, now_ms: int) -> list[bytes]:
    """Ids of the streams that are said to be live. Raises InvalidRequest naming the field."""
    latest_ms = min(now_ms + table.max_future_ms, MAX_TIME_MS - 1)
    if not 0 < request.as_of_ms <= latest_ms:
        raise InvalidRequest("as_of_ms", f"1 to {latest_ms} (now) allowed, got {request.as_of_ms}")
    if len(request.live_stream_ids) > MAX_RECONCILED:
        raise InvalidRequest("live_stream_ids", f"at most {MAX_RECONCILED} allowed, got {len(request.live_stream_ids)}")
    check_short("source", request.source)
    for i, stream_id in enumerate(request.live_stream_ids):
        check_stream_id(f"live_stream_ids[{i}]", stream_id)
    return [stream_id.encode() for stream_id in request.live_stream_ids]
