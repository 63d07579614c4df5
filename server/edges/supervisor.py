"""`liverank serve` with edges: one engine and N edges, each a process; whatever ends is started again.

The port is held here, bound and not listening, so that all edges get the same one, even where 0 was asked for. The
sockets between the processes are in a folder that only this user may enter. A part that loses its supervisor ends by
itself: its standard input, a pipe from here, comes to its end.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from server.config import Settings
from server.errors import ConfigError

logger = logging.getLogger(__name__)

LOOK_S = 0.02
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
WELL_AFTER_S = 30.0
"""A part that ran so long has recovered: its next end is the first one again."""
STOP_GRACE_S = 5.0
"""Beyond `serve.drain_grace_ms`, before a part that does not end is killed."""
WRONG_SETTINGS = 2
"""Exit status with which starting again cannot help."""


@dataclass(eq=False)
class _Part:
    """A process that is to run. ready: the file it writes once it serves."""

    name: str
    command: list[str]
    ready: Path
    process: subprocess.Popen[bytes] | None = None
    started_s: float = 0.0
    failures: int = 0


class Supervisor:
    """Runs the parts until told to stop.

    Args:
        arguments: of the command line that each part is given, too: where the settings are, how much to log.

    Raises:
        ConfigError: these settings cannot be served with edges, or the port is taken.
    """

    def __init__(self, settings: Settings, arguments: list[str], ready_file: Path | None) -> None:
        security = settings.security
        if security.client_ca_file is not None:
            raise ConfigError(
                "security.client_ca_file: not with serve.edges: what a certificate says would not reach the engine; "
                "use tokens, or serve.edges = 0"
            )
        self._settings, self._ready_file = settings, ready_file
        self._socket = _reserve(settings.serve.host, settings.serve.port)
        self.port = int(self._socket.getsockname()[1])
        self._folder = Path(tempfile.mkdtemp(prefix="liverank-"))  # 0700
        base = [sys.executable, "-m", "server"]
        shared = [*arguments, "--folder", str(self._folder)]
        self._parts = [self._part("engine", [*base, "engine", *shared])]
        for i in range(settings.serve.edges):
            edge = [*base, "edge", *shared, "--number", str(i), "--port", str(self.port)]
            self._parts.append(self._part(f"edge-{i}", edge))
        self._ended: queue.SimpleQueue[_Part | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self.status = 0

    def _part(self, name: str, command: list[str]) -> _Part:
        ready = self._folder / f"{name}.json"
        return _Part(name, [*command, "--ready-file", str(ready)], ready)

    def run(self) -> int:
        """Starts all parts and keeps them running; returns the exit status once `stop` was called and all ended."""
        announcing = threading.Thread(target=self._announce, name="announce", daemon=True)
        try:
            for part in self._parts:
                self._start(part)
            announcing.start()
            while (part_or_stop := self._ended.get()) is not None:
                self._restart(part_or_stop)
        finally:
            self._stopping.set()
            self._end_all()
            if announcing.ident is not None:
                announcing.join()
            self._socket.close()
            shutil.rmtree(self._folder)
        return self.status

    def stop(self) -> None:
        """Makes `run` end all parts in order and return. Any thread."""
        self._stopping.set()
        self._ended.put(None)

    def _start(self, part: _Part) -> None:
        part.ready.unlink(missing_ok=True)
        part.started_s = time.monotonic()
        part.process = subprocess.Popen(part.command, stdin=subprocess.PIPE)
        logger.info("%s: process %d", part.name, part.process.pid)
        threading.Thread(target=self._wait_for, args=(part, part.process), name=part.name, daemon=True).start()

    def _wait_for(self, part: _Part, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        self._ended.put(part)

    def _restart(self, part: _Part) -> None:
        assert part.process is not None
        status = part.process.returncode
        was_ready = part.ready.exists()
        if part.process.stdin is not None:
            part.process.stdin.close()
        if status == WRONG_SETTINGS and not was_ready:
            logger.error("%s: cannot start with these settings", part.name)
            self.status = WRONG_SETTINGS
            self.stop()
            return
        part.failures = 0 if time.monotonic() - part.started_s > WELL_AFTER_S else part.failures + 1
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** max(0, part.failures - 1)) if part.failures > 1 else 0.0
        logger.error("%s ended with status %d; started again in %.1f s", part.name, status, pause_s)
        if not self._stopping.wait(pause_s):
            self._start(part)

    def _announce(self) -> None:
        """Writes the ready file once every part was ready."""
        while not all(part.ready.exists() for part in self._parts):
            if self._stopping.wait(LOOK_S):
                return
        told = [json.loads(part.ready.read_text()) for part in self._parts]
        logger.info("serving on port %d with %d edges", self.port, len(told) - 1)
        if self._ready_file is not None:
            ports = {"port": self.port, "metrics_port": told[0]["metrics_port"]}
            edges = [{"metrics_port": one["metrics_port"]} for one in told[1:]]
            write_whole(self._ready_file, json.dumps({**ports, "edges": edges}))

    def _end_all(self) -> None:
        """Edges first, so that what they have taken is answered by an engine that still runs."""
        within_s = self._settings.serve.drain_grace_ms / 1000 + STOP_GRACE_S
        for parts in (self._parts[1:], self._parts[:1]):
            running = [part.process for part in parts if part.process is not None]
            for process in running:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
            ends_at_s = time.monotonic() + within_s
            for process in running:
                try:
                    process.wait(max(0.1, ends_at_s - time.monotonic()))
                except subprocess.TimeoutExpired:
                    logger.error("process %d did not end and is killed", process.pid)
                    process.kill()
                    process.wait()
                if process.stdin is not None:
                    process.stdin.close()
                if process.returncode and not self.status:
                    self.status = 1


def _reserve(host: str, port: int) -> socket.socket:
    """A socket that holds the port for those who set SO_REUSEPORT, and takes no connection itself."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    held = socket.socket(family, socket.SOCK_STREAM)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        held.bind((host, port))
    except OSError as error:
        held.close()
        raise ConfigError(f"serve.port: {host}:{port} cannot be bound: {error}") from error
    return held


def end_with_parent(end: Callable[[], None]) -> None:
    """Calls ``end`` once the supervisor is gone."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1 << 10):
            pass
        end()

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def write_whole(path: Path, text: str) -> None:
    """A reader sees all of it or nothing."""
    beside = path.with_suffix(".tmp")
    beside.write_text(text)
    beside.rename(path)
