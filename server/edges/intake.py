"""The engine's side of its edges: takes what they ask off their rings, and leaves the answers in them."""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from server.batching.base import Waiting
from server.edges.link import HELLO
from server.edges.records import Asks, pack_gone, pack_headless, pack_refused, pack_reply, reply_heads
from server.edges.ring import RingClosed, RingReader, RingWriter
from server.engine import Engine
from server.errors import LiverankError
from server.ranking.replies import Replies
from server.recorder import Recorder
from server.retrieval.query import RankQuery

logger = logging.getLogger(__name__)

_DESCRIPTORS = 4
FEW = 4
"""Fewer replies are cheaper written one by one than as columns."""


class Intake:
    """Listens on a Unix socket for edges. An edge that goes away takes its calls with it, and nothing else."""

    def __init__(self, path: Path, engine: Engine, recorder: Recorder) -> None:
        self._path, self._engine, self._recorder = path, engine, recorder
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path.unlink(missing_ok=True)  # of an engine that was killed
        self._listening.bind(str(path))
        self._edges: set[_Edge] = set()
        self._reading: tuple[_Edge, ...] = ()  # another one for each change: the engine looks at it without a lock
        self._lock = threading.Lock()
        self._stopping = False
        self._thread = threading.Thread(target=self._accept, name="intake", daemon=True)

    def start(self) -> None:
        self._listening.listen()
        self._engine.on_rules = self._rules_changed
        self._engine.gather = self._gather
        self._thread.start()

    def stop(self) -> None:
        """Lets all edges go."""
        with self._lock:
            self._stopping = True
            edges = list(self._edges)
        self._listening.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listening.close()
        self._path.unlink(missing_ok=True)
        for edge in edges:
            edge.end()
            edge.thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                if self._stopping:
                    return
                raise
            with self._lock:
                if self._stopping:
                    connection.close()
                    return
                edge = _Edge(connection, self._engine, self._recorder, self._changed)
                self._edges.add(edge)
            edge.thread.start()

    def _rules_changed(self) -> None:
        with self._lock:
            edges = list(self._edges)
        for edge in edges:
            edge.tell_surfaces()

    def _gather(self) -> None:
        """Queues what edges ask, on the engine thread: while it ranks nobody is woken for what comes."""
        for edge in self._reading:
            edge.gather()

    def _changed(self, edge: _Edge, reads: bool) -> None:
        """An edge is read from now on, or is gone."""
        with self._lock:
            others = [one for one in self._reading if one is not edge]
            self._reading = (*others, edge) if reads else tuple(others)
            if not reads:
                self._edges.discard(edge)


class _Edge:
    """One edge that is connected."""

    def __init__(
        self, connection: socket.socket, engine: Engine, recorder: Recorder, changed: Callable[[_Edge, bool], None]
    ) -> None:
        self._connection, self._engine, self._recorder, self._changed = connection, engine, recorder, changed
        self._lock = threading.Lock()
        self._waiting: dict[int, RingAnswer] = {}
        self._asks: RingReader | None = None
        self._answers: RingWriter | None = None
        self._unpack = Asks().unpack
        self.thread = threading.Thread(target=self._run, name="edge", daemon=True)

    def end(self) -> None:
        """Cuts the connection; what follows is as if the edge had gone."""
        try:
            self._connection.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            logger.debug("an edge was gone already: %s", error)

    def tell_surfaces(self) -> None:
        """Which surfaces requests may name; one line of JSON, so small that the socket takes it at once."""
        try:
            self._connection.sendall(json.dumps(sorted(self._engine.surfaces)).encode() + b"\n")
        except OSError as error:
            logger.debug("an edge that is gone: %s", error)

    def _run(self) -> None:
        with self._connection as connection:
            try:
                hello, descriptors, _, _ = socket.recv_fds(connection, len(HELLO), _DESCRIPTORS)
                if hello != HELLO or len(descriptors) != _DESCRIPTORS:
                    for descriptor in descriptors:
                        os.close(descriptor)
                    logger.error("something that is no edge of this version connected: %r", hello)
                    return
                self._asks = RingReader(descriptors[0], descriptors[1], waits=False)
                self._answers = RingWriter(*descriptors[2:])
                self._converse(connection, self._asks, self._answers)
            except (OSError, ValueError) as error:
                logger.error("an edge is gone: %s", error)
            finally:
                self._changed(self, False)

    def _converse(self, connection: socket.socket, asks: RingReader, answers: RingWriter) -> None:
        self._changed(self, True)
        try:
            self._engine.watch(asks.event)
            connection.sendall(HELLO)
            self.tell_surfaces()
            connection.recv(1)  # nothing is ever sent: it ends with the edge, or with us
        finally:
            self._changed(self, False)
            self._engine.forget(asks.event)
            asks.release()
            with self._lock:
                left, self._waiting = list(self._waiting.values()), {}
            for answer in left:
                answer.cancel()
            answers.release()
            logger.info("an edge is gone; %d of its calls waited", len(left))

    def gather(self) -> None:
        """Queues what this edge asks now. On the engine thread; a fault in what it wrote costs this edge only."""
        assert self._asks is not None and self._answers is not None
        try:
            messages = self._asks.take_what_is_there()
            if messages:
                self._read(messages, self._answers)
        except RingClosed as closed:
            if closed.args:
                logger.error("an edge wrote no message: %s", closed)
                self.end()
        except (struct.error, ValueError, IndexError):  # ValueError: of bytes that are no text, among others
            logger.exception("an edge wrote no request")
            self.end()

    def _read(self, messages: list[bytes], answers: RingWriter) -> None:
        calls, left = [], []
        for message in messages:
            number, client, priority, arrived_s, query = self._unpack(message)
            if query is None:
                left.append(number)
                continue
            one = RingAnswer(number, answers, self)
            calls.append(Waiting([query], client, priority, arrived_s, query.deadline_s, query.min_offset, one, self))
        self._take(calls)
        for number in left:
            self._leave(number)

    def _take(self, calls: list[Waiting[RankQuery]]) -> None:
        if not calls:
            return
        with self._lock:
            for call in calls:
                assert isinstance(call.done, RingAnswer)
                self._waiting[call.done.number] = call.done
        try:
            taken = self._engine.put(calls)
        except LiverankError as error:
            for call in calls:
                call.done.set_exception(error)
            return
        for call in calls[taken:]:
            call.done.set_exception(self._engine.admission.full(self._engine.queued_rows, call.priority))

    def _leave(self, number: int) -> None:
        with self._lock:
            left = self._waiting.get(number)
        if left is not None:
            left.cancel()

    def fill(self, answers: Sequence[RingAnswer], replies: Sequence[bytes], rows: Sequence[int]) -> None:
        """See `server.batching.base.Tray`."""
        if not isinstance(replies, Replies) or self._answers is None:
            for answer, row in zip(answers, rows, strict=True):
                answer.set_result([replies[row]])
            return
        numbers = [answer.number for answer in answers]
        for answer in answers:
            answer.stopped = True
        with self._lock:
            for number in numbers:
                self._waiting.pop(number, None)
        try:
            put = _put(self._answers, numbers, replies, rows)
        except RingClosed:
            logger.debug("answers for an edge that is gone")
        else:
            self.check_taken(put, len(numbers))

    def check_taken(self, put: int, of: int) -> None:
        """Cuts the edge off when its ring was full."""
        if put < of:
            logger.error("an edge does not take its answers; it is cut off")
            self.end()

    def forget(self, number: int) -> None:
        """The call was answered."""
        with self._lock:
            self._waiting.pop(number, None)


def _put(ring: RingWriter, numbers: list[int], replies: Replies, rows: Sequence[int]) -> int:
    """Writes the replies of these rows for these numbers; returns how many found room."""
    began_s = replies.began_s
    if len(numbers) < FEW:
        return ring.put(
            [
                pack_headless(number, began_s, bool(replies.seen[row]), replies.rest(row))
                for number, row in zip(numbers, rows, strict=True)
            ]
        )
    which = np.array(rows, np.int64)
    heads = reply_heads(numbers, began_s, replies.seen[which] > 0)
    return ring.put_rows(heads, replies.common, replies.streams, replies.offsets, which)


class RingAnswer:
    """Where the engine leaves the reply to a viewer of an edge (`server.batching.base.Answer`): in its ring."""

    __slots__ = ("_answers", "_begun_s", "_edge", "_lock", "_running", "number", "stopped")

    def __init__(self, number: int, answers: RingWriter, edge: _Edge) -> None:
        self.number, self._answers, self._edge = number, answers, edge
        self._lock = threading.Lock()
        self._running = self.stopped = False
        self._begun_s = 0.0

    def set_running_or_notify_cancel(self) -> bool:
        with self._lock:
            self._running, self._begun_s = not self.stopped, time.monotonic()
            return self._running

    def cancel(self) -> bool:
        """Nobody waits any more, or its deadline passed."""
        with self._lock:
            if self._running or self.stopped:
                return False
            self.stopped = True
        self._send(pack_gone(self.number))
        return True

    def cancelled(self) -> bool:
        return self.stopped and not self._running

    def done(self) -> bool:
        return self.stopped

    def set_result(self, replies: Sequence[bytes], /) -> None:
        self._send(pack_reply(self.number, self._begun_s, replies[0]))

    def set_exception(self, error: BaseException, /) -> None:
        self._send(pack_refused(self.number, error))

    def _send(self, message: bytes) -> None:
        self.stopped = True
        self._edge.forget(self.number)
        try:
            self._edge.check_taken(self._answers.put([message]), 1)
        except RingClosed:
            logger.debug("an answer for an edge that is gone")
