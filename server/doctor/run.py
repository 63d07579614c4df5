"""Runs the checks and prints what they found: a table, the verdict, and on request a line of JSON."""

from __future__ import annotations

import json
import os
import shutil
import textwrap
from collections.abc import Iterable
from pathlib import Path

from server.clock import SystemClock
from server.config import Settings, load_settings
from server.doctor import (
    admission,
    clock,
    device,
    files,
    kafka,
    libraries,
    machine,
    memory,
    model,
    ports,
    ranker,
    security,
)
from server.doctor.base import Check, Context, Finding, Status, fail, ok, warn
from server.errors import ConfigError

BARE: tuple[Check, ...] = (
    machine.python, machine.cores, machine.open_files, device.gpu,
    libraries.versions, libraries.known_clashes, libraries.imports,
    files.log_folder, files.log_file, memory.shared_memory, clock.wall_clock, clock.synchronised,
)  # fmt: skip
"""Checks that need the standard library and the settings only."""

WITH_LIBRARIES: tuple[Check, ...] = (
    ports.ports, security.security, admission.admission, kafka.kafka, device.backend, device.memory, files.declared,
    files.snapshots, files.rollout, memory.table_memory, memory.viewer_memory, model.model,
    ranker.ranker,
)  # fmt: skip
"""Checks that load what the server loads: not run when a library is broken, for it might take the doctor along."""


def run_doctor(config: Path | None, as_json: bool) -> int:
    """Examines this machine with the settings in ``config``. Returns 0 when a server can serve, 1 when not."""
    findings: list[Finding] = []
    try:
        settings = load_settings(config)
    except (ConfigError, UnicodeDecodeError) as error:
        mend = "Correct the file or the variable; server/config.py lists every key with its limits."
        findings.append(fail("settings.values", str(error), mend))
        findings.append(warn("settings.rest", "nothing else was examined", "Mend the settings, then ask again."))
    else:
        findings.append(ok("settings.values", str(config) if config else "defaults and LIVERANK_ variables"))
        findings += unknown_variables()
        findings += examine(Context(settings, SystemClock()))
    print(as_table(findings))
    if as_json:
        print(json.dumps(as_report(findings)))
    return 0 if can_serve(findings) else 1


def examine(context: Context) -> list[Finding]:
    """All findings, in the order of the checks."""
    findings = [finding for check in BARE for finding in _outcome(check, context)]
    broken = [f.check for f in findings if f.check.startswith("libraries.") and f.status is Status.FAIL]
    for check in WITH_LIBRARIES:
        if broken:
            name = f"{check.__module__.rpartition('.')[2]}.{check.__name__}"
            findings.append(warn(name, "not checked: a library is broken", f"Mend {', '.join(broken)} first."))
        else:
            findings += _outcome(check, context)
    return findings


def _outcome(check: Check, context: Context) -> list[Finding]:
    """What a check found; a check that fails itself is a finding, and hides no other."""
    found: list[Finding] = []
    try:
        found.extend(check(context))
    except Exception as error:  # noqa: BLE001 - whatever is broken here, the other checks must still speak
        name = f"{check.__module__.rpartition('.')[2]}.{check.__name__}"
        told = f"this check failed: {type(error).__name__}: {error}"
        found.append(fail(name, told, "Mend what the message names; if it names nothing of yours, report it as a bug."))
    return found


def unknown_variables() -> list[Finding]:
    """LIVERANK_ variables that name no section: they would be ignored without a word."""
    sections = tuple(f"LIVERANK_{name.upper()}" for name in (*Settings.model_fields, "client"))
    stray = sorted(
        name
        for name in os.environ
        if name.upper().startswith("LIVERANK_")
        and not any(name.upper() == section or name.upper().startswith(f"{section}__") for section in sections)
    )
    if not stray:
        return []
    allowed = ", ".join(f"{section}__KEY" for section in sections)
    return [warn("settings.variables", f"ignored: {', '.join(stray)}", f"Correct or unset them; there are {allowed}.")]


def can_serve(findings: Iterable[Finding]) -> bool:
    """Whether nothing failed."""
    return all(finding.status is not Status.FAIL for finding in findings)


def as_report(findings: list[Finding]) -> dict[str, object]:
    """The findings as plain values for JSON."""
    return {
        "doctor": "liverank",
        "can_serve": can_serve(findings),
        "counts": {str(status): sum(f.status is status for f in findings) for status in Status},
        "findings": [{"check": f.check, "status": str(f.status), "found": f.found, "mend": f.mend} for f in findings],
    }


def as_table(findings: list[Finding]) -> str:
    """Lines of status, check and what was found, each mend below its finding; the verdict last.

    Plain text: the doctor must be able to speak when nothing but Python is in order.
    """
    width = max(80, min(140, shutil.get_terminal_size().columns))
    column = max((len(finding.check) for finding in findings), default=0)
    margin = " " * (6 + column + 2)
    lines = []
    for finding in findings:
        status = "FAIL" if finding.status is Status.FAIL else str(finding.status)
        head = f"{status:<6}{finding.check:<{column}}  "
        lines += textwrap.wrap(finding.found, width, initial_indent=head, subsequent_indent=margin) or [head]
        if finding.mend:
            lines += textwrap.wrap(f"→ {finding.mend}", width, initial_indent=margin, subsequent_indent=f"{margin}  ")
    failed = [finding.check for finding in findings if finding.status is Status.FAIL]
    verdict = f"cannot serve as configured: {', '.join(failed)}" if failed else "can serve"
    return "\n".join([*lines, "", verdict])
