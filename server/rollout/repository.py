"""Versions of one model on disk: REPOSITORY/MODEL/VERSION/ with model.onnx (or model.plan) and metrics.json.

A version never changes once it is there: what was approved is what serves.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.errors import ModelRefused

log = logging.getLogger(__name__)

GRAPH, PLAN, FACTS = "model.onnx", "model.plan", "metrics.json"
ALLOWED = frozenset({GRAPH, PLAN, FACTS})
STAGED = ".push-"


@dataclass(frozen=True)
class Facts:
    """What metrics.json says. schema, commit: "" unknown. metrics: the headline, one number per name."""

    schema: str = ""
    commit: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)


class Repository:
    """One model's folder. Every change is a rename, so whoever reads sees whole versions only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def versions(self) -> list[int]:
        """Ascending."""
        found = {path.parent.name for name in (GRAPH, PLAN) for path in self.folder.glob(f"*/{name}")}
        return sorted(int(name) for name in found if name.isdecimal() and name == str(int(name)))

    def path(self, version: int) -> Path:
        """Its folder, whether it is there or not."""
        return self.folder / str(version)

    def facts(self, folder: Path) -> Facts:
        """Of a version. Raises ModelRefused when metrics.json is none."""
        try:
            values = json.loads((folder / FACTS).read_text())
        except FileNotFoundError:
            return Facts()
        except (OSError, ValueError) as error:
            raise ModelRefused(f"{FACTS}: {error}") from error
        if not isinstance(values, dict):
            raise ModelRefused(f"{FACTS}: an object wanted")
        headline = values.get("headline", values)
        metrics = {k: float(v) for k, v in headline.items() if _is_number(v)} if isinstance(headline, dict) else {}
        return Facts(_text(values, "feature_schema"), _text(values, "commit"), metrics)

    def stage(self, version: int, files: Mapping[str, bytes]) -> Path:
        """Writes files beside the versions, where no server looks.

        Raises:
            ModelRefused: a name is not allowed, the model is missing, or the disk does not take it.
        """
        if extra := set(files) - ALLOWED:
            raise ModelRefused(f"files: {', '.join(sorted(ALLOWED))} are allowed, got {sorted(extra)[0][:40]!r}")
        if len({GRAPH, PLAN} & set(files)) != 1:
            raise ModelRefused(f"files: one of {GRAPH} and {PLAN} wanted")
        if not (self.folder / "config.pbtxt").is_file():
            raise ModelRefused(f"{self.folder} holds no config.pbtxt: scoring.model_repository must be Triton's")
        staged = self._hidden(str(version))
        try:
            staged.mkdir()
            for name, content in files.items():
                (staged / name).write_bytes(content)
        except OSError as error:
            shutil.rmtree(staged, ignore_errors=True)
            raise ModelRefused(f"{staged} cannot be written: {error.strerror}") from error
        return staged

    def note(self, staged: Path, facts: Facts) -> None:
        """Adds to what was staged what only its model told, so that it can be listed without running it.

        Raises:
            ModelRefused: metrics.json is none, or cannot be written.
        """
        path = staged / FACTS
        try:
            values = json.loads(path.read_text()) if path.is_file() else {}
            told = {"feature_schema": facts.schema, "commit": facts.commit, "headline": dict(facts.metrics)}
            path.write_text(json.dumps({**told, **values}, indent=2) + "\n")
        except (OSError, ValueError, TypeError) as error:
            raise ModelRefused(f"{FACTS}: {error}") from error

    def place(self, staged: Path, version: int) -> bool:
        """Makes staged files the version; False when exactly these were there already.

        Raises:
            ModelRefused: another one has this number.
        """
        final = self.path(version)
        try:
            os.rename(staged, final)
        except OSError as error:
            if not final.is_dir():
                raise ModelRefused(f"{final} cannot be made: {error.strerror}") from error
            if not _same(staged, final):
                raise ModelRefused(
                    f"version {version} is in the repository already, with other contents; take another number"
                ) from None
            shutil.rmtree(staged, ignore_errors=True)
            return False
        return True

    def remove(self, folder: Path) -> None:
        """Takes a version, or what was staged, out again: first out of sight, then off the disk."""
        if folder.is_dir() and not folder.name.startswith(STAGED):
            hidden = self._hidden(folder.name)
            os.rename(folder, hidden)
            folder = hidden
        shutil.rmtree(folder, ignore_errors=True)

    def sweep(self) -> None:
        """Removes what pushes of servers that are gone left behind. Before this process has begun one."""
        for left in self.folder.glob(f"{STAGED}*"):
            owner = left.name.removeprefix(STAGED).split("-")[1:2]
            if owner and owner[0] != str(os.getpid()) and Path("/proc", owner[0]).exists():
                continue  # of another server in the same repository
            log.warning("%s is left over from a push that did not end; removed", left)
            shutil.rmtree(left, ignore_errors=True)

    def _hidden(self, version: str) -> Path:
        return self.folder / f"{STAGED}{version}-{os.getpid()}-{os.urandom(4).hex()}"


def _same(a: Path, b: Path) -> bool:
    return all((b / path.name).is_file() and (b / path.name).read_bytes() == path.read_bytes() for path in a.iterdir())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(values: Mapping[str, Any], name: str) -> str:
    found = values.get(name, "")
    return found if isinstance(found, str) else ""
