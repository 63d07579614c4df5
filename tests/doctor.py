"""Settings in order for the doctor's tests, and what a check found about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from server.clock import Clock, SystemClock
from server.config import parse_settings
from server.doctor.base import Check, Context, Finding, Status


def context(tmp_path: Path, at: Clock | None = None, root: Path = Path("/"), **sections: dict[str, Any]) -> Context:
    """Settings that are in order, changed by ``sections``."""
    defaults: dict[str, dict[str, Any]] = {
        "serve": {"port": 0, "metrics_port": 0},
        "table": {"capacity": 256, "embedding_dim": 4},
        "log": {"path": str(tmp_path / "events.sqlite3")},
        "scoring": {"model_repository": str(tmp_path / "models")},
    }
    merged = {name: {**defaults.get(name, {}), **sections.get(name, {})} for name in {*defaults, *sections}}
    return Context(parse_settings(merged), at or SystemClock(), root)


def found(check: Check, about: Context) -> dict[str, Finding]:
    """The check's findings by name; each that is not ok has a mend."""
    findings = list(check(about))
    assert all(finding.mend for finding in findings if finding.status is not Status.OK)
    return {finding.check: finding for finding in findings}


def the_failure(check: Check, about: Context) -> Finding:
    """The one finding that fails."""
    (failure,) = [finding for finding in found(check, about).values() if finding.status is Status.FAIL]
    return failure


def all_ok(check: Check, about: Context) -> bool:
    return {finding.status for finding in found(check, about).values()} == {Status.OK}
