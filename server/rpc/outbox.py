"""Calls that came off the wire in one go, for whoever ranks: one lock and one wake-up for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from server.batching.base import Waiting

MOST_CALLS, MOST_S = 32, 0.0003
"""When calls come without a pause, so many, or so long, are held back at most."""


class Outbox:
    """Holds calls back until the thread that reads them finds no more waiting. For one thread.

    Args:
        put: takes them.
    """

    def __init__(self, put: Callable[[list[Waiting[Any]]], None]) -> None:
        self._put = put
        self.calls: list[Waiting[Any]] = []
        self._since_s = 0.0

    def add(self, call: Waiting[Any]) -> None:
        """Holds a call back; the reading thread must `flush`, or look whether that is `due`, before it waits."""
        if not self.calls:
            self._since_s = time.monotonic()
        self.calls.append(call)

    @property
    def due(self) -> bool:
        """Whether enough was held back."""
        return len(self.calls) >= MOST_CALLS or time.monotonic() - self._since_s > MOST_S

    def flush(self) -> None:
        """Hands over what there is."""
        if self.calls:
            calls, self.calls = self.calls, []
            self._put(calls)
