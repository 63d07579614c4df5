"""Redis as a rival: a real server of this machine, and pipelines of commands over its Unix socket.

Commands are encoded beforehand and replies are only counted, so that the client costs next to nothing: the most
that Redis can show. A client library would cost more.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loadtest.processes import wait_for

_READ_BYTES = 1 << 18


def redis_binary() -> str | None:
    """Path of redis-server; None where it is not installed."""
    return shutil.which("redis-server")


@contextmanager
def running_redis(folder: Path, appendfsync: str) -> Iterator[tuple[Path, int]]:
    """A Redis with its append-only file in ``folder``: (its socket, its process id). Listens on no port.

    appendfsync: "always": a reply means durable, as our acknowledgement does; "everysec": it does not.
    """
    binary = redis_binary()
    if binary is None:
        raise FileNotFoundError("redis-server")
    folder.mkdir(parents=True, exist_ok=True)
    path, log = folder / "redis.sock", folder / "redis.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [
                binary, "--port", "0", "--unixsocket", str(path), "--dir", str(folder), "--save", "",
                "--appendonly", "yes", "--appendfsync", appendfsync, "--auto-aof-rewrite-percentage", "0",
                "--daemonize", "no",
            ],
            stdin=subprocess.DEVNULL, stdout=out, stderr=out,
        )  # fmt: skip
    try:
        wait_for(lambda: path.exists() or process.poll() is not None, 20.0, "redis-server ready")
        if process.poll() is not None:
            raise RuntimeError(f"redis-server: exit status {process.returncode}\n{log.read_text()[-2000:]}")
        yield path, process.pid
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass(frozen=True)
class Pipeline:
    """Encoded commands that are sent at once, and how many lines their replies have."""

    payload: bytes
    lines: int


def pipeline(commands: Iterable[tuple[int, tuple[bytes, ...]]]) -> Pipeline:
    """``commands``: (lines of its reply: 2 for a bulk string, 1 for a number, words)."""
    parts, lines = [], 0
    for reply_lines, words in commands:
        parts.append(b"*%d\r\n" % len(words))
        parts += [b"$%d\r\n%b\r\n" % (len(word), word) for word in words]
        lines += reply_lines
    return Pipeline(b"".join(parts), lines)


class Connection:
    """One connection; `send` returns when every reply is there."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(60.0)
        self._socket.connect(str(path))

    def send(self, wanted: Pipeline) -> None:
        """Raises RuntimeError with the first error that Redis replied."""
        self._socket.sendall(wanted.payload)
        seen, last = 0, b"\r\n"  # the end of what was read before: a line end may be cut in two
        while seen < wanted.lines:
            part = self._socket.recv(_READ_BYTES)
            if not part:
                raise RuntimeError("redis-server closed the connection")
            joined = last + part
            if (at := joined.find(b"\r\n-")) >= 0:  # no reply here is a negative number
                raise RuntimeError(f"redis-server: {joined[at : at + 200].decode(errors='replace').strip()}")
            seen += joined.count(b"\r\n") - last.count(b"\r\n")
            last = joined[-2:]
        if seen != wanted.lines:
            raise RuntimeError(f"redis-server: {wanted.lines} lines of replies expected, got {seen}")

    def send_all(self, wanted: Iterable[Pipeline]) -> None:
        """One after another."""
        for one in wanted:
            self.send(one)

    def close(self) -> None:
        self._socket.close()
