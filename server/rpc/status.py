"""Errors to gRPC statuses: one table, one decorator around every method."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import grpc

from server.errors import (
    ConfigError,
    Draining,
    Forbidden,
    InvalidRequest,
    LiverankError,
    LogError,
    LogFull,
    NotFound,
    OffsetNotReached,
    Overloaded,
    RateLimited,
    ReaderTooSlow,
    Refused,
    ResumeGone,
    ScoringError,
    SnapshotError,
    StoreError,
    Unauthenticated,
)
from server.recorder import Recorder
from server.rpc.direct import Refusal

logger = logging.getLogger(__name__)

PUSHBACK = "grpc-retry-pushback-ms"
"""Trailing metadata that gRPC clients with a retry policy obey by themselves."""
RETRY_MS = 1_000
"""When to come back where the error does not say: a disk does not empty itself within milliseconds."""
STATUS: dict[type[LiverankError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    ConfigError: grpc.StatusCode.INVALID_ARGUMENT,  # only reload_rules reads a file on behalf of a caller
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    Forbidden: grpc.StatusCode.PERMISSION_DENIED,
    NotFound: grpc.StatusCode.NOT_FOUND,
    Refused: grpc.StatusCode.FAILED_PRECONDITION,
    OffsetNotReached: grpc.StatusCode.FAILED_PRECONDITION,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    RateLimited: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ResumeGone: grpc.StatusCode.OUT_OF_RANGE,
    ReaderTooSlow: grpc.StatusCode.ABORTED,
    Draining: grpc.StatusCode.UNAVAILABLE,
    LogError: grpc.StatusCode.UNAVAILABLE,
    LogFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    SnapshotError: grpc.StatusCode.INTERNAL,  # the server goes on without it; if one escapes it is a bug
    StoreError: grpc.StatusCode.INTERNAL,  # likewise
    ScoringError: grpc.StatusCode.INTERNAL,  # the ladder keeps these from callers; if one escapes it is a bug
    LiverankError: grpc.StatusCode.INTERNAL,
}
_SHED = STATUS[Overloaded]


class CallerGone(Exception):
    """The caller's deadline passed or it cancelled; nobody reads the answer."""


def status_of(error: LiverankError) -> grpc.StatusCode:
    """The status of the nearest class in the table."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    """Maps errors of a unary method to statuses; nothing a caller sends may end in an unlogged fault."""

    @functools.wraps(method)
    def call(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return method(self, request, context)
        except Exception as error:  # noqa: BLE001 - mapped, or logged with its traceback
            refuse(self.recorder, method.__name__, error, context)

    return call


def guarded_stream(method: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """`guarded` for methods that yield."""

    @functools.wraps(method)
    def call(self: Any, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            yield from method(self, request, context)
        except grpc.RpcError:  # the caller cancelled or vanished while we waited for its next message
            self.recorder.refused(method.__name__, grpc.StatusCode.CANCELLED.name)
        except Exception as error:  # noqa: BLE001 - mapped, or logged with its traceback
            refuse(self.recorder, method.__name__, error, context)

    return call


def refuse(recorder: Recorder, method: str, error: Exception, context: grpc.ServicerContext) -> NoReturn:
    """Ends the call with the error's status, counted; never returns."""
    refusal = verdict(recorder, method, error)
    if refusal.trailing:
        context.set_trailing_metadata(refusal.trailing)
    context.abort(refusal.code, refusal.details)
    raise AssertionError("abort raises")


def verdict(recorder: Recorder, method: str, error: Exception) -> Refusal:
    """The status that an error ends a call with; counted, and logged if it was not meant to happen."""
    if isinstance(error, LiverankError):
        code, message = status_of(error), str(error)
    elif isinstance(error, CallerGone):
        code, message = grpc.StatusCode.DEADLINE_EXCEEDED, "the caller stopped waiting"
    else:
        logger.error("unexpected fault in %s", method, exc_info=error)
        code, message = grpc.StatusCode.INTERNAL, f"{method}: internal fault; see the server's log"
    recorder.refused(method, code.name)
    logger.debug("%s: %s: %s", method, code.name, message)  # messages repeat no viewer id and no token
    if code is not grpc.StatusCode.RESOURCE_EXHAUSTED:
        return Refusal(code, message)
    retry_ms = error.retry_ms if isinstance(error, Overloaded) else RETRY_MS
    return Refusal(code, message, ((PUSHBACK, str(retry_ms)),))


def turned_away(recorder: Recorder, method: str, error: Overloaded) -> Refusal:
    """`verdict` for what admission sheds, without looking anything up: under overload, thousands of times a second."""
    recorder.refused(method, _SHED.name)
    return Refusal(_SHED, error.args[0], ((PUSHBACK, str(error.retry_ms)),))
