"""The rollout file: which version serves, and how far the next one is, across restarts."""

from __future__ import annotations

import json
import os
from pathlib import Path

from server.errors import ConfigError, Refused
from server.rollout.state import Rollout

FORMAT = 1


class RolloutFile:
    """One small JSON file, replaced as a whole and synced: a reader finds the old one or the new one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> dict[str, Rollout]:
        """By model; empty when there is no file.

        Raises:
            ConfigError: it cannot be read. A server that guessed would serve a version that nobody chose.
        """
        try:
            content = json.loads(self.path.read_text())
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise ValueError(f"format {FORMAT} wanted")
            return {name: Rollout.from_dict(values) for name, values in dict(content["models"]).items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"rollout.file: {self.path} cannot be used: {error}; restore it, or remove it to serve the newest "
                "version of each model"
            ) from error

    def save(self, rollouts: dict[str, Rollout]) -> None:
        """Replaces the file. Raises Refused; the old one is still there then."""
        text = json.dumps({"format": FORMAT, "models": {n: r.to_dict() for n, r in rollouts.items()}}, indent=2)
        beside = self.path.with_name(f".{self.path.name}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("w") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.path)
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise Refused(f"rollout.file: {self.path} cannot be written: {error.strerror}") from error
