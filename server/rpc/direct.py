"""Unary calls without a thread each: one thread takes them off the wire, and whoever has the reply sends it.

grpc's own server hands every call to a thread that sleeps until the reply is there; waking it costs several times what
the wire costs (docs/lab.md, "Transport"). Here a call's bytes go straight to its handler, on the thread that polls the
port, and `Call.reply` may be called from any thread, such as the engine's. All other methods of the same port, the
streaming ones among them, are left to grpc's own machinery.

This rests on grpcio's completion queue, which is not part of its documented API: see docs/adr/0008. `DirectServer`
checks when it is built that what it needs is there.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from server.batching.base import Priority, Waiting
from server.errors import ConfigError
from server.rpc.outbox import Outbox

try:
    from grpc import _server as stock
    from grpc._cython import cygrpc
except ImportError as missing:  # pragma: no cover - another grpcio than pyproject.toml allows
    raise ConfigError(f"grpcio {grpc.__version__}: not a version that this server can use: {missing}") from missing

logger = logging.getLogger(__name__)

WAITING_OPTIONS = (("grpc.server.max_pending_requests", 8_192), ("grpc.server.max_pending_requests_hard_limit", 16_384))
"""For the server: so many calls may wait for the polling thread. Beyond grpc's own 1,000 it drops calls at random, with
CANCELLED and without a hint, when that thread gets no processor for a third of a second under a flood."""
_POLL_S = 1.0
_NO_FLAGS = 0
_WANTED_OF_SERVER = (
    "_process_event_and_continue",
    "_request_call",
    "_request_registered_call",
    "_REQUEST_CALL_TAG",
    "_ServerStage",
)
Metadata = Sequence[tuple[str, str | bytes]]


@dataclass(frozen=True)
class Refusal:
    """A status that is not OK, and what to tell with it."""

    code: grpc.StatusCode
    details: str
    trailing: Metadata = ()


@dataclass(frozen=True)
class DirectMethod:
    """How calls of one method are handled. Both run on the thread that polls for calls, so they must be quick and
    must not wait; an exception that they let out is answered with INTERNAL.

    judge: decides over a call before its message is read; None lets it in.
    handle: takes the call and its message; sees to it that the call is answered once, at any time, by any thread.
    """

    judge: Callable[[Call], Refusal | None]
    handle: Callable[[Call, bytes], None]


class Call:
    """One call. Exactly one of `reply` and `refuse` has an effect, the first; after the caller is gone, none.

    arrived_s: monotonic. Thread-safe.
    """

    __slots__ = ("_core", "_due", "_event", "_gone", "_lock", "arrived_s", "ended", "left", "on_gone", "priority")

    def __init__(self, event: Any) -> None:
        self.arrived_s = time.monotonic()
        self._event, self._core = event, event.call
        self._lock = threading.Lock()
        self._due = 0  # batches of operations that the core has not finished
        self.ended = self._gone = False
        """ended: it was answered, or nobody waits any more."""
        self.priority = Priority.INTERACTIVE
        self.on_gone: Callable[[], object] | None = None
        """Told, at most once, that nobody waits for an answer any more: cancelled, or past the deadline."""
        self.left: Callable[[], None] | None = None
        """Told once, when the call was answered or its caller is gone."""

    # The names are those of grpc.ServicerContext, so that one function can look at either.

    def peer(self) -> str:
        """Address of the other side."""
        peer = self._core.peer()
        return peer.decode() if isinstance(peer, bytes) else str(peer)

    def peer_identities(self) -> Iterable[bytes] | None:
        """Names in the client's verified certificate."""
        identities: Iterable[bytes] | None = cygrpc.peer_identities(self._core)
        return identities

    def invocation_metadata(self) -> Metadata:
        metadata: Metadata = self._event.invocation_metadata
        return metadata

    def time_remaining(self) -> float:
        """Seconds until the caller's deadline; infinite without one."""
        deadline = float(self._event.call_details.deadline)
        return max(deadline - time.time(), 0.0) if math.isfinite(deadline) else math.inf

    def reply(self, message: bytes) -> None:
        """Answers with OK."""
        self._end(
            (
                cygrpc.SendInitialMetadataOperation(None, _NO_FLAGS),
                cygrpc.SendMessageOperation(message, _NO_FLAGS),
                cygrpc.SendStatusFromServerOperation(None, cygrpc.StatusCode.ok, b"", _NO_FLAGS),
            )
        )

    def refuse(self, refusal: Refusal) -> None:
        """Answers with another status."""
        self._end(
            (
                cygrpc.SendInitialMetadataOperation(None, _NO_FLAGS),
                cygrpc.SendStatusFromServerOperation(
                    tuple(refusal.trailing), refusal.code.value[0], refusal.details.encode(), _NO_FLAGS
                ),
            )
        )

    def cancel(self) -> None:
        """Cuts the call off."""
        self._core.cancel()

    # --- inside: operations and what the core says when they are done; its answers go to `stock` ----------------

    def _end(self, operations: tuple[Any, ...]) -> None:
        with self._lock:
            if self.ended:
                return
            self.ended = True
            self._due += 1
        self._leave()  # first: who has the answer may ask again at once
        self._core.start_server_batch(operations, self._finished)

    def _leave(self) -> None:
        left, self.left = self.left, None
        if left is not None:
            left()

    def begin(self, handle: Callable[[Call, bytes], None]) -> None:
        """Asks for the message. On the polling thread."""
        self._due = 2
        self._core.start_server_batch((cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS),), self._closed)

        def received(event: Any) -> tuple[Call | None, tuple[()]]:
            message = event.batch_operations[0].message()
            if message is not None:
                try:
                    handle(self, message)
                except Exception:
                    logger.exception("unexpected fault in a direct handler")
                    self.refuse(Refusal(grpc.StatusCode.INTERNAL, "internal fault; see the server's log"))
            elif not self._gone:
                self.refuse(Refusal(grpc.StatusCode.UNIMPLEMENTED, "exactly one request message wanted, got none"))
            return self._finished(event)

        self._core.start_server_batch((cygrpc.ReceiveMessageOperation(_NO_FLAGS),), received)

    def turn_away(self, refusal: Refusal) -> None:
        """Refuses without reading the message, with the least work. On the polling thread."""
        self._due, self.ended = 1, True
        operations = (
            cygrpc.SendInitialMetadataOperation(None, _NO_FLAGS),
            cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS),
            cygrpc.SendStatusFromServerOperation(
                tuple(refusal.trailing), refusal.code.value[0], refusal.details.encode(), _NO_FLAGS
            ),
        )
        self._core.start_server_batch(operations, self._finished)

    def _closed(self, event: Any) -> tuple[Call | None, tuple[()]]:
        if event.batch_operations[0].cancelled():
            with self._lock:
                self._gone, ended, self.ended = True, self.ended, True
            if not ended:
                if self.on_gone is not None:
                    self.on_gone()
                self._leave()
        return self._finished(event)

    def _finished(self, _: Any) -> tuple[Call | None, tuple[()]]:
        with self._lock:
            self._due -= 1
            over = self._due == 0 and self.ended
        return (self if over else None), ()


class DirectServer:
    """A grpc.Server some of whose unary methods are handled directly.

    Args:
        server: not started; everything else is registered with it as usual, interceptors included.
        methods: by full name, "/package.Service/Method". Interceptors do not see them.
        outbox: what handlers leave there is handed on when no further call waits to be read.

    Raises:
        ConfigError: this grpcio lacks what is needed.
    """

    def __init__(self, server: grpc.Server, methods: dict[str, DirectMethod], outbox: Outbox | None = None) -> None:
        self._outbox = outbox
        self._server, self._methods = server, {name.encode(): method for name, method in methods.items()}
        wanted: tuple[tuple[object, str], ...] = (
            (server, "_state"),
            *((stock, name) for name in _WANTED_OF_SERVER),
            *((cygrpc, name) for name in ("SendMessageOperation", "ReceiveCloseOnServerOperation", "CompletionType")),
        )
        missing = [name for owner, name in wanted if not hasattr(owner, name)]
        if missing:
            raise ConfigError(f"grpcio {grpc.__version__}: not a version that this server can use: no {missing[0]}")
        self._state: Any = server._state

    def start(self) -> None:
        """Instead of the server's own."""
        state = self._state
        with state.lock:
            state.server.start()
            state.stage = stock._ServerStage.STARTED
            for name in state.registered_method_handlers:
                stock._request_registered_call(state, name)
            stock._request_call(state)
        threading.Thread(target=self._serve, name="calls", daemon=True).start()

    def stop(self, grace: float) -> threading.Event:
        """No new calls; the event is set when those in hand are over, which are cut off after ``grace`` seconds."""
        over: threading.Event = self._server.stop(grace)
        return over

    def _serve(self) -> None:
        state, queue = self._state, self._state.completion_queue
        timeout, arrival, methods = cygrpc.CompletionType.queue_timeout, stock._REQUEST_CALL_TAG, self._methods
        outbox = Outbox(_nowhere) if self._outbox is None else self._outbox
        while True:
            if outbox.calls and outbox.due:
                outbox.flush()
            event = queue.poll(0.0 if outbox.calls else time.time() + _POLL_S)
            if event.completion_type == timeout:
                outbox.flush()
                continue
            if event.tag is arrival and event.success and event.call_details.method in methods:
                self._arrived(event)
            elif not stock._process_event_and_continue(state, event):
                outbox.flush()
                return
            event = None  # what holds a call that is over must not be kept while polling

    def _arrived(self, event: Any) -> None:
        state, call = self._state, Call(event)
        method = self._methods[event.call_details.method]
        with state.lock:
            state.due.discard(stock._REQUEST_CALL_TAG)
            state.rpc_states.add(call)  # the server is not stopped before it is over
            if state.stage is stock._ServerStage.STARTED:
                stock._request_call(state)
        try:
            refusal = method.judge(call)
        except Exception:
            logger.exception("unexpected fault while judging a call")
            refusal = Refusal(grpc.StatusCode.INTERNAL, "internal fault; see the server's log")
        if refusal is not None:
            call.turn_away(refusal)
        else:
            call.begin(method.handle)


def _nowhere(_: list[Waiting[Any]]) -> None: ...
