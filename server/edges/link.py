"""An edge's way to the engine: two rings, and a socket whose end tells that the other process is gone."""

from __future__ import annotations

import itertools
import json
import logging
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TypeVar

from server.admission.gate import Admission
from server.batching.base import Answer, Priority, Waiting
from server.config import Settings
from server.edges.records import AnswerKind, Asks, Reply, pack_leave, unpack_answer, unpack_error
from server.edges.ring import RingClosed, RingReader, RingWriter, new_ring
from server.errors import Draining
from server.ranking.replies import head_of
from server.retrieval.query import RankQuery

logger = logging.getLogger(__name__)

A = TypeVar("A", bound=Answer)

ASKS_BYTES, ANSWERS_BYTES = 8 << 20, 32 << 20
"""Room in the rings; more than fits is refused there, and cut off here."""
RETRY_S = 0.05
HELLO = b"liverank-edge/2"


class EngineLink:
    """Takes viewers to the engine, in another process, as `Engine.rank` would. Thread-safe.

    While there is no engine every call is refused with Draining, and a new one is looked for; calls that were with
    the old one get the same.

    Args:
        path: of the engine's socket.
        on_change: told whether there is an engine, from a thread of its own.
    """

    def __init__(self, path: Path, settings: Settings, admission: Admission, on_change: Callable[[bool], None]) -> None:
        self.settings, self.admission = settings, admission
        self._path, self._on_change = path, on_change
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._packing = Asks()
        self._pending: dict[int, Waiting[RankQuery]] = {}  # of one viewer each
        self._asks: RingWriter | None = None
        self.surfaces: frozenset[str] | None = None
        """Names that a request may give, as the engine told them last."""
        self._stopping = threading.Event()
        self._socket: socket.socket | None = None
        self._thread = threading.Thread(target=self._keep_connected, name="engine-link", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the link; whoever waits is told."""
        self._stopping.set()
        with self._lock:
            connection = self._socket
        if connection is not None:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError as error:
                logger.debug("the engine was gone already: %s", error)
        self._thread.join()

    @property
    def queued_rows(self) -> int:
        """Viewers that the engine has."""
        return len(self._pending)

    def rank(
        self,
        queries: list[RankQuery],
        client: str = "",
        priority: Priority = Priority.INTERACTIVE,
        arrived_s: float | None = None,
        answer: Callable[[], A] = Future,  # type: ignore[assignment]
    ) -> list[A]:
        """See `server.engine.Engine.rank`; one answer per viewer here.

        Raises:
            Overloaded: there is no room left on the way to the engine. Draining: there is no engine.
        """
        assert arrived_s is not None
        calls = [
            Waiting([query], client, priority, arrived_s, query.deadline_s, query.min_offset, answer())
            for query in queries
        ]
        written = self.put(calls)
        answers: list[A] = [call.done for call in calls]  # type: ignore[misc]
        if written < len(calls):
            for one in answers[:written]:
                one.cancel()
            raise self.admission.full(len(self._pending), priority)
        return answers

    def put(self, calls: Sequence[Waiting[RankQuery]]) -> int:
        """See `server.engine.Engine.put`."""
        numbers = [next(self._numbers) for _ in calls]
        messages = [
            self._packing.pack(number, call.client, call.priority, call.arrived_s, call.rows[0])
            for number, call in zip(numbers, calls, strict=True)
        ]
        with self._lock:
            if self._asks is None:
                raise Draining("the engine is being restarted")
            self._pending.update(zip(numbers, calls, strict=True))
            written = self._asks.put(messages)
            for number in numbers[written:]:
                del self._pending[number]
        for number, call in zip(numbers[:written], calls, strict=False):
            call.done.add_done_callback(partial(self._left, number))  # type: ignore[attr-defined]
        return written

    def _left(self, number: int, done: Answer) -> None:
        if done.cancelled():
            self._leave([number])

    def _leave(self, numbers: list[int]) -> None:
        with self._lock:
            gone = [number for number in numbers if self._pending.pop(number, None) is not None]
            if gone and self._asks is not None:
                self._asks.put([pack_leave(number) for number in gone])  # no room: it is ranked for nobody

    # --- the thread that keeps the link -------------------------------------------------------

    def _keep_connected(self) -> None:
        while not self._stopping.is_set():
            try:
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                with connection:
                    connection.connect(str(self._path))
                    self._converse(connection)
            except OSError as error:
                logger.debug("no engine at %s: %s", self._path, error)
            self._stopping.wait(RETRY_S)

    def _converse(self, connection: socket.socket) -> None:
        """Makes the rings, hands them over, and stays until either side ends."""
        asks, answers = RingWriter(*new_ring(ASKS_BYTES)), RingReader(*new_ring(ANSWERS_BYTES))
        socket.send_fds(connection, [HELLO], [asks.memory, asks.event, answers.memory, answers.event])
        reading = threading.Thread(target=self._read_answers, args=(answers,), name="answers", daemon=True)
        try:
            told = connection.makefile("rb")
            if told.read(len(HELLO)) != HELLO:
                return
            first = told.readline()
            if not first.endswith(b"\n"):
                return
            self.surfaces = frozenset(json.loads(first))
            with self._lock:
                self._asks, self._socket = asks, connection
            reading.start()
            logger.info("connected to the engine")
            self._on_change(True)
            for line in told:  # until the engine ends, or we do
                if line.endswith(b"\n"):
                    self.surfaces = frozenset(json.loads(line))
        finally:
            with self._lock:
                self._asks = self._socket = None
                lost, self._pending = list(self._pending.values()), {}
            self._on_change(False)
            answers.wake()
            if reading.ident is not None:
                reading.join()
            asks.release()
            answers.release()
            for call in lost:
                if call.done.set_running_or_notify_cancel():
                    call.done.set_exception(Draining("the engine went away; it is being restarted"))
            if not self._stopping.is_set():
                logger.error("the engine is gone; %d calls were with it", len(lost))

    def _read_answers(self, answers: RingReader) -> None:
        try:
            while True:
                self._hand_out([unpack_answer(message) for message in answers.take()])
        except RingClosed as closed:
            if closed.args:
                logger.error("answers from the engine: %s", closed)

    def _hand_out(self, replies: list[Reply]) -> None:
        """Answers all that came with one wake-up."""
        with self._lock:
            calls = [self._pending.pop(reply.number, None) for reply in replies]
        ranked: dict[float, list[Waiting[RankQuery]]] = {}  # by when their batch began
        answered: list[tuple[Waiting[RankQuery], Reply]] = []
        for call, reply in zip(calls, replies, strict=True):
            if call is None:  # it left
                continue
            if reply.kind is AnswerKind.GONE:
                call.done.cancel()
            elif call.done.set_running_or_notify_cancel():
                answered.append((call, reply))
                if reply.kind is not AnswerKind.REFUSED:
                    ranked.setdefault(reply.begun_s, []).append(call)
        for begun_s, together in ranked.items():
            self.admission.answered(together, begun_s)
        for call, reply in answered:
            if reply.kind is AnswerKind.REFUSED:
                call.done.set_exception(unpack_error(reply.rest))
            elif reply.kind is AnswerKind.HEADLESS:
                call.done.set_result([head_of(call.rows[0], reply.begun_s, reply.seen) + reply.rest])
            else:
                call.done.set_result([reply.rest])
