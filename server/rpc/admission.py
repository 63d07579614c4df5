"""Admission at the edge: calls of Ranking are judged before a thread, a message or a lock of the engine is spent.

grpc hands each call to a thread pool whose queue has no bound. So calls of Ranking get pools of their own that count
what is in them, and a call that is not admitted is answered where it arrives, on the thread that polls for calls.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
from liverank.v1 import ranking_pb2

from server.admission.gate import Admission
from server.batching.base import Priority
from server.errors import Overloaded
from server.recorder import Recorder
from server.rpc.status import refuse

PRIORITY_HEADER = "liverank-priority"
BATCH_THREADS = 8
_PREFIX = f"/{ranking_pb2.DESCRIPTOR.services_by_name['Ranking'].full_name}/"
_RANK = f"{_PREFIX}Rank"


@dataclass(frozen=True)
class Arrival:
    """When a call came in, on the monotonic clock, and its priority."""

    arrived_s: float
    priority: Priority


_ARRIVAL: ContextVar[Arrival] = ContextVar("arrival")


def arrival() -> Arrival:
    """Of the call that this thread handles; as of now when it did not pass admission, as in tests."""
    return _ARRIVAL.get(None) or Arrival(time.monotonic(), Priority.INTERACTIVE)


class CountingPool(ThreadPoolExecutor):
    """Knows how many calls are in it, waiting for a thread or running."""

    def __init__(self, threads: int, name: str) -> None:
        super().__init__(threads, thread_name_prefix=name)
        self._pending = 0
        self._count = threading.Lock()

    @property
    def pending(self) -> int:
        return self._pending

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        with self._count:
            self._pending += 1
        try:
            done = super().submit(fn, *args, **kwargs)
        except BaseException:
            self._finished(None)
            raise
        done.add_done_callback(self._finished)
        return done

    def _finished(self, _: Future[Any] | None) -> None:
        with self._count:
            self._pending -= 1


class _OnTheSpot(ThreadPoolExecutor):
    """Runs what it is given at once, on the thread that gives it: for answers that take microseconds."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


class AdmissionInterceptor(grpc.ServerInterceptor):
    """Put it first: what it turns away costs no authentication either.

    Args:
        threads: interactive calls of Ranking that are handled at once; each waits for its reply in one.
    """

    def __init__(self, admission: Admission, recorder: Recorder, threads: int) -> None:
        self._admission, self._recorder = admission, recorder
        self._pools = {
            Priority.INTERACTIVE: CountingPool(threads, "rank"),
            Priority.BATCH: CountingPool(BATCH_THREADS, "rank-batch"),
        }
        self._on_the_spot = _OnTheSpot(1)

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        """Called for every call, on the thread that polls for them."""
        method = details.method
        if not method.startswith(_PREFIX):
            return continuation(details)
        priority = _priority(method, details.invocation_metadata)
        pending = {p: pool.pending for p, pool in self._pools.items()}
        if (error := self._admission.refuse_unseen(priority, pending)) is not None:
            return self._refusal(method.removeprefix(_PREFIX), error)
        handler = continuation(details)
        if handler is None or handler.unary_unary is None:
            return handler
        _ARRIVAL.set(Arrival(time.monotonic(), priority))  # seen by the handler: grpc runs both in one context
        behaviour = partial(handler.unary_unary)
        behaviour.experimental_thread_pool = self._pools[priority]  # type: ignore[attr-defined]
        return grpc.unary_unary_rpc_method_handler(behaviour, handler.request_deserializer, handler.response_serializer)

    def close(self) -> None:
        """Lets the threads end."""
        for pool in self._pools.values():
            pool.shutdown(wait=False)

    def _refusal(self, method: str, error: Overloaded) -> Any:
        """A handler that answers with the error. It takes a stream, so that grpc does not wait for the message."""

        def answer(_: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
            refuse(self._recorder, method, error, context)

        answer.experimental_thread_pool = self._on_the_spot  # type: ignore[attr-defined]
        return grpc.stream_unary_rpc_method_handler(answer)


def _priority(method: str, metadata: Any) -> Priority:
    """INTERACTIVE for Rank, unless its caller says otherwise."""
    if method != _RANK:
        return Priority.BATCH
    for key, value in metadata:
        if key == PRIORITY_HEADER and value == "batch":
            return Priority.BATCH
    return Priority.INTERACTIVE
