"""GPUs: none is needed. Nothing of CUDA is loaded into this process."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from server.doctor.base import Context, Finding, ok, warn
from server.doctor.libraries import installed_versions

QUERY = ("--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
TIMEOUT_S = 30.0


def gpu(context: Context) -> Iterator[Finding]:
    """The NVIDIA driver and its devices, and whether an installed CuPy could use them."""
    devices = nvidia_devices(context.root)
    if not devices:
        yield ok("device.gpu", "no GPU: CPU paths")
    else:
        yield ok("device.gpu", f"{'; '.join(devices)}; this version ranks on the CPU")
    if find_spec("cupy") is not None:
        usable, told = ask_cupy()
        if devices and not usable:
            yield warn(
                "device.cupy",
                f"CuPy is installed but cannot use the GPU: {told}",
                "Install the CuPy build of the driver's CUDA version (cupy-cuda13x for CUDA 13), or remove it.",
            )
        else:
            yield ok("device.cupy", f"installed, {told}")
    versions = installed_versions()
    if "torch" in versions:
        yield ok("device.torch", f"{versions['torch']} installed; serving does not load it")


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


def ask_cupy() -> tuple[bool, str]:
    """Whether CuPy sees a usable GPU, in words; asked in a process of its own, as it may crash or hold memory."""
    program = "import cupy; print(cupy.__version__, cupy.is_available())"
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return False, f"importing it takes more than {TIMEOUT_S:.0f} s"
    if done.returncode != 0:
        return False, (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
    version, available = done.stdout.split()
    return available == "True", f"{version}, is_available() is {available}"
