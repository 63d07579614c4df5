"""Group commit: many waiting batches, one fsync, and one stamp of time for all of them.

Owns the order of the log. Producers submit; one thread writes; the engine is handed what became
durable, in order. `settled_ms` tells the engine how far table time may advance without running
ahead of a batch that is stamped but not yet applied: that keeps recovery bit-identical.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from server.clock import Clock
from server.errors import Draining, LogError, Overloaded
from server.live.events import DecodedBatch
from server.log.base import EventLog, Record

logger = logging.getLogger(__name__)

MAX_WAITING = 4096
TIME_PRODUCER = "liverank-time"
"""Under which a Kafka log gets its empty records."""


@dataclass(frozen=True)
class Submission:
    """A decoded batch on its way to the log and the table. ``done`` resolves when it was applied."""

    payload: bytes
    batch: DecodedBatch
    received_ms: int
    done: Future[object]


@dataclass(frozen=True)
class Committed:
    """A durable record. batch: what to apply; None when nobody can decode it (only its offset counts).
    submission: who waits for it; None when it was read from the log."""

    record: Record
    batch: DecodedBatch | None
    submission: Submission | None = None


class CommitPath(Protocol):
    """Makes submissions durable and hands them to the engine in the order of the log."""

    def start(self, offset: int, stamp_ms: int) -> None:
        """Begins after the recovered record ``offset``; no stamp will be below ``stamp_ms``."""
        ...

    def submit(self, submission: Submission) -> None:
        """Queues a batch. Raises Draining, Overloaded, Refused."""
        ...

    def settled_ms(self) -> int:
        """The latest time to which the table may be advanced now; never decreases."""
        ...

    def applied(self, groups: int) -> None:
        """The engine has applied this many groups more."""
        ...

    def stop(self) -> None:
        """Finishes what is under way, then ends."""
        ...


class GroupCommit:
    """The writer thread of an event log.

    Args:
        committed: called from the writer thread with what became durable, in log order.
        on_fault: called once, from the writer thread, if it must give up on a fault of our own.
        on_refused: called from the writer thread when a group could not be written.
    """

    def __init__(
        self,
        log: EventLog,
        clock: Clock,
        group_rows: int,
        committed: Callable[[list[Committed]], None],
        on_fault: Callable[[], None] = lambda: None,
        on_refused: Callable[[LogError], None] = lambda error: None,
    ) -> None:
        self._log, self._clock, self._group_rows, self._committed = log, clock, group_rows, committed
        self._wake = threading.Condition()
        self._waiting: deque[Submission] = deque()
        self._unapplied: deque[int] = deque()  # stamps of groups written or being written, not yet applied
        self._offset = self._stamp_ms = 0
        self._group: list[Submission] = []  # being written
        self._on_fault, self._on_refused = on_fault, on_refused
        self._started = self._stopping = False
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)

    def start(self, offset: int, stamp_ms: int) -> None:
        """Begins to write after record ``offset``; no stamp will be below ``stamp_ms``."""
        with self._wake:
            self._offset, self._stamp_ms, self._started = offset, stamp_ms, True
        self._clock.not_before(stamp_ms)  # else leases would stand still until the clock gets there
        self._thread.start()

    def submit(self, submission: Submission) -> None:
        """Queues a batch.

        Raises:
            Draining: the writer was not started yet, or stopped. Overloaded: too many batches are waiting.
        """
        with self._wake:
            if self._stopping:
                raise Draining("the log is closed for writing")
            if not self._started:
                raise Draining("the server is starting: it recovers its table from the log")
            if len(self._waiting) >= MAX_WAITING:
                raise Overloaded(f"{MAX_WAITING} batches are already waiting for the log")
            self._waiting.append(submission)
            self._wake.notify()

    def settled_ms(self) -> int:
        """The latest time to which the table may be advanced now; never decreases."""
        with self._wake:
            if self._unapplied:
                return self._unapplied[0]
            # Batches stamped from here on are stamped at least this late.
            self._stamp_ms = max(self._stamp_ms, self._clock.now_ms())
            return self._stamp_ms

    def applied(self, groups: int) -> None:
        """The engine has applied this many groups more."""
        with self._wake:
            for _ in range(groups):
                self._unapplied.popleft()

    def stop(self) -> None:
        """Writes what is waiting, then ends the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._started:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._write()
        except Exception:
            logger.critical("the log writer gives up", exc_info=True)
            with self._wake:
                self._stopping = True
                abandoned = [*self._group, *self._waiting]
                self._waiting.clear()
            for submission in abandoned:
                if not submission.done.done():
                    submission.done.set_exception(Draining("the log failed; the server is going away"))
            self._on_fault()

    def _write(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._waiting or self._stopping)
                if not self._waiting:
                    return
                size = min(len(self._waiting), self._group_rows)
                group = self._group = [self._waiting.popleft() for _ in range(size)]
                self._stamp_ms = max(self._stamp_ms, self._clock.now_ms())
                stamp_ms = self._stamp_ms
                self._unapplied.append(stamp_ms)
            records = [Record(self._offset + 1 + i, stamp_ms, submission.payload) for i, submission in enumerate(group)]
            try:
                self._log.append(records)
            except LogError as error:
                logger.error("refusing %d batches: %s", len(group), error)
                self._on_refused(error)
                with self._wake:
                    self._unapplied.pop()
                for submission in group:
                    submission.done.set_exception(error)
                continue
            self._offset += len(records)
            self._committed([Committed(r, s.batch, s) for r, s in zip(records, group, strict=True)])
