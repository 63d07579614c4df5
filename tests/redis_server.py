"""A real redis-server for tests, on a free loopback port, with nothing on disk."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.triton_server import eventually


@dataclass
class RunningRedis:
    """The process, and a way to set its values."""

    process: subprocess.Popen[bytes]
    port: int

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def put(self, key: str, value: NDArray[np.float32] | bytes) -> None:
        import redis

        with redis.Redis(port=self.port, socket_timeout=5.0) as client:
            client.set(key, value if isinstance(value, bytes) else value.astype("<f4").tobytes())

    def commands(self) -> dict[str, int]:
        """How often each command was called."""
        import redis

        with redis.Redis(port=self.port, socket_timeout=5.0) as client:
            return {name.removeprefix("cmdstat_"): told["calls"] for name, told in client.info("commandstats").items()}

    def stall(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10.0)

    def settled(self) -> bool:
        """Answers, or has given up."""
        if self.process.poll() is not None:
            return True
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0) as made:
            made.sendall(b"PING\r\n")
            return made.recv(16).startswith(b"+PONG")
        return False


def require_redis() -> str:
    """Path of the program; skips, saying so, where it or its client is not installed."""
    pytest.importorskip("redis", reason="the package redis is not installed (liverank[redis]): no Redis was tested")
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed on this machine: no Redis was tested")
    return program


@contextmanager
def running_redis(port: int = 0) -> Iterator[RunningRedis]:
    """A server that answers; ``port`` 0: a free one."""
    program = require_redis()
    for _ in range(3):  # somebody may take the free port before redis-server does
        chosen = port or _free_port()
        process = subprocess.Popen(
            [program, "--port", str(chosen), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
        )  # fmt: skip
        running = RunningRedis(process, chosen)
        try:
            eventually(running.settled, 30.0, "redis-server answers")
            if process.poll() is None:
                yield running
                return
        finally:
            process.kill()
            process.wait(10.0)
    pytest.fail("redis-server did not start on a free port, three times")


def _free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])
