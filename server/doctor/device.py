"""The device: driver, GPU, the choice that a server would make, and memory for the table on it.

Nothing of CUDA is loaded into this process: the choice is made in a process of its own, which may crash or hold memory.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from server.doctor.base import Context, Finding, fail, ok, warn

QUERY = ("--query-gpu=name,driver_version,memory.total,memory.free", "--format=csv,noheader")
TIMEOUT_S = 60.0
OLDEST_DRIVER = 580
"""The first that runs programs built for CUDA 13."""

COLUMN_BYTES = 571
"""One row of the table on the device but for its embedding: liveness and attributes 46, id 65, counters 168,
sketches 256, features' gauges 20, rule bits, boost, trend and exposures 16."""
EMBEDDING_BYTES = 4 + 2
"""Per dimension: float32 decides, its float16 copy proposes."""
VIEWS = 16
"""Eligibility masks of a batch's filters, one byte per row each."""
PROCESS_BYTES = 1536 << 20
"""CUDA context, libraries, search workspace and captured graphs; an estimate."""

_CHILD = """
import json, sys
from kernels.backend import DeviceError, choose
try:
    backend = choose(sys.argv[1], sys.argv[2] == "True")
    told = {"device": backend.device, "why": backend.why}
except DeviceError as error:
    told = {"device": "", "why": str(error)}
print("\\n" + json.dumps(told), flush=True)
"""


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi tells it. free_bytes: None if it does not say."""

    name: str
    driver: str
    free_bytes: int | None


def gpu(context: Context) -> Iterator[Finding]:
    """The GPUs that can be seen, and their driver."""
    devices = nvidia_devices(context.root)
    if not devices:
        yield ok("device.gpu", "no GPU: CPU paths")
        return
    yield ok("device.gpu", "; ".join(devices))
    for found in parse(devices):
        major = found.driver.partition(".")[0]
        if major.isdecimal() and int(major) < OLDEST_DRIVER and context.settings.device.kind != "cpu":
            yield (warn if context.settings.device.allow_cpu else fail)(
                "device.driver",
                f"{found.name}: driver {found.driver}; CUDA 13 needs {OLDEST_DRIVER} or newer",
                f"Install NVIDIA driver {OLDEST_DRIVER} or newer, or set device.kind to cpu.",
            )


def backend(context: Context) -> Iterator[Finding]:
    """The device that a server with these settings would take, chosen for real: it computes something there."""
    wanted = context.settings.device
    if wanted.kind == "cpu":
        yield ok("device.backend", "cpu: device.kind says so")
        return
    if nvidia_devices(context.root) and context.neighbour is not None:
        yield ok("device.backend", "not tried: a liverank is running here, and the trial would take GPU memory")
        return
    device, why = ask_backend(wanted.kind, wanted.allow_cpu)
    if device == "":
        mend = (
            "Install NVIDIA driver 580 or newer and give the container the GPU (docker run --gpus all), or set "
            "device.kind to auto or cpu."
            if "no NVIDIA driver" in why
            else "pip install 'liverank[gpu]' into this environment (docs/gpu.md has the versions and their traps). To "
            "serve without the GPU, set device.kind to cpu."
        )
        yield fail("device.backend", why, mend)
    elif device == "cpu" and "cannot be used" in why:
        yield warn(
            "device.backend", why, "Mend what it names, or set device.kind to cpu if this is meant; see docs/gpu.md."
        )
    else:
        yield ok("device.backend", f"{device}: {why}")


def memory(context: Context) -> Iterator[Finding]:
    """Whether the table at its full capacity fits into the first GPU's free memory."""
    found = parse(nvidia_devices(context.root))
    if not found or context.settings.device.kind == "cpu":
        return
    table = context.settings.table
    need = PROCESS_BYTES + table.capacity * bytes_per_row(table.embedding_dim)
    told = f"{need >> 20:,} MiB for a full table of {table.capacity:,} rows"
    free = found[0].free_bytes
    if free is None:
        yield ok("device.memory", f"{told}; how much is free on the GPU is not known")
    elif need <= free:
        yield ok("device.memory", f"{told}; {free >> 20:,} MiB free on {found[0].name}")
    elif context.neighbour is not None:
        yield ok("device.memory", f"{told}; a liverank is running with its share")
    else:
        fits = max(0, free - PROCESS_BYTES) // bytes_per_row(table.embedding_dim)
        yield fail(
            "device.memory",
            f"{told}, but {free >> 20:,} MiB free on {found[0].name}",
            (f"Set table.capacity to {fits:,} or less, or free" if fits else "Free")
            + " memory on the GPU (nvidia-smi lists who holds it).",
        )


def bytes_per_row(embedding_dim: int) -> int:
    """Device memory of one row of the table."""
    return COLUMN_BYTES + EMBEDDING_BYTES * embedding_dim + VIEWS


def parse(devices: list[str]) -> list[Gpu]:
    """The lines that came from nvidia-smi."""
    found = []
    for line in devices:
        parts = [part.strip() for part in line.split(",")]
        if len(parts) >= 3:
            free = re.fullmatch(r"(\d+) MiB", parts[3]) if len(parts) > 3 else None
            found.append(Gpu(parts[0], parts[1], int(free[1]) << 20 if free else None))
    return found


def nvidia_devices(root: Path) -> list[str]:
    """One description per visible NVIDIA GPU; empty without a driver."""
    if not (root / "proc/driver/nvidia/version").exists() and not list((root / "dev").glob("nvidia[0-9]*")):
        return []
    if tool := shutil.which("nvidia-smi"):
        try:
            done = subprocess.run([tool, *QUERY], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return [f"NVIDIA driver present, but nvidia-smi does not answer ({type(error).__name__})"]
        if done.returncode == 0 and done.stdout.strip():
            return [line.strip() for line in done.stdout.strip().splitlines()]
    return [f"NVIDIA device {path.name}" for path in sorted((root / "dev").glob("nvidia[0-9]*"))]


@cache
def ask_backend(kind: str, allow_cpu: bool) -> tuple[str, str]:
    """(device, why) as `kernels.backend.choose` answers; device "" when it refuses, and why."""
    command = [sys.executable, "-c", _CHILD, kind, str(allow_cpu)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return "", f"a first computation on the GPU takes more than {TIMEOUT_S:.0f} s"
    answers = [line for line in done.stdout.splitlines() if line.startswith('{"device"')]
    if done.returncode != 0 or not answers:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return "", f"the choice of the device ended its process: {last}"
    told = json.loads(answers[-1])
    return told["device"], told["why"]
