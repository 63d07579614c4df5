"""Who may call what: every method of every service with every role, tokens that come and go, limits per client."""

from __future__ import annotations

import contextlib
import json
import queue
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from liverank.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    ingest_pb2,
    ingest_pb2_grpc,
    liveness_pb2,
    liveness_pb2_grpc,
    ranking_pb2,
    ranking_pb2_grpc,
)

from server.app import SERVICES, App
from server.clock import ManualClock
from server.rpc.control import PRODUCER
from server.security.roles import ACCESS, Role
from tests.app import serving_app, status_of
from tests.arrow_events import to_batch, to_ipc, to_rows
from tests.events import T0, event, started
from tests.secured import TOKENS, channel, write_access
from tests.triton_server import eventually

HEALTH, REFLECTION = "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"
WANTED = {
    "Rank": "reader", "RankBatch": "reader", "Explain": "reader", "CheckLive": "reader", "WatchEnded": "reader",
    "Publish": "producer", "Reconcile": "producer",
    "Status": "admin", "BlockStream": "admin", "UnblockStream": "admin", "ReloadRules": "admin",
    "PushModel": "admin", "ShadowModel": "admin", "CanaryModel": "admin", "PromoteModel": "admin",
    "RollbackModel": "admin", "ListModels": "admin", "DiffModels": "admin",
    "Check": "nobody", "Watch": "nobody", "List": "nobody", "ServerReflectionInfo": "anybody known",
}  # fmt: skip
REFUSED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


def methods() -> dict[str, Any]:
    """Every method of every service that a server answers, by its path, from the descriptors."""
    pool = descriptor_pool.Default()
    services = [pool.FindServiceByName(name) for name in (*SERVICES, HEALTH, REFLECTION)]
    return {f"/{service.full_name}/{method.name}": method for service in services for method in service.methods}


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    folder = tmp_path_factory.mktemp("secured")
    access = write_access(folder / "access.toml", *TOKENS, producer_ids=["*"])
    with serving_app(folder, security={"access_file": str(access)}) as app:
        yield app


def outcome(app: App, path: str, method: Any, token: str | None) -> grpc.StatusCode:
    """The status of a call with an empty message; OK as soon as a stream was let in."""
    with channel(app.port, token) as made:
        try:
            if not method.server_streaming:
                made.unary_unary(path)(b"", timeout=10.0)
            elif method.client_streaming:
                list(made.stream_stream(path)(iter([b""]), timeout=10.0))
            else:
                call = made.unary_stream(path)(b"", timeout=10.0)
                if path.endswith("/WatchEnded"):
                    call.initial_metadata()
                    if call.is_active():
                        call.cancel()
                        return grpc.StatusCode.OK
                next(call)
                call.cancel()
        except grpc.RpcError as error:
            return error.code()  # type: ignore[attr-defined, no-any-return]
    return grpc.StatusCode.OK


@pytest.mark.parametrize("path", sorted(methods()))
def test_every_method_is_open_to_its_role_only(secured: App, path: str) -> None:
    method, wanted = methods()[path], WANTED[path.rpartition("/")[2]]
    assert (outcome(secured, path, method, None) is grpc.StatusCode.UNAUTHENTICATED) == (wanted != "nobody")
    assert (outcome(secured, path, method, "reader.wrong") is grpc.StatusCode.UNAUTHENTICATED) == (wanted != "nobody")
    for role in Role:
        status = outcome(secured, path, method, TOKENS[str(role)])
        if wanted in (str(role), "nobody", "anybody known"):
            assert status not in REFUSED, (role, status)
        else:
            assert status is grpc.StatusCode.PERMISSION_DENIED, (role, status)


def test_every_method_that_is_served_has_its_roles_written_down(secured: App) -> None:
    with channel(secured.port, TOKENS["admin"]) as made:
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (reply,) = reflection_pb2_grpc.ServerReflectionStub(made).ServerReflectionInfo(iter([request]), timeout=10.0)
    pool = descriptor_pool.Default()
    served = {
        f"/{service.name}/{method.name}"
        for service in reply.list_services_response.service
        for method in pool.FindServiceByName(service.name).methods
    }
    assert served == set(ACCESS) == set(methods()), "give a new method its roles in server/security/roles.py"


def test_a_method_without_roles_is_refused_even_where_anybody_may_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(ACCESS, "/liverank.v1.Ranking/Rank")
    with serving_app(tmp_path) as app, channel(app.port) as made, pytest.raises(grpc.RpcError) as refused:
        ranking_pb2_grpc.RankingStub(made).Rank(ranking_pb2.RankRequest(), timeout=10.0)
    assert status_of(refused.value)[0] == "PERMISSION_DENIED"


def test_nothing_is_parsed_before_the_caller_is_known(secured: App) -> None:
    for path, method in methods().items():
        if not method.server_streaming and WANTED[path.rpartition("/")[2]] != "nobody":
            with channel(secured.port) as made, pytest.raises(grpc.RpcError) as refused:
                made.unary_unary(path)(b"\xff\xff\xff", timeout=10.0)
            assert status_of(refused.value)[0] == "UNAUTHENTICATED"


def test_two_authorizations_and_other_schemes_are_refused(secured: App) -> None:
    token = TOKENS["reader"]
    with channel(secured.port) as made:
        check = liveness_pb2_grpc.LivenessStub(made).CheckLive
        request = liveness_pb2.CheckLiveRequest()
        good = ("authorization", f"bearer {token}")
        check(request, metadata=[good], timeout=10.0)
        wrong = [[good, good], [("authorization", token)], [("authorization", f"Basic {token}")]]
        for metadata in (*wrong, [("authorization", "Bearer ")], [("authorization", f"Bearer  {token}")]):
            with pytest.raises(grpc.RpcError) as refused:
                check(request, metadata=metadata, timeout=10.0)
            assert status_of(refused.value)[0] == "UNAUTHENTICATED"


# --- tokens that come and go ---------------------------------------------------------------------


def allowed(app: App, name: str) -> bool:
    with channel(app.port, TOKENS[name]) as made:
        try:
            liveness_pb2_grpc.LivenessStub(made).CheckLive(liveness_pb2.CheckLiveRequest(), timeout=10.0)
        except grpc.RpcError as error:
            if error.code() not in REFUSED:  # type: ignore[attr-defined]
                raise
            return False
    return True


def test_tokens_change_without_a_restart_and_a_broken_file_changes_nothing(tmp_path: Path) -> None:
    access = write_access(tmp_path / "access.toml", "reader")
    settings = {"access_file": str(access), "reload_ms": 20, "audit_file": str(tmp_path / "audit.jsonl")}
    with serving_app(tmp_path, security=settings) as app:
        assert allowed(app, "reader") and not allowed(app, "admin")
        metric = app.metrics.security_reloads.labels("access", "failed")
        access.write_text("[token.reader]\nroles = ['root']")
        eventually(lambda: metric._value.get() == 1, what="the broken file was seen")
        assert allowed(app, "reader")
        write_access(access, "other", certificates={"x": ["reader"]}, roles_of_nobody=[])  # an unknown key
        eventually(lambda: metric._value.get() == 2, what="the second broken file was seen")
        assert allowed(app, "reader")
        access.unlink()
        eventually(lambda: metric._value.get() == 3, what="the missing file was seen")
        assert allowed(app, "reader")
        write_access(access, "admin")
        eventually(lambda: not allowed(app, "reader"), what="the old token is refused")
        with channel(app.port, TOKENS["admin"]) as made:
            assert admin_pb2_grpc.AdminStub(made).Status(admin_pb2.StatusRequest(), timeout=10.0).version
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    outcomes = [line["outcome"] for line in lines if line["what"] == "reload:access"]
    assert outcomes == ["failed", "failed", "failed", "ok"]


class Publisher:
    """An open Publish call."""

    def __init__(self, made: grpc.Channel, within_s: float = 60.0) -> None:
        self.outbox: queue.SimpleQueue[ingest_pb2.EventBatch | None] = queue.SimpleQueue()
        self.acks = ingest_pb2_grpc.IngestStub(made).Publish(iter(self.outbox.get, None), timeout=within_s)
        self.sequence = 0

    def send(self, *events: ingest_pb2.Event, producer: str) -> ingest_pb2.PublishAck:
        for one in events:
            self.sequence += 1
            one.sequence = self.sequence
        self.outbox.put(ingest_pb2.EventBatch(producer_id=producer, events=events))
        return next(self.acks)

    def codes(self, *events: ingest_pb2.Event, producer: str) -> list[int]:
        """The reject code of each event; 0 applied."""
        ack = self.send(*events, producer=producer)
        codes = {r.index: r.code for r in ack.rejected}
        return [codes.get(i, 0) for i in range(len(events))]

    def close(self) -> None:
        self.outbox.put(None)


def revocable(folder: Path) -> tuple[Path, dict[str, Any]]:
    """An access file that is looked at only when the test says so."""
    access = write_access(folder / "access.toml", "reader", "producer", "admin", producer_ids=["p"])
    return access, {"access_file": str(access), "reload_ms": 3_600_000}


def test_a_revoked_token_ends_a_busy_stream_at_its_next_message(tmp_path: Path) -> None:
    access, settings = revocable(tmp_path)
    with serving_app(tmp_path, security=settings) as app, channel(app.port, TOKENS["producer"]) as made:
        publisher = Publisher(made)
        assert publisher.send(started("s", 0), producer="p").accepted == 1
        with channel(app.port, TOKENS["reader"]) as other:
            watch = liveness_pb2_grpc.LivenessStub(other).WatchEnded(liveness_pb2.WatchEndedRequest())
            watch.initial_metadata()
            write_access(access, "admin", "other", producer_ids=["p"])
            app.gate.look()
            with pytest.raises(grpc.RpcError) as refused:
                publisher.send(event("s", 0, epoch=1, ended={}), producer="p")
            assert status_of(refused.value)[0] == "UNAUTHENTICATED"
            with channel(app.port, TOKENS["other"]) as third:
                late = Publisher(third)
                assert late.send(event("s", 0, epoch=1, ended={}), producer="p").accepted == 0, "its number is used"
                assert late.send(event("s", 0, epoch=1, ended={}), producer="p").accepted == 1
                late.close()
            with pytest.raises(grpc.RpcError) as refused:  # the end is not told to it any more
                next(watch)
            assert status_of(refused.value)[0] == "UNAUTHENTICATED"


def test_a_revoked_token_ends_idle_streams_within_two_looks(tmp_path: Path) -> None:
    access, settings = revocable(tmp_path)
    with contextlib.ExitStack() as stack:
        app = stack.enter_context(serving_app(tmp_path, security=settings))
        one, two = (stack.enter_context(channel(app.port, TOKENS[name])) for name in ("producer", "reader"))
        publisher = Publisher(one, within_s=10.0)
        publisher.send(started("s", 0), producer="p")
        watch = liveness_pb2_grpc.LivenessStub(two).WatchEnded(liveness_pb2.WatchEndedRequest(), timeout=10.0)
        watch.initial_metadata()
        reflect = reflection_pb2_grpc.ServerReflectionStub(two).ServerReflectionInfo(
            iter(queue.SimpleQueue[Any]().get, None), timeout=10.0
        )
        eventually(lambda: len(app.gate._grants) == 3, what="all three are open")
        app.gate.look()
        assert len(app.gate._grants) == 3, "nothing has changed yet"
        write_access(access, "admin", producer_ids=["p"])
        app.gate.look()
        app.gate.look()
        for call in (publisher.acks, watch, reflect):
            with pytest.raises(grpc.RpcError) as ended:
                next(call)
            assert status_of(ended.value)[0] == "CANCELLED"
        eventually(lambda: not app.gate._grants and not app.gate._open, what="the server has let go of them")
        publisher.close()


def test_a_token_that_loses_a_role_or_expires_ends_its_streams_too(tmp_path: Path) -> None:
    access, settings = revocable(tmp_path)
    clock = ManualClock(T0)
    write_access(access, "producer", "reader", producer_ids=["p"])
    access.write_text(access.read_text() + "expires = 2023-11-14T22:13:30Z\n")  # of the reader: T0 + 10 s
    with serving_app(tmp_path, clock, security=settings) as app, channel(app.port, TOKENS["reader"]) as made:
        watch = liveness_pb2_grpc.LivenessStub(made).WatchEnded(liveness_pb2.WatchEndedRequest())
        watch.initial_metadata()
        app.gate.look()
        assert watch.is_active() and allowed(app, "reader")
        clock.advance(10_000)
        assert not allowed(app, "reader")
        app.gate.look()
        app.gate.look()
        with pytest.raises(grpc.RpcError):
            next(watch)


# --- limits per client ---------------------------------------------------------------------------


def pushback_ms(error: grpc.RpcError) -> int:
    return int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"])  # type: ignore[attr-defined]


def test_a_client_that_asks_too_often_is_told_when_to_come_back_and_others_are_not_slowed(tmp_path: Path) -> None:
    access = write_access(tmp_path / "access.toml", "reader", "admin", "producer", producer_ids=["*"])
    limits = {"access_file": str(access), "requests_per_second": 0.5, "burst_s": 6.0}  # three at once
    with serving_app(tmp_path, security=limits) as app:
        with channel(app.port, TOKENS["reader"]) as made:
            stub = ranking_pb2_grpc.RankingStub(made)
            stub.Rank(ranking_pb2.RankRequest(), timeout=10.0)
            stub.RankBatch(ranking_pb2.RankBatchRequest(requests=[ranking_pb2.RankRequest()] * 4), timeout=10.0)
            with pytest.raises(grpc.RpcError) as refused:  # the batch has overdrawn the bucket
                stub.Rank(ranking_pb2.RankRequest(), timeout=10.0)
            code, told = status_of(refused.value)
            assert code == "RESOURCE_EXHAUSTED" and "token:reader: more than 0.5 requests per second" in told
            assert 4_000 < pushback_ms(refused.value) <= 6_000
        with channel(app.port, TOKENS["admin"]) as made:
            admin_pb2_grpc.AdminStub(made).Status(admin_pb2.StatusRequest(), timeout=10.0)
        with channel(app.port, TOKENS["producer"]) as made:
            publisher = Publisher(made)
            for _ in range(3):
                publisher.send(producer="p")
            with pytest.raises(grpc.RpcError) as refused:
                publisher.send(producer="p")
            assert status_of(refused.value)[0] == "RESOURCE_EXHAUSTED" and pushback_ms(refused.value) > 0
        with channel(app.port, "reader.guess") as made:  # guessing is limited by address
            codes = []
            for _ in range(4):
                with pytest.raises(grpc.RpcError) as refused:
                    ranking_pb2_grpc.RankingStub(made).Rank(ranking_pb2.RankRequest(), timeout=10.0)
                codes.append(status_of(refused.value)[0])
            assert codes == ["UNAUTHENTICATED"] * 3 + ["RESOURCE_EXHAUSTED"]
            assert health_pb2_grpc.HealthStub(made).Check(health_pb2.HealthCheckRequest(), timeout=10.0).status == 1


def test_an_entry_has_its_own_rate_and_without_access_file_the_address_counts(tmp_path: Path) -> None:
    access = write_access(tmp_path / "access.toml", "reader", requests_per_second=0)
    limits: dict[str, Any] = {"requests_per_second": 0.001, "burst_s": 1.0}
    with serving_app(tmp_path, security={**limits, "access_file": str(access)}) as app:
        assert all(allowed(app, "reader") for _ in range(5))
    with serving_app(tmp_path, security=limits) as app, channel(app.port) as made:
        check = liveness_pb2_grpc.LivenessStub(made).CheckLive
        check(liveness_pb2.CheckLiveRequest(), timeout=10.0)
        with pytest.raises(grpc.RpcError, match=r"peer:127\.0\.0\.1: more than 0\.001"):
            check(liveness_pb2.CheckLiveRequest(), timeout=10.0)


def test_open_streams_are_limited_per_client(tmp_path: Path) -> None:
    access = write_access(tmp_path / "access.toml", "reader", "producer", producer_ids=["*"])
    limits = {"access_file": str(access), "max_open_streams_per_client": 2}
    with contextlib.ExitStack() as stack:
        app = stack.enter_context(serving_app(tmp_path, security=limits))
        made, other = (stack.enter_context(channel(app.port, TOKENS[name])) for name in ("producer", "reader"))
        first, second = Publisher(made), Publisher(made)
        assert first.send(producer="a") and second.send(producer="b")
        third = Publisher(made)
        with pytest.raises(grpc.RpcError, match="token:producer: 2 streaming calls are open already") as refused:
            third.send(producer="c")
        assert status_of(refused.value)[0] == "RESOURCE_EXHAUSTED"
        watch = liveness_pb2_grpc.LivenessStub(other).WatchEnded(liveness_pb2.WatchEndedRequest())
        watch.initial_metadata()
        first.close()
        eventually(lambda: app.gate._open["token:producer"] == 1, what="the first is over")
        fourth = Publisher(made)
        assert fourth.send(producer="d")
        for publisher in (second, third, fourth):
            publisher.close()


# --- whose streams -------------------------------------------------------------------------------


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


# --- audit and metrics ---------------------------------------------------------------------------


def test_the_audit_log_tells_who_changed_what_and_what_came_of_it(tmp_path: Path) -> None:
    access = write_access(tmp_path / "access.toml", *TOKENS, producer_ids=["*"])
    audit = tmp_path / "logs" / "audit.jsonl"
    with serving_app(tmp_path, security={"access_file": str(access), "audit_file": str(audit)}) as app:
        with channel(app.port, TOKENS["admin"]) as made:
            admin = admin_pb2_grpc.AdminStub(made)
            request = admin_pb2.BlockStreamRequest(stream_id="ghost", reason="spam")
            with pytest.raises(grpc.RpcError):
                admin.BlockStream(request, timeout=10.0)
            admin.ReloadRules(admin_pb2.ReloadRulesRequest(), timeout=10.0)
            with pytest.raises(grpc.RpcError, match="reason: at most 256 bytes"):
                admin.BlockStream(admin_pb2.BlockStreamRequest(stream_id="s", reason="x" * 257), timeout=10.0)
            with pytest.raises(grpc.RpcError):
                made.unary_unary("/liverank.v1.Admin/BlockStream")(b"\xff", timeout=10.0)
        with channel(app.port, TOKENS["producer"]) as made:
            ids = [f"s{i}" for i in range(20)]
            request = liveness_pb2.ReconcileRequest(as_of_ms=T0, live_stream_ids=ids, source="media")
            liveness_pb2_grpc.LivenessStub(made).Reconcile(request, timeout=10.0)
            liveness = liveness_pb2_grpc.LivenessStub(made)
            with pytest.raises(grpc.RpcError, match="source: at most 64 bytes"):
                liveness.Reconcile(liveness_pb2.ReconcileRequest(as_of_ms=T0, source="x" * 65), timeout=10.0)
        for token in (TOKENS["reader"], None, "reader.wrong"):
            with channel(app.port, token) as made, pytest.raises(grpc.RpcError):
                admin_pb2_grpc.AdminStub(made).Status(admin_pb2.StatusRequest(), timeout=10.0)
        seen = urllib.request.urlopen(f"http://127.0.0.1:{app.metrics_port}/metrics", timeout=10.0).read().decode()
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    assert [(line["who"], line["what"].rpartition("/")[2], line["outcome"]) for line in lines] == [
        ("token:admin", "BlockStream", "NOT_FOUND"),
        ("token:admin", "ReloadRules", "OK"),
        ("token:admin", "BlockStream", "INVALID_ARGUMENT"),
        ("token:admin", "BlockStream", "INVALID_ARGUMENT"),
        ("token:producer", "Reconcile", "OK"),
        ("token:producer", "Reconcile", "INVALID_ARGUMENT"),
        ("token:reader", "Status", "PERMISSION_DENIED"),  # who is nobody leaves no line, so nobody can fill the file
    ]
    assert lines[0]["request"] == {"stream_id": "ghost", "reason": "spam"} and "ghost" in lines[0]["detail"]
    assert len(lines[2]["request"]["reason"]) == 256
    assert lines[4]["request"] == {"as_of_ms": T0, "live_stream_ids_count": 20, "source": "media"}
    assert 'liverank_auth_refused_total{reason="unauthenticated"} 2.0' in seen
    assert 'liverank_auth_refused_total{reason="forbidden"} 1.0' in seen


def test_texts_of_any_length_come_back_in_no_error(secured: App) -> None:
    with channel(secured.port, TOKENS["reader"]) as made:
        stub = ranking_pb2_grpc.RankingStub(made)
        for name in ("request_id", "viewer_id", "region", "surface"):
            with pytest.raises(grpc.RpcError, match=f"{name}: at most 64 bytes allowed, got 100000"):
                stub.Rank(ranking_pb2.RankRequest(**{name: "x" * 100_000}), timeout=10.0)
        with pytest.raises(grpc.RpcError, match="viewer_embedding: a length of 0, or from 1e-06 to 1e\\+06, wanted"):
            stub.Rank(ranking_pb2.RankRequest(viewer_embedding=[1e30] * 4), timeout=10.0)


def test_a_batch_whose_answer_could_not_be_sent_is_refused_before_it_is_ranked(tmp_path: Path) -> None:
    with serving_app(tmp_path, serve={"max_message_bytes": 4_000}) as app, channel(app.port) as made:
        stub = ranking_pb2_grpc.RankingStub(made)
        one = ranking_pb2.RankRequest(limit=10)
        stub.RankBatch(ranking_pb2.RankBatchRequest(requests=[one] * 10), timeout=10.0)
        with pytest.raises(grpc.RpcError, match="requests: limits of 110 streams in all; at most 100 fit") as refused:
            stub.RankBatch(ranking_pb2.RankBatchRequest(requests=[one] * 11), timeout=10.0)
        assert status_of(refused.value)[0] == "INVALID_ARGUMENT"


def test_a_message_beyond_the_limit_is_refused_unread_on_every_way_in_and_harms_no_other(tmp_path: Path) -> None:
    with serving_app(tmp_path, serve={"max_message_bytes": 4_000}) as app, channel(app.port) as made:
        ranking, liveness = ranking_pb2_grpc.RankingStub(made), liveness_pb2_grpc.LivenessStub(made)
        large = "x" * 5_000
        calls: list[Callable[[], object]] = [
            lambda: ranking.Rank(ranking_pb2.RankRequest(request_id=large), timeout=10.0),
            lambda: liveness.CheckLive(liveness_pb2.CheckLiveRequest(streams=[{"stream_id": large}]), timeout=10.0),
            lambda: list(
                ingest_pb2_grpc.IngestStub(made).Publish(iter([ingest_pb2.EventBatch(producer_id=large)]), timeout=10.0)
            ),
        ]
        for call in calls:
            with pytest.raises(grpc.RpcError) as refused:
                call()
            code, told = status_of(refused.value)
            assert code == "RESOURCE_EXHAUSTED" and "larger than max" in told
        ranking.Rank(ranking_pb2.RankRequest(), timeout=10.0)
