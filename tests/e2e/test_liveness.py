"""What is over is not shown: ends, leases, blocks, reconciliation, over real gRPC (invariants 2 to 5)."""

from __future__ import annotations

import threading
from pathlib import Path

import grpc
import pytest
from liverank.v1 import admin_pb2, ingest_pb2, liveness_pb2, ranking_pb2

from server.clock import ManualClock
from server.rpc.control import Control
from tests.app import Client, running_app, status_of
from tests.events import T0, event, started
from tests.triton_server import eventually

UNKNOWN, LIVE, SUSPECT, ENDED = range(4)


def check(client: Client, *streams: tuple[str, int]) -> list[liveness_pb2.LiveStatus]:
    refs = [liveness_pb2.StreamRef(stream_id=s, epoch=e) for s, e in streams]
    return list(client.liveness.CheckLive(liveness_pb2.CheckLiveRequest(streams=refs), timeout=10.0).streams)


def ids(client: Client) -> list[str]:
    return [s.stream_id for s in client.rank(limit=100).streams]


def test_an_acknowledged_end_is_gone_from_every_later_reply_without_waiting_for_a_tick(tmp_path: Path) -> None:
    """The candidate lists are those of the last tick and still hold the stream: the last check must not."""
    with running_app(tmp_path) as client:
        client.publish(*(started(f"s{i}", 0) for i in range(30)))
        client.tick()
        for i in range(30):
            shown = ids(client)
            assert f"s{i}" in shown or len(shown) == 20
            client.publish(event(f"s{i}", 0, epoch=1, ended={"reason": "creator"}))
            assert f"s{i}" not in ids(client)


def test_gaps_left_by_ended_streams_are_filled_from_the_reserve(tmp_path: Path) -> None:
    with running_app(tmp_path, rank={"tick_ms": 3_600_000}) as client:  # no tick comes to the rescue
        client.publish(*(started(f"s{i:02}", 0) for i in range(40)))
        client.tick()
        first = [s.stream_id for s in client.rank(limit=10).streams]
        client.publish(*(event(s, 0, epoch=1, ended={}) for s in first[:5]))
        after = [s.stream_id for s in client.rank(limit=10).streams]
        assert len(after) == 10 and not set(first[:5]) & set(after)


def test_no_reply_sent_after_an_acknowledged_end_contains_it_under_concurrent_load(tmp_path: Path) -> None:
    with running_app(tmp_path, table={"capacity": 2_000}) as client:
        client.publish(*(started(f"s{i}", 0) for i in range(300)))
        client.tick()
        ended: set[str] = set()
        violations: list[str] = []
        replies, done = [0], threading.Event()

        def ask() -> None:
            while not done.is_set():
                gone = set(ended)  # acknowledged before this request is sent
                shown = {
                    s.stream_id for s in client.ranking.Rank(ranking_pb2.RankRequest(limit=100), timeout=10.0).streams
                }
                violations.extend(gone & shown)
                replies[0] += 1

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for i in range(250):
            client.publish(event(f"s{i}", 0, epoch=1, ended={}))
            ended.add(f"s{i}")
        done.set()
        for thread in threads:
            thread.join()
        assert replies[0] > 50 and not violations


def test_a_lease_that_ran_out_hides_a_stream_without_waiting_for_a_tick(tmp_path: Path) -> None:
    clock = ManualClock(T0)
    with running_app(tmp_path, clock, rank={"tick_ms": 3_600_000}) as client:
        client.publish(started("proven", 0), started("silent", 0))
        clock.advance(6_000)
        client.publish(event("proven", 0, T0 + 6_000, epoch=1, heartbeat={"media_sequence": 1}))
        client.tick()
        assert set(ids(client)) == {"proven", "silent"}
        clock.advance(4_000)
        assert ids(client) == ["proven"]
        assert [s.state for s in check(client, ("proven", 0), ("silent", 0))] == [LIVE, SUSPECT]


def test_a_new_session_is_not_shown_before_a_rule_has_looked_at_it(tmp_path: Path) -> None:
    with running_app(tmp_path, rank={"tick_ms": 3_600_000}) as client:
        client.publish(started("s", 0))
        client.tick()
        assert ids(client) == ["s"]
        client.publish(started("s", 0, epoch=2))
        assert ids(client) == [] and check(client, ("s", 2))[0].reason == "rule:unassessed"
        client.tick()
        assert ids(client) == ["s"]


def test_a_stream_that_comes_back_under_other_terms_is_judged_by_the_new_ones(tmp_path: Path) -> None:
    """Candidate lists of the last tick hold it under its old language and region."""
    with running_app(tmp_path, rank={"tick_ms": 3_600_000}) as client:
        client.publish(started("s", 0, language="en"), started("t", 0, language="en"))
        client.tick()
        client.publish(started("s", 0, language="de", region="JP"))  # same session, new attributes
        shown = [s.stream_id for s in client.rank(languages=["en"]).streams]
        assert shown == ["t"]


def test_check_live_tells_state_epoch_and_why(tmp_path: Path) -> None:
    with running_app(tmp_path) as client:
        client.publish(started("live", 0, epoch=3), started("over", 0))
        client.publish(event("over", 0, epoch=1, ended={}))
        client.tick()
        live, old, over, nobody = check(client, ("live", 3), ("live", 2), ("over", 0), ("nobody", 0))
        assert (live.state, live.showable, live.epoch, live.verify_by_ms) == (LIVE, True, 3, T0 + 10_000)
        assert (old.showable, old.reason, old.epoch, old.verify_by_ms) == (False, "epoch_changed", 3, 0)
        assert (over.state, over.showable, over.reason) == (ENDED, False, "ended")
        assert (nobody.state, nobody.showable, nobody.reason) == (UNKNOWN, False, "unknown")
        with pytest.raises(grpc.RpcError) as failed:
            check(client, ("ok", 0), ("", 0))
        assert status_of(failed.value) == ("INVALID_ARGUMENT", "streams[1].stream_id: 1 to 64 bytes wanted, got 0")
        with pytest.raises(grpc.RpcError) as failed:
            check(client, *[("s", 0)] * 1_001)
        assert status_of(failed.value)[1] == "streams: at most 1000 allowed, got 1001"


def test_watchers_hear_every_end_and_resume_where_they_were(tmp_path: Path) -> None:
    clock = ManualClock(T0)
    with running_app(tmp_path, clock) as client:
        client.publish(*(started(f"s{i}", 0) for i in range(5)))
        watch = client.liveness.WatchEnded(liveness_pb2.WatchEndedRequest())
        watch.initial_metadata()
        client.publish(event("s0", 0, epoch=1, ended={"reason": "creator"}), started("s1", 0, epoch=2))
        first, second = next(watch), next(watch)
        assert (first.stream_id, first.reason, first.offset) == ("s0", "creator", 1)
        assert (second.stream_id, second.epoch, second.reason) == ("s1", 1, "superseded")
        watch.cancel()
        clock.advance(30_000)  # the others: lease and grace are over
        again = client.liveness.WatchEnded(liveness_pb2.WatchEndedRequest(after_offset=1))
        heard = [next(again) for _ in range(5)]
        assert [e.offset for e in heard] == [2, 3, 4, 5, 6]
        assert {(e.stream_id, e.reason) for e in heard[1:]} == {(f"s{i}", "lease_expired") for i in (1, 2, 3, 4)}
        again.cancel()
        beyond = client.liveness.WatchEnded(liveness_pb2.WatchEndedRequest(after_offset=99))
        with pytest.raises(grpc.RpcError) as failed:
            next(beyond)
        assert status_of(failed.value)[0] == "OUT_OF_RANGE"


def test_a_block_works_at_once_and_outlives_a_restart(tmp_path: Path) -> None:
    with running_app(tmp_path) as client:
        client.publish(started("s", 0), started("t", 0))
        client.tick()
        client.admin.BlockStream(admin_pb2.BlockStreamRequest(stream_id="s", reason="test"), timeout=10.0)
        assert ids(client) == ["t"] and check(client, ("s", 0))[0].reason == "rule:blocked"
        with pytest.raises(grpc.RpcError) as failed:
            client.admin.BlockStream(admin_pb2.BlockStreamRequest(stream_id="nobody"), timeout=10.0)
        assert status_of(failed.value)[0] == "NOT_FOUND"
    with running_app(tmp_path) as client:
        assert client.shown() == ["t"]
        client.publish(started("s", 100, epoch=2), producer="again")
        assert client.shown() == ["t"]
        client.admin.UnblockStream(admin_pb2.UnblockStreamRequest(stream_id="s"), timeout=10.0)
        assert set(client.shown()) == {"s", "t"}


def test_reconciling_ends_what_the_media_server_does_not_know(tmp_path: Path) -> None:
    clock = ManualClock(T0)
    with running_app(tmp_path, clock) as client:
        client.publish(*(started(f"s{i}", 0) for i in range(20)))
        clock.advance(3_000)
        client.publish(event("s3", 0, T0 + 3_000, epoch=1, heartbeat={"media_sequence": 1}))
        as_of = T0 + 2_000
        listed = [f"s{i}" for i in range(20) if i not in (3, 4, 5)]
        done = client.liveness.Reconcile(
            liveness_pb2.ReconcileRequest(as_of_ms=as_of, live_stream_ids=[*listed, "alien"]), timeout=10.0
        )
        assert done.confirmed == 17 and list(done.unknown_stream_ids) == ["alien"]
        assert set(done.ended_stream_ids) == {"s4", "s5"}, "s3 proved itself after the list was made"
        assert not {"s4", "s5"} & set(client.shown(limit=100))
        with pytest.raises(grpc.RpcError) as failed:
            client.liveness.Reconcile(liveness_pb2.ReconcileRequest(as_of_ms=as_of + 1_000), timeout=10.0)
        assert status_of(failed.value)[0] == "FAILED_PRECONDITION"
        assert len(client.shown(limit=100)) == 18, "a refused list changes nothing"
        with pytest.raises(grpc.RpcError) as failed:
            client.liveness.Reconcile(liveness_pb2.ReconcileRequest(as_of_ms=0), timeout=10.0)
        assert status_of(failed.value)[1].startswith("as_of_ms: ")


def test_a_stream_renewed_while_a_list_is_being_compared_is_not_ended_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reconcile decides on the table of a moment ago; the decision holds only if it still does when applied."""
    clock = ManualClock(T0)
    with running_app(tmp_path, clock) as client:
        client.publish(*(started(f"s{i}", 0) for i in range(4)))
        clock.advance(3_000)
        original = Control.end_streams

        def renewed_meanwhile(self: Control, streams: list[tuple[str, int]], as_of_ms: int, reason: str) -> object:
            assert [s for s, _ in streams] == ["s2", "s3"]
            client.publish(event("s2", 0, T0 + 3_000, epoch=1, heartbeat={"media_sequence": 1}))
            return original(self, streams, as_of_ms, reason)

        monkeypatch.setattr(Control, "end_streams", renewed_meanwhile)
        request = liveness_pb2.ReconcileRequest(as_of_ms=T0 + 2_000, live_stream_ids=["s0", "s1"])
        done = client.liveness.Reconcile(request, timeout=10.0)
        assert list(done.ended_stream_ids) == ["s3"]
        assert set(client.shown()) == {"s0", "s1", "s2"}
    with running_app(tmp_path, clock) as client:  # decided again, from the log
        assert set(client.shown()) == {"s0", "s1", "s2"}


def test_an_acknowledgement_names_every_refused_event_and_the_rest_is_visible(tmp_path: Path) -> None:
    with running_app(tmp_path) as client:
        bad = ingest_pb2.Event(stream_id="s", event_time_ms=T0)
        ack = client.publish(
            started("s", 0), bad, event("ghost", 0, liked={}), event("s", 0, viewer_count={"count": 7}),
            started("t", 0, embedding=[1.0]),
        )  # fmt: skip
        assert ack.accepted == 2 and ack.offset == 1
        assert [(r.index, r.sequence, ingest_pb2.RejectCode.Name(r.code)) for r in ack.rejected] == [
            (1, 2, "MISSING_PAYLOAD"), (2, 3, "UNKNOWN_STREAM"), (4, 5, "EMBEDDING_SIZE"),
        ]  # fmt: skip
        assert all(r.message for r in ack.rejected)
        status = client.admin.Status(admin_pb2.StatusRequest(), timeout=10.0)
        assert (status.live, status.applied_offset, status.events_applied, status.events_rejected) == (1, 1, 2, 3)


def test_a_full_table_refuses_new_streams_keeps_the_old_and_counts_it(tmp_path: Path) -> None:
    with running_app(tmp_path, table={"capacity": 3}) as client:
        ack = client.publish(*(started(f"s{i}", 0) for i in range(5)))
        assert [r.code for r in ack.rejected] == [ingest_pb2.CAPACITY] * 2
        assert set(client.shown()) == {"s0", "s1", "s2"}
        metric = client.app.metrics.events_rejected.labels("CAPACITY")._value.get()
        assert metric == 2


def test_a_malformed_batch_ends_its_call_with_a_status_and_harms_nobody(tmp_path: Path) -> None:
    with running_app(tmp_path) as client:
        raw = client.channel.stream_stream("/liverank.v1.Ingest/Publish")
        for payload, field in ((b"\xff\xff", "EventBatch"), (b"", "producer_id")):
            with pytest.raises(grpc.RpcError) as failed:
                list(raw(iter([payload]), timeout=10.0))
            code, details = status_of(failed.value)
            assert code == "INVALID_ARGUMENT" and details.startswith(field)
        assert client.publish(started("s", 0)).accepted == 1


def test_streaming_calls_are_bounded_and_give_their_place_back(tmp_path: Path) -> None:
    with running_app(tmp_path, serve={"max_open_streams": 2}) as client:
        client.publish(started("s", 0))  # holds one place
        watch = client.liveness.WatchEnded(liveness_pb2.WatchEndedRequest())
        watch.initial_metadata()
        with pytest.raises(grpc.RpcError) as failed:
            next(client.liveness.WatchEnded(liveness_pb2.WatchEndedRequest()))
        assert status_of(failed.value)[0] == "RESOURCE_EXHAUSTED"
        assert ids(client) is not None, "unary calls have threads of their own"
        watch.cancel()

        def place_is_free() -> bool:
            again = client.liveness.WatchEnded(liveness_pb2.WatchEndedRequest())
            try:
                again.initial_metadata()
            except grpc.RpcError:
                return False
            return not again.done() and again.cancel() is not False

        eventually(place_is_free, what="a cancelled watcher frees its place")
