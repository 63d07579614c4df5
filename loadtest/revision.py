"""Which code is being measured, and on what."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

from loadtest.processes import ROOT

MODELS = "model_repository"


def commit() -> str:
    """The checked-out commit, "-dirty" behind it when files differ; "" where there is no git or no checkout."""
    return _git("describe", "--always", "--dirty", "--exclude=*")


def code_commit() -> str:
    """The same for who writes models: that those in the repository differ does not count."""
    revision = _git("describe", "--always", "--exclude=*")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", f":(exclude){MODELS}")
    return revision + ("-dirty" if changed else "")


def machine() -> str:
    """Processor, cores and Python."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()
