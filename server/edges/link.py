"""An edge's way to the engine: two rings, and a socket whose end tells that the other process is gone."""

from __future__ import annotations

import itertools
import json
import logging
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from server.admission.gate import Admission
from server.batching.base import Answer, Priority, Waiting
from server.config import Settings
from server.edges.records import AnswerKind, pack_ask, pack_leave, unpack_answer, unpack_error
from server.edges.ring import RingClosed, RingReader, RingWriter, new_ring
from server.errors import Draining
from server.retrieval.query import RankQuery

logger = logging.getLogger(__name__)

A = TypeVar("A", bound=Answer)

ASKS_BYTES, ANSWERS_BYTES = 8 << 20, 32 << 20
"""Room in the rings; more than fits is refused there, and cut off here."""
RETRY_S = 0.05
HELLO = b"liverank-edge/1"


@dataclass(frozen=True, slots=True)
class _Pending:
    answer: Answer
    waiting: Waiting[RankQuery]


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
        self._pending: dict[int, _Pending] = {}
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
    def waiting(self) -> int:
        """Calls that the engine has."""
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
        answers = [answer() for _ in queries]
        numbers = [next(self._numbers) for _ in queries]
        messages = [
            pack_ask(number, client, priority, arrived_s, query) for number, query in zip(numbers, queries, strict=True)
        ]
        with self._lock:
            if self._asks is None:
                raise Draining("the engine is being restarted")
            for number, query, one in zip(numbers, queries, answers, strict=True):
                waiting = Waiting([query], client, priority, arrived_s, query.deadline_s, query.min_offset, one)
                self._pending[number] = _Pending(one, waiting)
            written = self._asks.put(messages)
            for number in numbers[written:]:
                del self._pending[number]
        if written < len(messages):
            self._leave(numbers[:written])
            raise self.admission.full(len(self._pending), priority)
        for number, one in zip(numbers, answers, strict=True):
            one.add_done_callback(lambda done, number=number: self._left(done, number))  # type: ignore[attr-defined]
        return answers

    def _left(self, done: Answer, number: int) -> None:
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
            for pending in lost:
                if pending.answer.set_running_or_notify_cancel():
                    pending.answer.set_exception(Draining("the engine went away; it is being restarted"))
            if not self._stopping.is_set():
                logger.error("the engine is gone; %d calls were with it", len(lost))

    def _read_answers(self, answers: RingReader) -> None:
        try:
            while True:
                for message in answers.take():
                    self._hand_out(*unpack_answer(message))
        except RingClosed as closed:
            if closed.args:
                logger.error("answers from the engine: %s", closed)

    def _hand_out(self, number: int, begun_s: float, kind: AnswerKind, rest: bytes) -> None:
        with self._lock:
            pending = self._pending.pop(number, None)
        if pending is None:  # it left
            return
        if kind is AnswerKind.GONE:
            pending.answer.cancel()
            return
        if not pending.answer.set_running_or_notify_cancel():
            return
        if kind is AnswerKind.REPLY:
            self.admission.answered([pending.waiting], begun_s)
            pending.answer.set_result([rest])
        else:
            pending.answer.set_exception(unpack_error(rest))
