"""Who did which step of a rollout, and why: one audit line per step, refused ones too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from server.errors import LiverankError, Refused
from server.security.audit import AuditLog
from server.telemetry.metrics import Metrics

READ_BYTES = 1 << 20


class Ledger:
    """An audit log of its own beside the rollout file: there also where security.audit_file is not set.

    Raises:
        ConfigError: the file cannot be opened.
    """

    def __init__(self, path: Path, max_bytes: int, metrics: Metrics) -> None:
        self._path, self._metrics = path, metrics
        self._audit = AuditLog(path, max_bytes, metrics.audit_lost.inc)

    @contextmanager
    def step(self, model: str, version: int, step: str, who: str, why: str, **fields: Any) -> Iterator[None]:
        """Writes the line when the step is over, however it ends. Raises Refused without a reason."""
        if not why.strip():
            raise Refused("why: a reason wanted; the audit log keeps it")
        outcome, detail = "FAILED", "interrupted"
        try:
            yield
            outcome, detail = "OK", ""
        except LiverankError as error:
            outcome, detail = "REFUSED", str(error)
            raise
        except Exception as error:
            detail = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._metrics.rollout_steps.labels(model, step, outcome).inc()
            told = {"model": model, "version": version, "why": why, **fields}
            self._audit.write(who, step, outcome, {**told, "detail": detail} if detail else told)

    def newest(self, model: str, most: int) -> list[dict[str, Any]]:
        """The newest entries of a model, oldest first; of the present file only, and of its last megabyte."""
        if most <= 0:
            return []
        try:
            with self._path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(max(0, size - READ_BYTES))
                lines = file.read().splitlines()[1 if size > READ_BYTES else 0 :]
        except OSError:
            return []
        entries = [json.loads(line) for line in lines if line.endswith(b"}")]
        return [entry for entry in entries if entry.get("model") == model][-most:]

    def close(self) -> None:
        self._audit.close()
