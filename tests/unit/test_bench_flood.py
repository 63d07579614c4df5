"""The cheap generator of floods: it tells what grpc's own client tells, latencies count from when calls were due."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import grpc
import pytest

from loadtest.bench import flood
from loadtest.bench.flood import Flooder, FloodError
from loadtest.faults.http2 import GOAWAY, SETTINGS, frame

PATH = "/test.Service/Ask"
LONG_S = 20.0  # a busy machine sends late, and this client then sends all the same
LARGE = b"x" * 100_000  # more than the first window of a connection, and many frames
PAYLOADS = [b"ok", b"large", b"degraded", b"shed 70", b"shed 1200", b"no hint", b"wrong"]


def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
    word, _, value = request.decode().partition(" ")
    if word == "shed":
        context.set_trailing_metadata((("grpc-retry-pushback-ms", value),))
    if word in ("shed", "no"):
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many")
    if word == "wrong":
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "limit: at most 5 allowed, got ü")
    return {"ok": b"fine", "large": LARGE, "degraded": LARGE + b"overload: quality 0.25"}[word]


@contextmanager
def served(behaviour: Callable[[bytes, grpc.ServicerContext], bytes], threads: int = 4) -> Iterator[str]:
    """Address of grpc's own server."""
    server = grpc.server(ThreadPoolExecutor(threads))
    service, method = PATH[1:].split("/")
    handler = grpc.unary_unary_rpc_method_handler(behaviour)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


@contextmanager
def silent(says: bytes = b"") -> Iterator[str]:
    """Address of a server that takes connections, says one thing, and never answers."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        taken: list[socket.socket] = []

        def take() -> None:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            taken.append(connection)
            connection.sendall(frame(SETTINGS, 0, 0) + says)

        thread = threading.Thread(target=take)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join(10.0)
        for connection in taken:
            connection.close()


def test_it_counts_the_same_statuses_hints_and_degraded_replies_as_grpcs_own_client() -> None:
    calls = 10 * len(PAYLOADS)
    with served(answer) as address:
        with closing(Flooder(address, PAYLOADS, PATH)) as flooder:
            told = flooder.run(200.0, calls / 200.0, LONG_S)
        theirs, hints, degraded = Counter[str](), [], 0
        with grpc.insecure_channel(address) as channel:
            ask = channel.unary_unary(PATH)
            for i in range(calls):
                try:
                    degraded += b"overload: " in ask(PAYLOADS[i % len(PAYLOADS)], timeout=5.0)
                except grpc.RpcError as error:
                    theirs[error.code().name] += 1
                    hints += [int(v) for k, v in error.trailing_metadata() or () if k == "grpc-retry-pushback-ms"]
    assert (told["sent"], told["unsent"]) == (calls, 0)
    assert (told["errors"], sorted(told["hints_ms"])) == (dict(theirs), sorted(hints))
    assert len(told["latencies_ms"]) == calls - sum(theirs.values()) == 30
    assert told["degraded"] == degraded == 10


def test_it_goes_on_beyond_the_windows_that_a_connection_begins_with() -> None:
    """200 messages of 8 KiB on one connection are many windows of the server; 200 large replies many of ours."""
    with (
        served(lambda request, context: LARGE) as address,
        closing(Flooder(address, [b"q" * 8_192], PATH, 1)) as flooder,
    ):
        told = flooder.run(1_000.0, 0.2, LONG_S)
    assert (told["sent"], len(told["latencies_ms"]), told["errors"]) == (200, 200, {})


def test_while_the_server_stalls_calls_are_due_all_the_same_and_wait_from_then() -> None:
    over = threading.Event()
    timer = threading.Timer(0.4, over.set)

    def stalled(request: bytes, context: grpc.ServicerContext) -> bytes:
        over.wait(10.0)
        return b""

    with served(stalled, threads=1) as address, closing(Flooder(address, [b"q"], PATH)) as flooder:
        timer.start()
        told = flooder.run(200.0, 0.3, LONG_S)
    assert told["sent"] == 60
    assert sum(ms > 90 for ms in told["latencies_ms"]) == 60, "a closed loop would have one slow call"
    assert max(told["latencies_ms"]) > 350


def test_what_the_server_does_not_let_it_send_is_unsent_and_what_it_does_not_answer_is_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flood, "TIMEOUT_S", 0.3)
    with silent() as address, closing(Flooder(address, [b"q" * 16_000], PATH, 1)) as flooder:
        told = flooder.run(100.0, 0.1)
    assert (told["sent"], told["unsent"]) == (4, 6), "four messages fit the first window"
    assert told["errors"] == {"DEADLINE_EXCEEDED": 4} and told["latencies_ms"] == []


@pytest.mark.parametrize("says", [frame(GOAWAY, 0, 0, b"\0" * 8 + b"too_many_pings"), frame(1, 5, 1, b"\x88\x85abcde")])
def test_what_it_cannot_count_ends_it(says: bytes) -> None:
    with (
        silent(says) as address,
        closing(Flooder(address, [b"q"], PATH, 1)) as flooder,
        pytest.raises(FloodError, match=r"too_many_pings|no status"),
    ):
        flooder.run(100.0, 0.5)


def test_a_server_that_goes_away_ends_it() -> None:
    with (
        closing(socket.create_server(("127.0.0.1", 0))) as listener,
        closing(Flooder(f"127.0.0.1:{listener.getsockname()[1]}", [b"q"], PATH, 1)) as flooder,
    ):
        listener.accept()[0].close()
        with pytest.raises((FloodError, ConnectionError)):
            flooder.run(100.0, 0.5)


def test_the_frames_of_a_call_are_the_same_bytes_but_for_the_number_of_its_stream() -> None:
    opening, middle, rest = flood._as_frames(PATH, b"payload")
    one, other = (b"".join((opening, n.to_bytes(4, "big"), middle, n.to_bytes(4, "big"), rest)) for n in (1, 3))
    assert one.count(b"grpc-timeout") == 1 and sum(a != b for a, b in zip(one, other, strict=True)) == 2
