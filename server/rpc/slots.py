"""A bound on open streaming calls, and how they end when the server drains.

Each streaming call holds a server thread for as long as it lives, idle or not.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from server.errors import Draining, Overloaded


class StreamPlace:
    """One open streaming call. ``busy`` is true while it owes its caller an answer."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        self.context = context
        self.busy = False


class StreamSlots:
    """At most ``most`` streaming calls at once, so that they can never take the threads of unary calls."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: set[StreamPlace] = set()
        self._lock = threading.Lock()
        self._closed = False

    @contextmanager
    def open(self, method: str, context: grpc.ServicerContext) -> Iterator[StreamPlace]:
        """Holds a place while the call lives. Raises Overloaded when there is none, Draining after close."""
        place = StreamPlace(context)
        with self._lock:
            if self._closed:
                raise Draining("the server is draining")
            if len(self._open) >= self._most:
                raise Overloaded(f"{method}: {self._most} streaming calls are open already")
            self._open.add(place)
        try:
            yield place
        finally:
            with self._lock:
                self._open.discard(place)

    @contextmanager
    def answering(self, place: StreamPlace) -> Iterator[None]:
        """Marks that the caller is owed an answer; raises Draining afterwards if the server drains."""
        with self._lock:
            place.busy = True
        try:
            yield
        finally:
            with self._lock:
                place.busy = False
        if self._closed:
            raise Draining("the server is draining")

    def close(self) -> None:
        """No new calls; idle ones are cancelled (they would wait for their caller for ever), busy ones
        end after the answer they owe."""
        with self._lock:
            self._closed = True
            idle = [place.context for place in self._open if not place.busy]
        for context in idle:
            context.cancel()
