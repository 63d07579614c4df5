"""The way of a batch through Kafka: written by an idempotent producer, applied when it is read back.

Table time is the stamp of the newest applied record and nothing else, so every server has the same table at the same
offset, whatever its clock. A log that is silent gets an empty record now and then, so that leases end in time.
"""

from __future__ import annotations

import functools
import itertools
import logging
import threading
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message, Producer
from liverank.v1 import ingest_pb2

from server.clock import Clock
from server.config import Settings
from server.errors import ConfigError, Draining, LogError, Overloaded, Refused
from server.log.base import Record
from server.log.commit import MAX_WAITING, TIME_PRODUCER, Committed, Submission
from server.log.kafka import (
    PARTITION,
    STAMP_HEADER,
    SUBMISSION_HEADER,
    KafkaLog,
    client_logger,
    client_options,
)
from server.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

MAX_UNAPPLIED_GROUPS = 64
POLL_S = 0.02


@dataclass
class _Pending:
    """A submission on its way. It is done when the brokers have it and the engine has applied it."""

    submission: Submission
    applied: Future[object] = field(default_factory=Future)
    delivered: bool = False


class KafkaCommit:
    """`CommitPath` over Kafka.

    Args:
        committed: called from the reader thread with records, in log order.
        on_fault: called once if reading cannot go on.

    Raises:
        ConfigError: ``log.kafka.options`` is not what librdkafka knows.
    """

    def __init__(
        self,
        settings: Settings,
        clock: Clock,
        metrics: Metrics,
        committed: Callable[[list[Committed]], None],
        on_fault: Callable[[], None],
    ) -> None:
        self.log = KafkaLog(settings, self._dead_letter)
        self._kafka, self._clock, self._metrics = settings.log.kafka, clock, metrics
        self._committed, self._on_fault = committed, on_fault
        self._dead_letters = self._kafka.dead_letter_topic or f"{self.log.topic}-dead-letters"
        self._producer = _producer(settings) if self._kafka.publish else None
        self._name, self._numbers = uuid.uuid4().hex, itertools.count()
        self._lock = threading.Condition()
        self._pending: dict[str, _Pending] = {}
        self._unapplied: deque[int] = deque()  # the last stamp of each group the engine has yet to apply
        self._settled_ms = self._newest_ms = 0
        self._time_record_out = False
        self._time_record_ms = 0
        self._started = self._stopping = False
        self._ended = threading.Event()
        self._reader = threading.Thread(target=self._run, name="log-reader", daemon=True)
        self._poller = threading.Thread(target=self._poll, name="log-writer", daemon=True)

    def start(self, offset: int, stamp_ms: int) -> None:
        """Goes on reading where recovery stopped. Everything up to ``stamp_ms`` is settled."""
        with self._lock:
            self._settled_ms = self._newest_ms = stamp_ms
            self._started = True
        self._reader.start()
        self._poller.start()

    def submit(self, submission: Submission) -> None:
        """Sends a batch; ``done`` resolves when the brokers have it and it was read back and applied.

        Raises:
            Refused: this server only follows. Draining: it starts or stops. Overloaded: too much is on its way.
            LogError: the brokers will never take it.
        """
        if self._producer is None:
            raise Refused("this server follows the log and publishes nothing (log.kafka.publish = false)")
        with self._lock:
            if self._stopping:
                raise Draining("the log is closed for writing")
            if not self._started:
                raise Draining("the server is starting: it recovers its table from the log")
            if len(self._pending) >= MAX_WAITING:
                raise Overloaded(f"{MAX_WAITING} batches are already on their way to Kafka")
            token = f"{self._name}-{next(self._numbers)}"
            pending = self._pending[token] = _Pending(submission)
            pending.applied.add_done_callback(lambda _: self._settle(token))
            try:
                self._send(token, submission.payload, functools.partial(self._delivered, token))
            except BaseException:
                del self._pending[token]
                raise

    def _send(self, token: str, payload: bytes, delivered: Callable[[KafkaError | None, Message], None]) -> None:
        assert self._producer is not None
        headers = [(STAMP_HEADER, str(self._clock.now_ms()).encode()), (SUBMISSION_HEADER, token.encode())]
        try:
            self._producer.produce(
                self.log.topic, payload, partition=PARTITION, headers=headers, on_delivery=delivered
            )  # fmt: skip
        except BufferError as error:
            raise Overloaded("the Kafka client's queue is full") from error
        except KafkaException as error:
            raise LogError(f"{self.log.name}: {error.args[0].str()}") from error

    def _delivered(self, token: str, error: KafkaError | None, message: Message) -> None:
        with self._lock:
            pending = self._pending.get(token)
            if pending is None:
                return
            if error is None:
                pending.delivered = True
            elif not pending.applied.done():  # once read back it is in the log, whatever became of the answer
                del self._pending[token]
                self._lock.notify_all()
        if error is None:
            self._settle(token)
        elif not pending.applied.done():
            self._metrics.log_errors.labels("kafka").inc()
            pending.submission.done.set_exception(
                LogError(f"{self.log.name}: {error.str()}; the batch may or may not be in the log, send it again")
            )
        else:
            pending.delivered = True
            self._settle(token)

    def _settle(self, token: str) -> None:
        with self._lock:
            pending = self._pending.get(token)
            if pending is None or not pending.applied.done():
                return
            fault = pending.applied.exception()
            if fault is None and not pending.delivered:
                return
            del self._pending[token]
            self._lock.notify_all()  # `stop` waits for the last of them
        if fault is not None:
            pending.submission.done.set_exception(fault)
        else:
            pending.submission.done.set_result(pending.applied.result())

    def settled_ms(self) -> int:
        """The stamp of the newest applied record."""
        with self._lock:
            return self._settled_ms

    def applied(self, groups: int) -> None:
        """The engine has applied this many groups more."""
        with self._lock:
            for _ in range(groups):
                self._settled_ms = self._unapplied.popleft()
            self._lock.notify_all()

    def stop(self) -> None:
        """Waits for what is on its way, not longer than ``ack_timeout_ms``; then ends both threads."""
        with self._lock:
            self._stopping = True
            self._lock.wait_for(lambda: not self._pending, self._kafka.ack_timeout_ms / 1000)
            abandoned = list(self._pending.values())
            self._pending.clear()
            self._lock.notify_all()
        for pending in abandoned:
            pending.submission.done.set_exception(Draining("the server is going away; send the batch again"))
        self._ended.set()
        if self._started:
            self._reader.join()
            self._poller.join()
        self.log.close()

    # --- the reader thread --------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._ended.is_set():
                with self._lock:
                    if not self._lock.wait_for(lambda: len(self._unapplied) < MAX_UNAPPLIED_GROUPS, POLL_S):
                        continue
                self._read(self.log.next_records(POLL_S, self._known))
        except Exception:
            logger.critical("the log reader gives up", exc_info=True)
            with self._lock:
                self._stopping = True
                abandoned = list(self._pending.values())
                self._pending.clear()
            for pending in abandoned:
                pending.submission.done.set_exception(Draining("the log failed; the server is going away"))
            self._on_fault()

    def _read(self, records: list[Committed]) -> None:
        if not records:
            return
        lag = self.log.known_last_offset() - records[-1].record.offset
        self._metrics.recovery_lag_records.set(max(0, lag))
        self._metrics.log_gaps.set(self.log.gaps)
        newest_ms = records[-1].record.applied_ms
        self._metrics.log_lead_seconds.set((newest_ms - self._clock.now_ms()) / 1000)
        with self._lock:
            self._newest_ms = newest_ms
            self._unapplied.append(newest_ms)
        self._committed(records)

    def _known(self, token: str, payload: bytes) -> Submission | None:
        """Our own submission, with a future that the engine resolves: it is not the caller's yet."""
        with self._lock:
            pending = self._pending.get(token)
        if pending is None or pending.submission.payload != payload:
            return None
        return replace(pending.submission, done=pending.applied)

    # --- the writer thread --------------------------------------------------------------------

    def _poll(self) -> None:
        """Receives the brokers' answers; lets time go on in a silent log."""
        if self._producer is None:
            return
        while not self._ended.is_set():
            self._producer.poll(POLL_S)
            with self._lock:
                now_ms = self._clock.now_ms()
                silent_ms = now_ms - max(self._newest_ms, self._time_record_ms)
                due = silent_ms >= self._kafka.time_record_ms and not (self._time_record_out or self._stopping)
                if due:
                    self._time_record_out, self._time_record_ms = True, now_ms
            if due:
                self._send_time_record()
        self._producer.flush(self._kafka.ack_timeout_ms / 1000)

    def _send_time_record(self) -> None:
        def delivered(error: KafkaError | None, message: Message) -> None:
            with self._lock:
                self._time_record_out = False

        try:
            self._send("", ingest_pb2.EventBatch(producer_id=TIME_PRODUCER).SerializeToString(), delivered)
        except (Overloaded, LogError) as error:
            delivered(None, None)
            logger.warning("no time record: %s", error)

    def _dead_letter(self, record: Record, reason: str) -> None:
        """Keeps what nobody can decode. At least once: its key is topic/partition/offset, to tell copies by."""
        self._metrics.log_dead_letters.inc()
        if self._producer is None:
            return

        def delivered(error: KafkaError | None, message: Message) -> None:
            if error is not None:
                logger.error("record %d did not reach %s: %s", record.offset, self._dead_letters, error.str())

        key = f"{self.log.topic}/{PARTITION}/{record.offset - 1}"
        try:
            self._producer.produce(
                self._dead_letters, record.payload, key=key, headers=[("error", reason.encode())], on_delivery=delivered
            )
        except (BufferError, KafkaException) as error:
            logger.error("record %d did not reach %s: %s", record.offset, self._dead_letters, error)


def _producer(settings: Settings) -> Any:
    options = client_options(
        settings,
        **{
            "enable.idempotence": True, "acks": "all", "linger.ms": 0,
            "message.timeout.ms": settings.log.kafka.ack_timeout_ms,
            "message.max.bytes": settings.serve.max_message_bytes + 65_536,
        },
    )  # fmt: skip
    try:
        return Producer(options, logger=client_logger)
    except KafkaException as error:
        raise ConfigError(f"log.kafka.options: {error}") from error
