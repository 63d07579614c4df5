"""One run of everything that needs a GPU, in under nine minutes and without a network; see docs/gpu.md.

``python -m loadtest.gpu.lab OUT [--smoke]`` writes a log per step, ``lab.json`` and ``lab.txt`` into OUT, prints the
table and, last, the JSON. Exit status 0: every step ran and passed. ``--smoke``: the same way, short, on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kernels.backend import DeviceError, visible_gpu
from loadtest.revision import commit

ROOT = Path(__file__).resolve().parents[2]
BUDGET_S = 520.0
"""All steps together: what is left over by one is there for the next, never more than its own limit."""
KILL_AFTER_S = 5.0


@dataclass(frozen=True)
class Step:
    """One command with its limit. changes: environment variables; None removes one."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    changes: dict[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What came of a step. status: "passed", "failed", "cut off" (its limit) or "not run" (no time was left).

    told: the last line of its output that says something; figures: its last line, if that was JSON.
    """

    name: str
    status: str
    seconds: float
    command: str
    told: str
    figures: Any = None


_PYTHON = (sys.executable, "-u")
_PYTEST = (*_PYTHON, "-m", "pytest", "-p", "no:cacheprovider")
_INTERPRETED: dict[str, str | None] = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
_ON_DEVICE: dict[str, str | None] = {"TRITON_INTERPRET": None}

ON_GPU = (
    Step("doctor", (*_PYTHON, "-m", "server", "doctor", "--json"), 60.0),
    Step("parity on the GPU", (*_PYTEST, "tests/parity"), 200.0, _ON_DEVICE),
    # Another process: who runs a kernel is decided when its module is imported.
    Step("parity interpreted", (*_PYTEST, "tests/parity"), 120.0, _INTERPRETED),
    Step("ahead of time", (*_PYTHON, "-m", "kernels.aot"), 60.0, _ON_DEVICE),
    Step("bench gpu", (*_PYTHON, "-m", "server", "bench", "gpu"), 150.0, _ON_DEVICE),
)
SMOKE = (
    Step("doctor", (*_PYTHON, "-m", "server", "doctor", "--json"), 60.0),
    Step("parity interpreted", (*_PYTEST, "tests/parity/test_blend_gpu.py"), 60.0, _INTERPRETED),
)


def run_steps(steps: tuple[Step, ...], out: Path, budget_s: float = BUDGET_S) -> list[Outcome]:
    """Runs the steps one after the other, each in a process group of its own; a failure stops none that follows."""
    ends_at = time.monotonic() + budget_s
    outcomes = []
    for step in steps:
        left_s = ends_at - time.monotonic()
        if left_s < 1.0:
            outcomes.append(Outcome(step.name, "not run", 0.0, " ".join(step.command), "no time was left"))
        else:
            outcomes.append(_run(step, min(step.limit_s, left_s), out / f"{step.name.replace(' ', '-')}.log"))
        _print_row(outcomes[-1])
    return outcomes


def _run(step: Step, limit_s: float, log: Path) -> Outcome:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(":")}
    for name, value in step.changes.items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    started_s = time.monotonic()
    with log.open("wb") as sink:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = "passed" if process.wait(limit_s) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "cut off"
            _end(process)
    told, figures = last_words(log.read_text(errors="replace"))
    return Outcome(step.name, status, round(time.monotonic() - started_s, 1), " ".join(step.command), told, figures)


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, then SIGKILL, to the whole group."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(KILL_AFTER_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def last_words(text: str) -> tuple[str, Any]:
    """(last line that is no JSON, the last line as JSON if it is an object)."""
    lines = [line for line in text.splitlines() if line.strip()]
    figures = None
    if lines and lines[-1].startswith("{"):
        try:
            figures = json.loads(lines[-1])
            lines.pop()
        except json.JSONDecodeError:
            pass  # an ordinary line that begins with a brace
    return (lines[-1].strip() if lines else ""), figures


def machine() -> dict[str, Any]:
    """Where this ran: commit, Python, GPU as the driver names it, versions of what matters."""
    from server.doctor.libraries import installed_versions

    try:
        gpu = visible_gpu()
    except DeviceError as error:
        gpu = f"broken: {error}"
    wanted = re.compile(r"(numpy|numba|torch|triton|cupy-.*|cudf-.*|rmm-.*|faiss-.*|pandas|pyarrow)$")
    versions = {name: version for name, version in sorted(installed_versions().items()) if wanted.match(name)}
    return {
        "commit": commit() or "unknown",
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": gpu,
        "versions": versions,
    }


def _print_row(outcome: Outcome) -> None:
    print(f"{outcome.name:<20}{outcome.status:<9}{outcome.seconds:>7.1f} s  {outcome.told[:100]}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="gpu-lab", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for logs and results; made if need be")
    parser.add_argument("--smoke", action="store_true", help="the same way, short, on a CPU")
    options = parser.parse_args(arguments)
    where = machine()
    if where["gpu"] is None and not options.smoke:
        print("gpu-lab: no GPU is visible here; --smoke runs the short form", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    outcomes = run_steps(SMOKE if options.smoke else ON_GPU, options.out)
    passed = all(outcome.status == "passed" for outcome in outcomes)
    report = {"lab": "gpu", "passed": passed, **where, "steps": [asdict(outcome) for outcome in outcomes]}
    line = json.dumps(report)
    (options.out / "lab.json").write_text(line + "\n")
    (options.out / "lab.txt").write_text(as_text(where, outcomes))
    print(line)
    return 0 if passed else 1


def as_text(where: dict[str, Any], outcomes: list[Outcome]) -> str:
    """The table for docs/lab.md."""
    lines = [f"commit {where['commit']}, {where['gpu'] or 'no GPU'}, Python {where['python']}", ""]
    lines += ["| step | status | seconds | |", "| --- | --- | --- | --- |"]
    lines += [f"| {o.name} | {o.status} | {o.seconds} | {o.told[:120].replace('|', '/')} |" for o in outcomes]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
