"""Events, acknowledgements and questions of the scenarios, one call each."""

from __future__ import annotations

import time

import grpc
from liverank.v1 import ingest_pb2, ingest_pb2_grpc, liveness_pb2, liveness_pb2_grpc

WITHIN_S = 60.0
CHECKED = 1_000


def started(stream_id: str, epoch: int = 1) -> ingest_pb2.Event:
    """A session begins now."""
    event = _event(stream_id, epoch)
    event.started.creator_id = f"creator of {stream_id}"
    return event


def ended(stream_id: str, epoch: int = 1) -> ingest_pb2.Event:
    """A session ends now."""
    event = _event(stream_id, epoch)
    event.ended.reason = "creator"
    return event


def _event(stream_id: str, epoch: int) -> ingest_pb2.Event:
    now_ns = time.time_ns()
    return ingest_pb2.Event(
        stream_id=stream_id, epoch=epoch, event_time_ms=now_ns // 1_000_000, sequence=time.monotonic_ns()
    )


def publish(channel: grpc.Channel, *events: ingest_pb2.Event, producer: str = "faults") -> ingest_pb2.PublishAck:
    """One batch, acknowledged. Raises grpc.RpcError; ValueError when an event was refused."""
    batch = ingest_pb2.EventBatch(producer_id=producer, events=events)
    (ack,) = ingest_pb2_grpc.IngestStub(channel).Publish(iter([batch]), timeout=WITHIN_S)
    if ack.rejected:
        raise ValueError(f"{len(ack.rejected)} events were refused, the first: {ack.rejected[0].message}")
    return ack


def check_live(channel: grpc.Channel, stream_ids: list[str]) -> list[str]:
    """Those of ``stream_ids`` that are live by the table's word (rules aside)."""
    check = liveness_pb2_grpc.LivenessStub(channel).CheckLive
    live = []
    for start in range(0, len(stream_ids), CHECKED):
        refs = [liveness_pb2.StreamRef(stream_id=s) for s in stream_ids[start : start + CHECKED]]
        statuses = check(liveness_pb2.CheckLiveRequest(streams=refs), timeout=WITHIN_S).streams
        live += [s.stream_id for s in statuses if s.state == liveness_pb2.LiveStatus.LIVE]
    return live
