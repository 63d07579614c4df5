"""Columnar batches through a real server: acknowledged, ranked, recovered."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from liverank.v1 import ingest_pb2 as pb
from liverank.v1 import ingest_pb2_grpc

from server.clock import ManualClock
from tests.app import Client, running_app, status_of
from tests.arrow_events import to_batch, to_ipc, to_rows
from tests.events import T0, event, started


def publish(client: Client, batch: pb.EventBatch) -> pb.PublishAck:
    (ack,) = ingest_pb2_grpc.IngestStub(client.channel).Publish(iter([batch]), timeout=10.0)
    return ack


def columnar(*events: pb.Event) -> pb.EventBatch:
    return pb.EventBatch(producer_id="columns", arrow=to_ipc(to_batch(to_rows(list(events)))))


def test_a_columnar_batch_is_acknowledged_ranked_and_recovered_from_the_log(tmp_path: Path) -> None:
    clock = ManualClock(T0)
    with running_app(tmp_path, clock) as client:
        ack = publish(
            client,
            columnar(
                started("s", 1, language="en"),
                event("nobody", 2, liked={}),
                event("s", 3, epoch=1, heartbeat={"media_sequence": 1}),
                event("s", 4, watched={"seconds": -1.0}),
                event("s", 5, viewer_count={"count": 50}),
            ),
        )
        assert ack.accepted == 3
        assert [(r.index, r.sequence, r.code) for r in ack.rejected] == [
            (1, 2, pb.UNKNOWN_STREAM),
            (3, 4, pb.VALUE_OUT_OF_RANGE),
        ]
        assert client.shown() == ["s"]
        again = publish(client, columnar(event("s", 5, viewer_count={"count": 50})))
        assert [r.code for r in again.rejected] == [pb.DUPLICATE_SEQUENCE]
        columns = {name: column.copy() for name, column in vars(client.app.engine.table.columns).items()}
    with running_app(tmp_path, clock) as client:
        for name, column in vars(client.app.engine.table.columns).items():
            assert column.tobytes() == columns[name].tobytes(), name
        assert client.shown() == ["s"]


def test_a_batch_that_is_no_arrow_stream_ends_the_call_with_the_reason(tmp_path: Path) -> None:
    with running_app(tmp_path) as client:
        with pytest.raises(grpc.RpcError) as failed:
            publish(client, pb.EventBatch(producer_id="columns", arrow=b"rubbish"))
        code, told = status_of(failed.value)
        assert code == "INVALID_ARGUMENT" and told.startswith("arrow: not an Arrow IPC stream")
