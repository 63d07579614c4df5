"""Whose streams: who may publish as whom, and change which."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import grpc
import pytest
from liverank.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    ingest_pb2,
    liveness_pb2,
    liveness_pb2_grpc,
)

from server.app import App
from server.clock import ManualClock
from server.rpc.control import PRODUCER
from tests.app import serving_app, status_of
from tests.arrow_events import to_batch, to_ipc, to_rows
from tests.events import T0, event, started
from tests.secured import TOKENS, Publisher, channel, write_access


@pytest.fixture
def owned(tmp_path: Path) -> dict[str, Any]:
    access = write_access(tmp_path / "access.toml", *TOKENS)
    return {"access_file": str(access), "producers_own_streams": True, "max_streams_per_producer": 3}


def test_a_producer_may_use_its_own_ids_only_and_never_the_servers(tmp_path: Path) -> None:
    access = write_access(tmp_path / "access.toml", "producer", producer_ids=["a", "b"])
    with (
        serving_app(tmp_path, security={"access_file": str(access)}) as app,
        channel(app.port, TOKENS["producer"]) as made,
    ):
        publisher = Publisher(made)
        assert publisher.send(producer="a") and publisher.send(producer="b")
        with pytest.raises(grpc.RpcError, match="token:producer may not publish as 'producer'") as refused:
            publisher.send(producer="producer")
        assert status_of(refused.value)[0] == "PERMISSION_DENIED"
    # With Kafka every server has its own name for its own events, and a log that is silent gets records of time.
    for own in (PRODUCER, f"{PRODUCER}-0123456789ab", "liverank-time"):
        with serving_app(tmp_path) as app, channel(app.port) as made:
            publisher = Publisher(made)
            with pytest.raises(grpc.RpcError, match=f"anybody may not publish as '{own}'") as refused:
                publisher.send(producer=own)
            assert status_of(refused.value)[0] == "PERMISSION_DENIED"


def test_only_its_owner_changes_a_stream_also_after_a_restart(tmp_path: Path, owned: dict[str, Any]) -> None:
    clock = ManualClock(T0)

    def attack(app: App) -> None:
        with channel(app.port, TOKENS["other"]) as made:
            publisher = Publisher(made)
            publisher.sequence = app.engine.applier.offset * 100
            codes = publisher.codes(
                event("mine", 0, epoch=1, ended={}), started("mine", 0, epoch=2), event("mine", 0, chatted={}),
                started(f"other-{app.engine.applier.offset}", 0), producer="other",
            )  # fmt: skip
            assert codes == [ingest_pb2.NOT_OWNER] * 3 + [0]
            publisher.close()

    with serving_app(tmp_path, clock, security=owned) as app:
        with channel(app.port, TOKENS["producer"]) as made:
            publisher = Publisher(made)
            assert publisher.codes(started("mine", 0), producer="producer") == [0]
            attack(app)
            assert publisher.codes(event("mine", 0, liked={}), producer="producer") == [0]
            publisher.close()
        before = app.engine.table.columns
    with serving_app(tmp_path, clock, security=owned) as app:
        assert app.engine.table.columns.owner.tobytes() == before.owner.tobytes() and before.owner.any()
        assert app.engine.table.columns.counters.tobytes() == before.counters.tobytes()
        attack(app)
    # The log decides and not the settings: what was refused stays refused where nobody owns anything.
    with serving_app(tmp_path, clock) as app, channel(app.port) as made:
        reply = liveness_pb2_grpc.LivenessStub(made).CheckLive(
            liveness_pb2.CheckLiveRequest(streams=[liveness_pb2.StreamRef(stream_id="mine")]), timeout=10.0
        )
        assert reply.streams[0].epoch == 1 and reply.streams[0].state == liveness_pb2.LiveStatus.LIVE


def test_a_cut_off_field_cannot_swallow_the_servers_marks(tmp_path: Path, owned: dict[str, Any]) -> None:
    with serving_app(tmp_path, security=owned) as app, channel(app.port, TOKENS["producer"]) as made:
        Publisher(made).send(started("mine", 0), producer="producer")
        marks = ingest_pb2.EventBatch(own_streams_only=True, max_streams=3).SerializeToString()
        batch = ingest_pb2.EventBatch(producer_id="other", events=[event("mine", 1, epoch=1, ended={})])
        swallowing = batch.SerializeToString() + bytes([15 << 3 | 2, len(marks)])  # an unknown field of that length
        with channel(app.port, TOKENS["other"]) as other:
            publish = other.stream_stream("/liverank.v1.Ingest/Publish")
            with pytest.raises(grpc.RpcError, match="its last field is cut off") as refused:
                next(publish(iter([swallowing]), timeout=10.0))
        assert status_of(refused.value)[0] == "INVALID_ARGUMENT"


def test_a_producers_streams_take_no_more_rows_than_allowed(tmp_path: Path, owned: dict[str, Any]) -> None:
    with serving_app(tmp_path, security=owned) as app, channel(app.port, TOKENS["producer"]) as made:
        publisher = Publisher(made)
        codes = publisher.codes(
            *[started(f"s{i}", 0) for i in range(4)], event("s3", 0, liked={}), started("s0", 0), producer="producer"
        )
        assert codes == [0, 0, 0, ingest_pb2.TOO_MANY_STREAMS, ingest_pb2.UNKNOWN_STREAM, 0]
        ack = publisher.send(event("s0", 0, epoch=1, ended={}), started("s9", 0), producer="producer")
        assert [(r.code, "(3)" in r.message) for r in ack.rejected] == [(ingest_pb2.TOO_MANY_STREAMS, True)]
        with channel(app.port, TOKENS["other"]) as other:
            another = Publisher(other)
            assert another.codes(started("t", 0), producer="other") == [0]
            another.close()
        publisher.close()


def test_the_server_itself_may_end_and_block_any_stream(tmp_path: Path, owned: dict[str, Any]) -> None:
    clock = ManualClock(T0)
    with contextlib.ExitStack() as stack:
        app = stack.enter_context(serving_app(tmp_path, clock, security=owned))
        one, two = (stack.enter_context(channel(app.port, TOKENS[name])) for name in ("producer", "other"))
        first, second = Publisher(one), Publisher(two)
        first.send(started("a", 0), started("b", 0), producer="producer")
        second.send(started("c", 0), producer="other")
        clock.advance(1_000)
        # A producer's truth is about its own streams: that it does not know of "c" ends nothing.
        reply = liveness_pb2_grpc.LivenessStub(one).Reconcile(
            liveness_pb2.ReconcileRequest(as_of_ms=T0 + 500, live_stream_ids=["a"]), timeout=10.0
        )
        assert reply.ended_stream_ids == ["b"] and reply.confirmed == 1
        with channel(app.port, TOKENS["admin"]) as made:
            admin_pb2_grpc.AdminStub(made).BlockStream(admin_pb2.BlockStreamRequest(stream_id="c"), timeout=10.0)
        first.close()
        second.close()


def test_a_columnar_batch_is_held_to_roles_and_ownership_like_messages(tmp_path: Path) -> None:
    access = write_access(tmp_path / "access.toml", "producer", producer_ids=["p", "q"])
    security = {"access_file": str(access), "producers_own_streams": True}
    with (
        serving_app(tmp_path, ManualClock(T0), security=security) as app,
        channel(app.port, TOKENS["producer"]) as made,
    ):
        publisher = Publisher(made)
        assert publisher.codes(started("s", 0), producer="p") == [0]
        columns = to_ipc(to_batch(to_rows([event("s", 1, liked={})])))
        publisher.outbox.put(ingest_pb2.EventBatch(producer_id="q", arrow=columns))
        assert [r.code for r in next(publisher.acks).rejected] == [ingest_pb2.NOT_OWNER]
        moderating = to_ipc(to_batch(to_rows([event("s", 2, moderated={"action": 1})])))
        publisher.outbox.put(ingest_pb2.EventBatch(producer_id="p", arrow=moderating))
        with pytest.raises(grpc.RpcError) as refused:
            next(publisher.acks)
        assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED
        assert not app.engine.table.columns.moderation.any()


def test_a_moderation_needs_the_admin_role_and_stays_refused_after_a_restart(tmp_path: Path) -> None:
    access = write_access(tmp_path / "access.toml", "producer", "moderator", producer_ids=["p", "m"])
    security = {"access_file": str(access), "max_streams_per_producer": 9}
    clock = ManualClock(T0)
    block = {"action": ingest_pb2.Moderated.BLOCK}
    with serving_app(tmp_path, clock, security=security) as app, channel(app.port, TOKENS["producer"]) as made:
        publisher = Publisher(made)
        ack = publisher.send(
            started("s", 0), event("s", 0, moderated=block), event("x", 0, heartbeat={}), event("s", 0, liked={}),
            producer="p",
        )  # fmt: skip
        assert [(r.index, r.code) for r in ack.rejected] == [
            (1, ingest_pb2.NOT_PERMITTED),
            (2, ingest_pb2.EPOCH_MISSING),
        ]
        assert ack.accepted == 2 and ack.rejected[0].message == "moderated: the role admin is wanted"
        publisher.close()
    with serving_app(tmp_path, clock, security=security) as app, channel(app.port, TOKENS["moderator"]) as made:
        assert not app.engine.table.columns.moderation.any()
        publisher = Publisher(made)
        assert publisher.codes(event("s", 0, moderated=block), producer="m") == [0]
        assert app.engine.table.columns.moderation.any()
        publisher.close()
