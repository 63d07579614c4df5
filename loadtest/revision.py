"""Which code is being measured."""

from __future__ import annotations

import subprocess

from loadtest.processes import ROOT


def commit() -> str:
    """The checked-out commit, "-dirty" behind it when files differ; "" where there is no git or no checkout."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
