"""Calls without threads, over real gRPC: many at once, callers that leave, and what must not bring the port down."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from liverank.v1 import ranking_pb2

from server.errors import ConfigError
from server.rpc import direct
from server.rpc.direct import Call, DirectMethod, DirectServer, Refusal
from tests.app import Client, running_app, status_of
from tests.e2e.test_admission import busy_engine, metric
from tests.events import started
from tests.triton_server import eventually

METHOD = "/test.Service/Call"


def in_hand(client: Client) -> int:
    return sum(client.app.engine.admission._in_hand.values())


def test_calls_that_wait_hold_no_thread(tmp_path: Path) -> None:
    with running_app(tmp_path) as client:
        client.publish(started("s", 0))
        client.tick()
        client.rank()
        with busy_engine(client):
            before = threading.active_count()
            calls = [client.ranking.Rank.future(ranking_pb2.RankRequest(), timeout=20.0) for _ in range(200)]
            eventually(lambda: client.app.engine.queued_rows == 200, what="all wait in the engine's queue")
            ours = [t.name for t in threading.enumerate() if t.name.startswith(("rank", "rpc", "calls"))]
            assert threading.active_count() <= before + 2, ours
        assert all(len(call.result().streams) == 1 for call in calls)
        eventually(lambda: in_hand(client) == 0, what="every place is free again")


@pytest.mark.parametrize("how", ["cancelled", "deadline"])
@pytest.mark.parametrize("method", ["Rank", "RankBatch"])
def test_a_caller_that_leaves_is_not_ranked_and_its_place_is_free(tmp_path: Path, how: str, method: str) -> None:
    with running_app(tmp_path) as client:
        request: Any = ranking_pb2.RankRequest()
        if method == "RankBatch":
            request = ranking_pb2.RankBatchRequest(requests=[request])
        with busy_engine(client):
            call = getattr(client.ranking, method).future(request, timeout=0.2 if how == "deadline" else 20.0)
            if how == "cancelled":
                eventually(lambda: client.app.engine.queued_rows == 1, what="it waits")
                call.cancel()
            eventually(lambda: call.done() and in_hand(client) == 0, what="its place is free, the engine still busy")
        if how == "deadline":
            assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        eventually(lambda: client.app.engine.queued_rows == 0, what="it left the queue")
        eventually(
            lambda: metric(client, "liverank_rank_requests_total", status="abandoned", degradation="none") == 1,
            what="it is counted as abandoned",
        )
        assert metric(client, "liverank_rank_requests_total", status="ok", degradation="none") == 0


def test_faults_of_a_request_become_its_status_and_the_next_call_is_answered(tmp_path: Path) -> None:
    with running_app(tmp_path) as client:
        raw = client.channel.unary_unary("/liverank.v1.Ranking/Rank")
        for payload, code in ((b"\xff\xff\xff", "INVALID_ARGUMENT"), (b"\x1a\x05abc", "INVALID_ARGUMENT")):
            with pytest.raises(grpc.RpcError) as refused:
                raw(payload, timeout=5.0)
            assert status_of(refused.value)[0] == code

        def broken(*_: Any) -> Any:
            raise RuntimeError("planted")

        pipeline = client.app.engine.pipeline
        original, pipeline.start = pipeline.start, broken  # type: ignore[method-assign]
        with pytest.raises(grpc.RpcError) as failed:
            client.rank()
        assert status_of(failed.value) == ("INTERNAL", "Rank: internal fault; see the server's log")
        pipeline.start = original  # type: ignore[method-assign]
        client.rank()
        assert in_hand(client) == 0


@contextmanager
def served(
    handle: Callable[[Call, bytes], None], judge: Callable[[Call], Refusal | None] = lambda _: None
) -> Iterator[grpc.Channel]:
    server = grpc.server(None, options=[("grpc.so_reuseport", 0)])
    port = server.add_insecure_port("127.0.0.1:0")
    calls = DirectServer(server, {METHOD: DirectMethod(judge, handle)})
    calls.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        assert calls.stop(1.0).wait(5.0), "it stops, although calls were refused, cut off or broken"


def test_a_call_is_answered_once_the_first_answer_counts() -> None:
    def handle(call: Call, payload: bytes) -> None:
        call.reply(payload[::-1])
        call.reply(b"again")
        call.refuse(Refusal(grpc.StatusCode.INTERNAL, "too late"))

    with served(handle) as channel:
        assert channel.unary_unary(METHOD)(b"abc", timeout=5.0) == b"cba"


def test_an_answer_may_come_from_another_thread_and_after_the_caller_left_it_is_dropped() -> None:
    calls: list[Call] = []
    with served(lambda call, _: calls.append(call)) as channel:
        stays, leaves = (channel.unary_unary(METHOD).future(b"x", timeout=10.0) for _ in range(2))
        eventually(lambda: len(calls) == 2, what="both came")
        leaves.cancel()
        eventually(lambda: any(call.ended for call in calls), what="the server knows")
        answers = [threading.Thread(target=call.reply, args=(b"here",)) for call in calls]
        for thread in answers:
            thread.start()
        assert stays.result(5.0) == b"here" and leaves.cancelled()
        for thread in answers:
            thread.join()


def test_a_judge_refuses_before_the_message_is_read_and_its_metadata_arrives() -> None:
    handled: list[bytes] = []
    refusal = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", (("grpc-retry-pushback-ms", "70"),))
    with served(lambda call, payload: handled.append(payload), lambda _: refusal) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary(METHOD)(b"x" * 1_000_000, timeout=5.0)
        assert status_of(refused.value) == ("RESOURCE_EXHAUSTED", "full")
        assert ("grpc-retry-pushback-ms", "70") in refused.value.trailing_metadata()
    assert not handled


@pytest.mark.parametrize("where", ["judge", "handle"])
def test_a_bug_in_a_handler_is_one_internal_error_and_not_the_end_of_the_port(where: str) -> None:
    faulty = [True]

    def judge(_: Call) -> None:
        if faulty[0] and where == "judge":
            raise RuntimeError("planted")

    def handle(call: Call, payload: bytes) -> None:
        if faulty[0]:
            raise RuntimeError("planted")
        call.reply(payload)

    with served(handle, judge) as channel:
        ask = channel.unary_unary(METHOD)
        with pytest.raises(grpc.RpcError) as failed:
            ask(b"x", timeout=5.0)
        assert status_of(failed.value)[0] == "INTERNAL" and "planted" not in status_of(failed.value)[1]
        faulty[0] = False
        assert ask(b"x", timeout=5.0) == b"x"


def test_a_call_that_sends_no_message_is_refused() -> None:
    with served(lambda call, payload: call.reply(payload)) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            channel.stream_unary(METHOD)(iter(()), timeout=5.0)
        assert status_of(refused.value)[0] == "UNIMPLEMENTED"


def test_methods_that_are_not_direct_are_left_to_grpc() -> None:
    with served(lambda call, payload: call.reply(payload)) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary("/test.Service/Other")(b"", timeout=5.0)
        assert status_of(refused.value) == ("UNIMPLEMENTED", "Method not found!")


def test_another_grpcio_without_what_is_needed_is_named_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(direct.stock, "_request_call")
    with pytest.raises(ConfigError, match=r"grpcio .*no _request_call"):
        DirectServer(grpc.server(None), {})
