"""The audit log: who asked for what change, when, and what came of it. One line of JSON per call."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from server.errors import ConfigError

logger = logging.getLogger(__name__)

KEPT_FILES = 5


class AuditLog:
    """Appends to ``path``, readable by its owner only; beyond ``max_bytes`` it becomes ``path.1``, and so on.

    Not synced to disk. A line that cannot be written is logged and counted through ``failed``; the call that it tells
    of is not undone, for a stream must be blockable on a full disk.

    Raises:
        ConfigError: the file cannot be opened.
    """

    def __init__(self, path: Path, max_bytes: int, failed: Callable[[], None] = lambda: None) -> None:
        self._path, self._max_bytes, self._failed = path, max_bytes, failed
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = self._open()
        except OSError as error:
            raise ConfigError(f"security.audit_file: {path} cannot be opened: {error.strerror}") from error

    def write(self, who: str, what: str, outcome: str, fields: Mapping[str, Any]) -> None:
        """One line: ``fields`` are the request's, already shortened."""
        now_s = time.time()
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now_s)) + f".{int(now_s * 1000) % 1000:03d}Z"
        line = json.dumps({"at": at, "who": who, "what": what, "outcome": outcome, **fields}) + "\n"
        with self._lock:
            try:
                size = os.fstat(self._fd).st_size
                if size and size + len(line) > self._max_bytes:
                    self._rotate()
                os.write(self._fd, line.encode())
            except OSError as error:
                self._failed()
                logger.error("audit: a line about %s by %s is lost: %s", what, who, error)

    def close(self) -> None:
        with self._lock:
            os.close(self._fd)
            self._fd = -1  # the number may soon be another file's

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def _rotate(self) -> None:
        for number in range(KEPT_FILES - 1, 0, -1):
            older = self._numbered(number)
            if older.exists():
                older.replace(self._numbered(number + 1))
        if self._path.exists():  # somebody else may have moved it
            self._path.replace(self._numbered(1))
        fd = self._open()
        os.close(self._fd)
        self._fd = fd

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")
