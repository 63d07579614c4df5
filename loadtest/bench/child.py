"""A server of a bench as a child process: both ends of its port file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from loadtest.processes import ROOT, NotStartedError, Server, wait_for

ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""Compared servers are pinned alike; `server/__init__.py` does it for ours."""


def announce(port_file: Path, port: int) -> None:
    """Child's end: tells that it serves, and where."""
    beside = port_file.with_suffix(".tmp")
    beside.write_text(str(port))
    beside.rename(port_file)  # a reader sees all of it or nothing


def start_child(folder: Path, module: str, *arguments: str, within_s: float = 60.0) -> Server:
    """Parent's end: runs ``python -m module`` and waits until it announced its port. The caller stops it.

    Raises:
        NotStartedError: it ended, or was not ready in time; the message holds the end of its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port_file, log = folder / "port", folder / "log"
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", module, "--port-file", str(port_file), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd=ROOT,
            env={**os.environ, **ONE_THREAD},
        )
    try:
        wait_for(lambda: port_file.exists() or process.poll() is not None, within_s, f"{module} ready")
        if process.poll() is not None:
            raise NotStartedError(f"{module}: exit status {process.returncode}\n{log.read_text()[-2000:]}")
    except BaseException:
        process.kill()
        process.wait()
        raise
    return Server(f"127.0.0.1:{port_file.read_text()}", 0, process, log)
