"""A real Triton for tests; the small models it serves are in `loadtest/faults/nets.py`.

``require_triton()`` runs triton/setup.sh: a machine that cannot run Triton skips, loudly; any other failure
fails. ``running_triton(...)`` starts triton/run.py on free ports and leaves nothing behind.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from loadtest.faults.nets import (  # noqa: F401 - models for tests, shared with the fault matrix
    N_FEATURES,
    SCHEMA,
    endless,
    nan_where_first_feature_is_negative,
    put_model,
    small_net,
    two_columns_out,
)

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "triton" / "run.py"
CANNOT_RUN_HERE = 3


def eventually(condition: Callable[[], Any], within_s: float = 60.0, what: str = "") -> Any:
    """The first true value of ``condition``; fails when there is none within ``within_s`` seconds.

    The bound is for a server that never gets there, not for a slow machine: leave it generous.
    """
    ends_at = time.monotonic() + within_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > ends_at:
            pytest.fail(f"not within {within_s} s: {what or condition}")
        time.sleep(0.02)


@functools.cache
def _setup() -> tuple[int, str]:
    done = subprocess.run([ROOT / "triton" / "setup.sh"], capture_output=True, text=True, timeout=900, check=False)
    return done.returncode, (done.stdout + done.stderr).strip()


def require_triton() -> None:
    """Skips where the bundled Triton cannot run, fails where setting it up went wrong."""
    code, told = _setup()
    if code == CANNOT_RUN_HERE:
        warnings.warn(f"no real Triton was tested: {told}", stacklevel=2)
        pytest.skip(told)
    assert code == 0, f"triton/setup.sh failed with {code}:\n{told}"


@dataclass
class RunningTriton:
    """run.py and what it said. ``pid`` is tritonserver's."""

    runner: subprocess.Popen[str]
    address: str
    pid: int

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def processes(self) -> dict[int, str]:
        """Command lines of tritonserver and its stubs, by process id; whoever their parent is by now."""
        return triton_processes(self.runner.pid)

    def stub_pids(self) -> list[int]:
        return [pid for pid, line in self.processes().items() if "triton_python_backend_stub" in line]

    def kill(self) -> None:
        """kill -9 of tritonserver, as a crash; returns when everything of it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        self.runner.wait(20)


def triton_processes(runner_pid: int) -> dict[int, str]:
    """Every process that run.py with this process id started, zombies left out."""
    mark = shm_mark(runner_pid)
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:  # ended while we looked
                continue
            if mark in line:
                found[int(entry.name)] = line
    return found


def shm_regions(runner_pid: int) -> list[str]:
    return [path.name for path in Path("/dev/shm").glob(f"{shm_mark(runner_pid)}*")]


def shm_mark(runner_pid: int) -> str:
    """What run.py's shared memory is named after; also in the command lines of its processes."""
    return f"liverank-triton-{os.stat('/proc/self/ns/pid').st_ino}-{runner_pid}-"


def start_runner(repository: Path, log: Path, *models: str, port: int = 0) -> subprocess.Popen[str]:
    """Starts run.py; its stdout is a pipe that will carry one line."""
    command = [sys.executable, str(RUN), "--model-repository", str(repository), "--log", str(log)]
    command += ["--load", *models] if models else []
    command += ["--grpc-port", str(port)] if port else []
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def said(runner: subprocess.Popen[str]) -> dict[str, Any]:
    """The line run.py prints; waits for it."""
    assert runner.stdout is not None
    line = runner.stdout.readline()
    answer: dict[str, Any] = json.loads(line) if line else {"ready": False, "reason": "said nothing"}
    return answer


def finish(runner: subprocess.Popen[str], triton_pid: int | None) -> None:
    """Ends run.py. tritonserver is killed first: its orderly stop takes seconds and is tested elsewhere."""
    if triton_pid is not None and runner.poll() is None:
        os.kill(triton_pid, signal.SIGKILL)
    runner.terminate()
    runner.wait(30)
    for pipe in (runner.stdin, runner.stdout):
        if pipe is not None:
            pipe.close()


@contextmanager
def running_triton(repository: Path, log: Path, *models: str, port: int = 0) -> Iterator[RunningTriton]:
    require_triton()
    runner = start_runner(repository, log, *models, port=port)
    answer: dict[str, Any] = {}
    try:
        answer = said(runner)
        assert answer["ready"], answer
        yield RunningTriton(runner, answer["grpc"], answer["pid"])
    finally:
        finish(runner, answer.get("pid"))
