"""The log as a Kafka topic of one partition: many servers write to it, and each applies what it reads.

A record is a batch as it was published; its header ``applied_ms`` is the publisher's clock. The stamp as of which
it is applied is the larger of that and the stamp before it: every reader computes the same. An offset here is
Kafka's plus one, so that 0 means "nothing" as in every log. See docs/adr/0005-kafka-log.md.
"""

from __future__ import annotations

import logging
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from server.config import Settings
from server.errors import ConfigError, Draining, InvalidRequest, LogError
from server.live.event_checks import MAX_TIME_MS
from server.live.events import decode_batch
from server.log.base import Record
from server.log.commit import Committed, Submission

logger = logging.getLogger(__name__)
client_logger = logging.getLogger("librdkafka")

STAMP_HEADER = "applied_ms"
SUBMISSION_HEADER = "submission"
PARTITION = 0
ASK_S = 2.0
"""One try to ask the brokers something."""
MAX_READ = 512
"""Records taken from the client at once."""

Known = Callable[[str, bytes], Submission | None]


def _nobody(token: str, payload: bytes) -> Submission | None:
    """During recovery nobody waits."""
    return None


_GONE = (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE, KafkaError._FATAL)


def client_options(settings: Settings, **more: Any) -> dict[str, Any]:
    """librdkafka properties of every client; ``log.kafka.options`` may add to them, not change what we rely on."""
    kafka = settings.log.kafka
    mine = {"bootstrap.servers": kafka.bootstrap_servers, **more}
    if fixed := sorted(set(mine) & set(kafka.options)):
        raise ConfigError(f"log.kafka.options: {', '.join(fixed)} cannot be changed")
    # Quick to come back, and not a line for every try: what matters is told by the calls that fail.
    return {
        "reconnect.backoff.ms": 50, "reconnect.backoff.max.ms": 1_000, "log.connection.close": False,
        **kafka.options, **mine,
    }  # fmt: skip


class KafkaLog:
    """Reads the topic, in order, from the offset it is told; one thread reads. Offsets may be asked by any.

    Args:
        undecodable: called with a record that nobody can decode, and why; it counts as applied.

    Raises:
        ConfigError: ``log.kafka.options`` is not what librdkafka knows.
    """

    def __init__(self, settings: Settings, undecodable: Callable[[Record, str], None]) -> None:
        self._settings, self._undecodable = settings, undecodable
        self.topic = settings.log.kafka.topic
        self.name = f"kafka:{self.topic}"
        self.gaps = 0
        """Offsets that held no record: Kafka's own markers, or records deleted by compaction."""
        self._stamp_ms = 0
        self._next = 0
        self._stopping = threading.Event()
        options = client_options(
            settings,
            **{
                # Required by the client, never used: no group is joined and no offset is stored at the brokers.
                "group.id": "liverank", "enable.auto.commit": False, "enable.auto.offset.store": False,
                "auto.offset.reset": "error", "enable.partition.eof": True, "isolation.level": "read_committed",
            },
        )  # fmt: skip
        try:
            self._consumer = Consumer(options, logger=client_logger)
            # Asks over connections of its own: a question must not wait behind a fetch that waits for records.
            self._asker = Consumer(options, logger=client_logger)
        except KafkaException as error:
            raise ConfigError(f"log.kafka.options: {error}") from error

    # --- before reading -----------------------------------------------------------------------

    def connect(self, stopping: threading.Event) -> None:
        """Waits for the brokers, then checks the topic. ``stopping`` ends this and every later waiting.

        Raises:
            ConfigError: there is no such topic, or it has more than one partition. Draining: stopped meanwhile.
        """
        self._stopping = stopping
        metadata = self._patiently(lambda: self._asker.list_topics(self.topic, timeout=ASK_S)).topics[self.topic]
        if metadata.error is not None:
            raise ConfigError(f"log.kafka.topic: {self.topic!r} cannot be used: {metadata.error.str()}")
        if len(metadata.partitions) != 1:
            raise ConfigError(
                f"log.kafka.topic: {self.topic!r} has {len(metadata.partitions)} partitions; exactly one is wanted, "
                "because only inside a partition records have one order"
            )

    def _patiently(self, ask: Callable[[], Any]) -> Any:
        told_s = 0.0
        while not self._stopping.is_set():
            try:
                return ask()
            except KafkaException as error:
                if time.monotonic() - told_s > 5.0:
                    told_s = time.monotonic()
                    logger.error("waiting for the brokers of topic %r: %s", self.topic, error)
                self._stopping.wait(0.1)
        raise Draining("stopped while waiting for Kafka")

    def _watermarks(self) -> tuple[int, int]:
        partition = TopicPartition(self.topic, PARTITION)
        low, high = self._patiently(lambda: self._asker.get_watermark_offsets(partition, timeout=ASK_S))
        return int(low), int(high)

    @property
    def first_offset(self) -> int:
        return self._watermarks()[0] + 1

    @property
    def last_offset(self) -> int:
        return self._watermarks()[1]

    def known_last_offset(self) -> int:
        """`last_offset` as of the last answer of the brokers; asks nobody."""
        try:
            _, high = self._consumer.get_watermark_offsets(TopicPartition(self.topic, PARTITION), cached=True)
        except KafkaException:
            return 0
        return max(0, int(high))

    def checksum(self, offset: int) -> int | None:
        low, high = self._watermarks()
        if not low < offset <= high:
            return None
        self._consumer.assign([TopicPartition(self.topic, PARTITION, offset - 1)])
        while not self._stopping.is_set():
            message = self._consumer.poll(0.1)
            if message is None:
                continue
            if message.error() is None:
                return zlib.crc32(message.value() or b"") if message.offset() == offset - 1 else None
            if message.error().code() == KafkaError._PARTITION_EOF:
                return None
            self._raise_if_gone(message.error())
        raise Draining("stopped while reading from Kafka")

    # --- reading ------------------------------------------------------------------------------

    def read(self, after: int, stamp_ms: int) -> Iterator[Committed]:
        high = self.last_offset
        if after > high:
            raise LogError(
                f"{self.name} ends at offset {high}, but the newest snapshot is of {after}: the topic was truncated or "
                "created anew. Move the snapshot folder away to begin from the topic alone"
            )
        self._stamp_ms, self._next = stamp_ms, after
        self._consumer.assign([TopicPartition(self.topic, PARTITION, after)])
        while self._next < high and not self._stopping.is_set():
            yield from self.next_records(0.1)

    def next_records(self, wait_s: float, known: Known = _nobody) -> list[Committed]:
        """What comes next, decoded and stamped; [] when nothing came in time.

        Args:
            known: given a submission's token and bytes, the submission if it is ours and still waited for.

        Raises:
            LogError: the record that comes next does not exist any more, or never did.
        """
        first = self._consumer.poll(wait_s)
        if first is None:
            return []
        found: list[Committed] = []
        for message in (first, *self._consumer.consume(MAX_READ, 0)):
            if message.error() is None:
                found.append(self._admitted(message, known))
            elif message.error().code() == KafkaError._PARTITION_EOF:
                self._next = max(self._next, message.offset())  # Kafka's own markers at the end are no records
            else:
                self._raise_if_gone(message.error())
                logger.warning("reading %s: %s", self.name, message.error().str())
        return found

    def _raise_if_gone(self, error: KafkaError) -> None:
        if error.code() in _GONE:
            raise LogError(f"{self.name}: record {self._next + 1} cannot be read: {error.str()}")

    def _admitted(self, message: Message, known: Known) -> Committed:
        if message.offset() != self._next:
            self.gaps += message.offset() - self._next
            logger.warning("%s: no records at offsets %d to %d", self.name, self._next + 1, message.offset())
        self._next = message.offset() + 1
        payload = message.value() or b""
        submission = known(header(message, SUBMISSION_HEADER), payload)
        try:
            batch = submission.batch if submission else decode_batch(payload, self._settings.table)
        except InvalidRequest as error:
            record = Record(self._next, self._stamp_ms, payload)
            logger.error("%s: record %d cannot be decoded: %s", self.name, self._next, error)
            self._undecodable(record, str(error))
            return Committed(record, None)
        self._stamp_ms = max(self._stamp_ms, stamp_of(message))
        return Committed(Record(self._next, self._stamp_ms, payload), batch, submission)

    def close(self) -> None:
        """Closes the client; idempotent."""
        self._consumer.close()
        self._asker.close()


def header(message: Message, name: str) -> str:
    """A header of a record as text; "" without one."""
    for key, value in message.headers() or ():
        if key == name and value is not None:
            return value.decode("ascii", "replace")
    return ""


def stamp_of(message: Message) -> int:
    """The publisher's stamp; of other people's records the record's own time; 0 when neither makes sense."""
    text = header(message, STAMP_HEADER)
    stamp_ms = int(text) if text.isascii() and text.isdigit() else message.timestamp()[1]
    return stamp_ms if 0 < stamp_ms < MAX_TIME_MS else 0
