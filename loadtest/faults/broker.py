"""A Kafka broker for fault scenarios and tests: librdkafka's built-in one, with the real protocol over loopback TCP.

It is not Apache Kafka: one process, nothing on disk, no replication. The clients talking to it are the real ones.
Run as a program it is the child process that holds the broker and obeys commands on its standard input.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from loadtest.processes import ROOT


@dataclass(frozen=True)
class Broker:
    """A running broker. ``servers``: for bootstrap.servers."""

    servers: str
    process: subprocess.Popen[str]

    def tell(self, command: str) -> None:
        """Sends a command of `_obey` and waits until it is carried out."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        assert answer == "0", f"{command}: {answer!r}"

    def create(self, topic: str, partitions: int = 1) -> None:
        """Makes a topic."""
        self.tell(f"create {topic} {partitions}")

    def down(self) -> None:
        """Closes the port and every connection; what was written stays."""
        self.tell("down")

    def up(self) -> None:
        """Listens again, on the same port."""
        self.tell("up")

    def delete_before(self, topic: str, offset: int) -> None:
        """Retention: drops the records before a Kafka offset."""
        self.tell(f"delete {topic} {offset}")


@contextmanager
def running_broker(*topics: str) -> Iterator[Broker]:
    """A broker with ``topics`` of one partition each."""
    process = subprocess.Popen(
        [sys.executable, "-m", "loadtest.faults.broker"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout is not None and process.stdin is not None
    try:
        broker = Broker(process.stdout.readline().strip(), process)
        for topic in topics:
            broker.create(topic)
        yield broker
    finally:
        process.stdin.close()
        process.kill()
        process.wait(10)
        process.stdout.close()


def _library() -> ctypes.CDLL:
    """The librdkafka that confluent-kafka brought along: its test broker has no Python interface."""
    spec = find_spec("confluent_kafka")
    assert spec is not None and spec.origin is not None
    import confluent_kafka

    assert isinstance(confluent_kafka, ModuleType)  # loads the library and what it depends on
    (found,) = (Path(spec.origin).parent.parent / "confluent_kafka.libs").glob("librdkafka*.so*")
    library = ctypes.CDLL(str(found))
    for name in ("rd_kafka_conf_new", "rd_kafka_new", "rd_kafka_mock_cluster_new"):
        getattr(library, name).restype = ctypes.c_void_p
    library.rd_kafka_mock_cluster_bootstraps.restype = ctypes.c_char_p
    return library


def _obey() -> None:
    """Answers every line of standard input with the call's error code; ends with the input."""
    library = _library()
    message = ctypes.create_string_buffer(512)
    quiet = ctypes.c_void_p(library.rd_kafka_conf_new())
    library.rd_kafka_conf_set(quiet, b"log_level", b"3", message, ctypes.c_size_t(512))  # else: "No bootstrap.servers"
    client = library.rd_kafka_new(0, quiet, message, ctypes.c_size_t(512))
    assert client, message.value
    cluster = ctypes.c_void_p(library.rd_kafka_mock_cluster_new(ctypes.c_void_p(client), 1))
    print(library.rd_kafka_mock_cluster_bootstraps(cluster).decode(), flush=True)
    for line in sys.stdin:
        match line.split():
            case ["create", topic, partitions]:
                code = library.rd_kafka_mock_topic_create(cluster, topic.encode(), int(partitions), 1)
            case ["down"]:
                code = library.rd_kafka_mock_broker_set_down(cluster, 1)
            case ["up"]:
                code = library.rd_kafka_mock_broker_set_up(cluster, 1)
            case ["delete", topic, offset]:
                code = library.rd_kafka_mock_partition_delete_records(
                    cluster, topic.encode(), 0, ctypes.c_int64(int(offset))
                )
            case _:
                code = -1
        print(code, flush=True)


if __name__ == "__main__":
    _obey()
