"""The feed of ends: a bounded memory of what ended, read by any number of subscribers at their own pace."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice

from server.errors import Draining, ReaderTooSlow, ResumeGone
from server.live.table import End


class EndFeed:
    """Numbers ends from 1 and keeps the newest ``capacity`` of them.

    There is no queue per subscriber: each has a position in the one ring, and is told to resync when the
    ring has moved past it. Numbers follow from the log, so they stay valid across a restart.
    """

    def __init__(self, capacity: int) -> None:
        self._ends: deque[End] = deque(maxlen=capacity)
        self._newest = 0
        self._changed = threading.Condition()
        self._closed = False

    @property
    def newest(self) -> int:
        """Number of the newest end; 0 when there was none."""
        return self._newest

    def publish(self, ends: Iterable[End]) -> None:
        """Appends ends in order and wakes subscribers."""
        with self._changed:
            for end in ends:
                self._ends.append(end)
                self._newest += 1
            self._changed.notify_all()

    def export(self) -> tuple[int, list[End]]:
        """The newest number, and the ends still remembered, oldest first."""
        with self._changed:
            return self._newest, list(self._ends)

    def restore(self, newest: int, ends: Iterable[End]) -> None:
        """Takes over what `export` gave; before anybody reads."""
        with self._changed:
            self._newest = newest
            self._ends.extend(ends)

    def start_after(self, after: int) -> int:
        """Where a subscriber begins: ``after`` itself, or now when it is 0.

        Raises:
            ResumeGone: ends after it are no longer remembered, or it was never reached.
        """
        with self._changed:
            if after == 0:
                return self._newest
            oldest = self._newest - len(self._ends)
            if not oldest <= after <= self._newest:
                raise ResumeGone(f"after_offset: {oldest} to {self._newest} can be resumed, got {after}")
            return after

    def read(self, after: int, alive: Callable[[], bool], most: int = 256) -> list[tuple[int, End]]:
        """Waits for ends after ``after``; returns at most ``most`` of them, numbered, or [] once not alive.

        Raises:
            ReaderTooSlow: the ring has moved past ``after``. Draining: the feed was closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._newest > after or self._closed or not alive())
            if self._newest <= after:
                if self._closed:
                    raise Draining("the server is going away")
                return []
            oldest = self._newest - len(self._ends)
            if after < oldest:
                raise ReaderTooSlow(f"{oldest - after} ends were missed; resync with CheckLive")
            first = after - oldest
            found = islice(self._ends, first, first + most)
            return [(after + 1 + i, end) for i, end in enumerate(found)]

    def wake(self) -> None:
        """Makes waiting subscribers look whether they are still alive."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Ends all subscriptions after what was published."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
