"""Servers fed by one Kafka topic: the real client against librdkafka's built-in broker over TCP, not Apache Kafka."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import grpc
import pyarrow.parquet
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from liverank.v1 import admin_pb2, admin_pb2_grpc, ingest_pb2, liveness_pb2

from kernels import fence
from loadtest.faults.broker import Broker, running_broker
from loadtest.processes import to_toml
from server.app import App
from server.clock import ManualClock, SystemClock
from server.config import parse_settings
from server.errors import ConfigError, LogError
from server.export import run_export
from server.live.events import decode_batch
from server.log.commit import Submission
from server.log.kafka_commit import KafkaCommit, _Pending
from server.rpc.control import PRODUCER
from tests.app import SMALL, Client, running_app, serving_app, status_of
from tests.events import T0, batch, event, started
from tests.secured import TOKENS, Publisher, channel, write_access
from tests.triton_server import eventually
from tests.unit.test_snapshots import everything

TOPIC = "events"


@pytest.fixture
def broker() -> Iterator[Broker]:
    with running_broker(TOPIC, f"{TOPIC}-dead-letters") as running:
        yield running


def kafka(broker: Broker, **more: Any) -> dict[str, Any]:
    # Apache Kafka answers a waiting fetch when a record comes; the built-in broker only when its time is over.
    about = {
        "bootstrap_servers": broker.servers, "topic": TOPIC, "time_record_ms": 50, "ack_timeout_ms": 2_000,
        "options": {"fetch.wait.max.ms": "10"},
    }  # fmt: skip
    return {"kind": "kafka", "kafka": {**about, **more}}


def server(folder: Path, broker: Broker, skew_ms: int = 0, **more: Any) -> AbstractContextManager[Client]:
    folder.mkdir(exist_ok=True)
    clock = SkewedClock(skew_ms) if skew_ms else SystemClock()
    table = {**SMALL, "lease_ms": 2_000, "grace_ms": 500}
    return running_app(folder, clock, model=False, table=table, log=kafka(broker, **more))


class SkewedClock(SystemClock):
    """A clock that is wrong."""

    def __init__(self, skew_ms: int) -> None:
        super().__init__()
        self._skew_ms = skew_ms

    def now_ms(self) -> int:
        return super().now_ms() + self._skew_ms


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def state_at(client: Client) -> tuple[int, dict[str, Any], tuple[int, list[Any]]]:
    """Offset, everything the log determines, and the ends; taken between two batches."""
    engine = client.app.engine
    return engine.call(lambda: (engine.applier.offset, everything(engine.table), engine.ends.export())).result(10.0)


def assert_same_at_one_offset(a: Client, b: Client) -> None:
    """Both apply what comes; looked at until an offset is met by both (time records keep coming)."""
    ends_at = time.monotonic() + 60.0
    seen: list[dict[int, Any]] = [{}, {}]
    while not set(seen[0]) & set(seen[1]):
        assert time.monotonic() < ends_at, [sorted(s) for s in seen]
        for which, client in enumerate((a, b)):
            offset, state, ends = state_at(client)
            seen[which][offset] = (state, ends)
    for offset in set(seen[0]) & set(seen[1]):
        assert seen[0][offset] == seen[1][offset], offset


def test_two_writers_with_different_clocks_and_a_follower_have_the_same_table(tmp_path: Path, broker: Broker) -> None:
    with (
        server(tmp_path / "a", broker) as a,
        server(tmp_path / "b", broker, skew_ms=1_500) as b,
        server(tmp_path / "c", broker, publish=False) as follower,
    ):
        for i in range(15):
            first = a.publish(started(f"a{i}", 0, now_ms(), category=f"g{i}"), producer="pa")
            second = b.publish(
                started(f"b{i}", 0, now_ms()), event(f"a{i}", 0, now_ms(), viewer_count={"count": i}), producer="pb"
            )
            assert not first.rejected and not second.rejected and second.offset > first.offset
        a.publish(event("b3", 0, now_ms(), epoch=1, ended={"reason": "over"}))
        last = b.publish(event("a4", 0, now_ms(), epoch=1, ended={}))
        assert follower.rank(min_offset=last.offset, limit=50).applied_offset >= last.offset
        stamps = [c.app.engine.applier.stamp_ms for c in (a, b, follower)]
        assert min(stamps) > now_ms(), "the clock that is ahead drives the time of all"
        for other in (b, follower):
            assert_same_at_one_offset(a, other)
        eventually(lambda: follower.app.engine.ends.newest >= 30, what="leases end in a silent log too")
        assert_same_at_one_offset(a, follower)


def test_a_tick_expires_nothing_beyond_the_stamps_of_the_log_yet_nothing_is_shown_past_its_lease(
    tmp_path: Path, broker: Broker
) -> None:
    clock = ManualClock(T0)
    with running_app(tmp_path, clock, model=False, log=kafka(broker, time_record_ms=600_000)) as client:
        client.publish(started("s", 0, T0))
        assert client.shown() == ["s"]
        clock.advance(60_000)
        engine = client.app.engine
        as_of_ms = engine.call(lambda: (engine.set_rules(engine.streams.book), engine.pipeline.snapshot.now_ms)[1])
        assert as_of_ms.result(5.0) == clock.now_ms(), "what is no part of the log's state follows the clock"
        client.tick()
        assert client.admin.Status(admin_pb2.StatusRequest(), timeout=5.0).live == 1, "time is the log's"
        assert client.shown() == []
        client.publish(started("t", 0, clock.now_ms()))
        found = client.admin.Status(admin_pb2.StatusRequest(), timeout=5.0)
        assert (found.live, found.suspect + found.ended) == (1, 1) and client.shown() == ["t"]


def test_an_acknowledged_batch_is_visible_to_the_next_call_and_its_offset_can_be_waited_for(
    tmp_path: Path, broker: Broker
) -> None:
    with server(tmp_path / "a", broker) as a, server(tmp_path / "b", broker) as b:
        ack = a.publish(started("s", 0, now_ms()))
        assert a.app.engine.applier.offset >= ack.offset
        assert b.rank(min_offset=ack.offset).applied_offset >= ack.offset
        refs = [liveness_pb2.StreamRef(stream_id="s")]
        (status,) = b.liveness.CheckLive(liveness_pb2.CheckLiveRequest(streams=refs), timeout=10.0).streams
        assert status.state == liveness_pb2.LiveStatus.LIVE


def test_blocks_by_two_servers_do_not_take_each_other_for_repetitions(tmp_path: Path, broker: Broker) -> None:
    with server(tmp_path / "a", broker) as a, server(tmp_path / "b", broker) as b:
        ack = a.publish(*(started(f"s{i}", 0, now_ms()) for i in range(4)))
        for client in (a, b):
            client.rank(min_offset=ack.offset)
        calls = [
            client.admin.BlockStream.future(admin_pb2.BlockStreamRequest(stream_id=f"s{i}"), timeout=10.0)
            for i, client in enumerate((a, b, a, b))
        ]
        assert len({call.result().offset for call in calls}) == 4


def test_a_follower_refuses_to_publish(tmp_path: Path, broker: Broker) -> None:
    with server(tmp_path / "c", broker, publish=False) as follower:
        with pytest.raises(grpc.RpcError) as failed:
            follower.publish(started("s", 0, now_ms()))
        assert status_of(failed.value)[0] == "FAILED_PRECONDITION" and "log.kafka.publish" in status_of(failed.value)[1]


def test_a_record_nobody_can_decode_goes_to_the_dead_letters_and_the_rest_goes_on(
    tmp_path: Path, broker: Broker
) -> None:
    outside = Producer({"bootstrap.servers": broker.servers})
    outside.produce(TOPIC, b"\xff not a batch", partition=0)
    outside.flush(5.0)
    with server(tmp_path / "a", broker) as a:
        outside.produce(TOPIC, None, partition=0)
        outside.produce(TOPIC, batch(started("out", 1, now_ms()), producer="outside"), partition=0)  # without a stamp
        outside.flush(5.0)
        ack = a.publish(started("s", 0, now_ms()))
        assert not ack.rejected
        assert a.app.metrics.log_dead_letters._value.get() == 2
        assert a.admin.Status(admin_pb2.StatusRequest(), timeout=5.0).live == 2
    reader = Consumer({"bootstrap.servers": broker.servers, "group.id": "t"})
    reader.assign([TopicPartition(f"{TOPIC}-dead-letters", 0, 0)])
    letters = reader.consume(2, 10.0)
    reader.close()
    assert [m.value() for m in letters] == [b"\xff not a batch", b""]
    assert letters[0].key() == f"{TOPIC}/0/0".encode() and dict(letters[0].headers())["error"]


def test_a_restart_goes_on_from_the_snapshots_offset_and_ends_where_the_others_are(
    tmp_path: Path, broker: Broker
) -> None:
    with server(tmp_path / "a", broker) as a:
        with server(tmp_path / "b", broker) as b:
            for i in range(10):
                ack = a.publish(started(f"s{i}", 0, now_ms(), title=f"t{i}"))
            b.rank(min_offset=ack.offset)
            offset = b.app.snapshots.take()
            assert offset >= ack.offset
        a.publish(event("s1", 0, now_ms(), epoch=1, ended={}), event("s2", 0, now_ms(), viewer_count={"count": 7}))
        broker.delete_before(TOPIC, offset - 2)  # retention: only a snapshot can help now
        with server(tmp_path / "b", broker) as b:
            assert_same_at_one_offset(a, b)
        fresh = parse_settings(
            {
                "serve": {"port": 0, "metrics_port": 0}, "table": SMALL,
                "log": {"path": str(tmp_path / "new" / "log"), **kafka(broker)},
                "scoring": {"mode": "local", "model_repository": str(tmp_path)},
            }
        )  # fmt: skip
        with pytest.raises(LogError, match=rf"records 1 to {offset - 2} are gone.*accept_lost_history"):
            App(fresh, SystemClock(), lambda: None).start()


@pytest.mark.parametrize(
    ("topic", "told"), [("four", "'four' has 4 partitions; exactly one"), ("none", "'none' cannot be used: .*nknown")]
)
def test_a_topic_without_one_order_is_refused(tmp_path: Path, broker: Broker, topic: str, told: str) -> None:
    broker.create("four", 4)
    settings = parse_settings(
        {
            "serve": {"port": 0, "metrics_port": 0}, "table": SMALL,
            "log": {"path": str(tmp_path / "log"), **kafka(broker, topic=topic)},
            "scoring": {"mode": "local", "model_repository": str(tmp_path)},
        }
    )  # fmt: skip
    app = App(settings, ManualClock(1), lambda: None)
    with pytest.raises(ConfigError, match=told):
        app.start()


def test_another_topic_behind_the_same_snapshots_is_refused(tmp_path: Path, broker: Broker) -> None:
    with server(tmp_path / "a", broker) as a:
        a.publish(started("s", 0, now_ms()))
        a.app.snapshots.take()
    broker.create("other")
    with pytest.raises(ConfigError, match="are of the log 'kafka:events', not 'kafka:other'"):
        server(tmp_path / "a", broker, topic="other").__enter__()


def test_kafka_without_brokers_and_options_we_rely_on_are_refused(tmp_path: Path, broker: Broker) -> None:
    with pytest.raises(ConfigError, match=r"bootstrap_servers: host:port wanted"):
        parse_settings({"log": {"kind": "kafka"}})
    with pytest.raises(ConfigError, match=r"log\.kafka\.options: acks cannot be changed"):
        server(tmp_path / "a", broker, options={"acks": "0"}).__enter__()


def test_what_security_refuses_stays_refused_on_every_server_and_behind_a_snapshot(
    tmp_path: Path, broker: Broker
) -> None:
    """The publisher's marks are in the topic: a reader that asks nobody who they are decides the same."""
    access = write_access(tmp_path / "access.toml", "producer", "other", "admin")
    owned = {"access_file": str(access), "producers_own_streams": True, "max_streams_per_producer": 2}
    settings = {"table": {**SMALL, "lease_ms": 60_000}, "log": kafka(broker)}
    with (
        serving_app(tmp_path / "a", SystemClock(), False, **settings, security=owned) as a,
        running_app(tmp_path / "b", SystemClock(), False, **settings) as b,
        channel(a.port, TOKENS["producer"]) as mine,
        channel(a.port, TOKENS["other"]) as theirs,
        channel(a.port, TOKENS["admin"]) as admins,
    ):
        first, second = Publisher(mine), Publisher(theirs)
        assert first.codes(*(started(f"s{i}", 0, now_ms()) for i in range(3)), producer="producer") == [
            0, 0, ingest_pb2.TOO_MANY_STREAMS,
        ]  # fmt: skip
        end = event("s0", 0, now_ms(), epoch=1, ended={})
        assert second.codes(end, event("s1", 0, now_ms(), moderated={"action": 1}), producer="other") == [
            ingest_pb2.NOT_OWNER, ingest_pb2.NOT_PERMITTED,
        ]  # fmt: skip
        for name in (f"{PRODUCER}-{(tmp_path / 'a' / 'events.snapshots' / 'server-id').read_text()}", "liverank-time"):
            with pytest.raises(grpc.RpcError) as failed:
                Publisher(theirs).send(started("x", 0, now_ms()), producer=name)
            assert status_of(failed.value)[0] == "PERMISSION_DENIED"
        block = admin_pb2_grpc.AdminStub(admins).BlockStream(admin_pb2.BlockStreamRequest(stream_id="s1"), timeout=10.0)
        b.rank(min_offset=block.offset)
        with running_app(tmp_path / "c", SystemClock(), False, **settings) as c:  # from the topic alone
            assert_same_at_one_offset(b, c)
            columns = c.app.engine.table.columns
            assert columns.owner[:2].all() and (columns.state[:2] == fence.LIVE).all()
            assert columns.moderation[:2].tolist() == [0, fence.MODERATED_BLOCKED]
            c.app.snapshots.take()
        first.close()
        second.close()
    with (
        serving_app(tmp_path / "c", SystemClock(), False, **settings, security=owned) as c,
        channel(c.port, TOKENS["other"]) as theirs,
    ):
        publisher = Publisher(theirs)
        publisher.sequence = 100
        assert publisher.codes(event("s0", 0, now_ms(), epoch=1, ended={}), producer="other") == [ingest_pb2.NOT_OWNER]
        publisher.close()


def test_the_table_of_a_topic_can_be_exported(tmp_path: Path, broker: Broker) -> None:
    with server(tmp_path / "a", broker) as a:
        offset = a.publish(started("s", 0, now_ms()), started("t", 0, now_ms())).offset
        a.app.snapshots.take()
        a.publish(event("t", 0, now_ms(), epoch=1, ended={}))
        broker.delete_before(TOPIC, offset - 1)
        config, out = tmp_path / "liverank.toml", tmp_path / "table.parquet"
        about = {**kafka(broker)["kafka"], "options": None}
        options = {"fetch.wait.max.ms": "10"}
        config.write_text(
            to_toml(
                {
                    "table": {**SMALL, "lease_ms": 2_000, "grace_ms": 500},
                    "log": {"kind": "kafka", "path": str(tmp_path / "a" / "events.sqlite3")},
                    "log.kafka": {name: value for name, value in about.items() if value is not None},
                    "log.kafka.options": options,
                }
            )
        )
        assert run_export(out, config) == 0
    written = pyarrow.parquet.read_table(out)
    assert dict(zip(written["stream_id"].to_pylist(), written["state"].to_pylist(), strict=True))["t"] == "ended"
    assert int(written.schema.metadata[b"offset"]) > offset


def test_a_drain_ends_with_the_last_batch_on_its_way_and_not_with_the_ack_timeout(
    tmp_path: Path, broker: Broker
) -> None:
    clock = ManualClock(T0)
    about = kafka(broker, time_record_ms=600_000, ack_timeout_ms=60_000)
    with running_app(tmp_path, clock, model=False, log=about) as client:
        client.publish(started("s", 0, T0))
        commit = client.app._commit
        assert isinstance(commit, KafkaCommit)
        payload = batch(started("t", 1, T0))
        submission = Submission(payload, decode_batch(payload, client.app.settings.table), T0, Future())
        pending = commit._pending["last"] = _Pending(submission, delivered=True)
        pending.applied.add_done_callback(lambda _: commit._settle("last"))
        stopping = threading.Thread(target=commit.stop)
        stopping.start()
        eventually(lambda: commit._stopping, what="it stops")
        pending.applied.set_result(None)
        stopping.join(10.0)
        assert not stopping.is_alive() and submission.done.done()
