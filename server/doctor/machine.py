"""The interpreter, its threads, the cores and the limits it runs under."""

from __future__ import annotations

import os
import platform
import resource
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from server.doctor.base import Context, Finding, fail, ok, warn

OLDEST_PYTHON = (3, 11)
OPEN_FILES_OF_ITS_OWN = 128  # log, model, libraries, listeners
OPEN_FILES_WANTED = 1024


def python(context: Context) -> Iterator[Finding]:
    """The interpreter's version and whether it has a global lock."""
    version = platform.python_version()
    if sys.version_info[:2] < OLDEST_PYTHON:
        yield fail(
            "machine.python",
            f"Python {version}; 3.11 or newer is needed",
            "Make a virtual environment with Python 3.11 or newer and install liverank there.",
        )
    else:
        yield ok("machine.python", f"{platform.python_implementation()} {version} at {sys.executable}")
    gil_enabled = getattr(sys, "_is_gil_enabled", lambda: True)()
    if sysconfig.get_config_var("Py_GIL_DISABLED") and not gil_enabled:
        yield warn(
            "machine.gil",
            "a free-threaded Python with its global lock off; liverank is not tested on it",
            "Use an ordinary build of Python, or set PYTHON_GIL=1.",
        )
    else:
        yield ok("machine.gil", "global lock on: one core runs Python code, kernels release it")


def cores(context: Context) -> Iterator[Finding]:
    """Cores this process may use, and whether NumPy's BLAS keeps to one thread."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(context.root)
    told = f"{usable} usable" + (f", limited to {quota:.1f} by the container" if quota else "")
    if min(usable, quota or usable) < 2:
        yield warn(
            "machine.cores",
            f"{told}: engine, gRPC and the model take turns",
            "Give the server two cores or more; with one, expect several times the latency under load.",
        )
    else:
        yield ok("machine.cores", told)
    threads = os.environ.get("OPENBLAS_NUM_THREADS", "")
    if threads == "1":
        yield ok("machine.blas_threads", "1 (OPENBLAS_NUM_THREADS)")
    else:
        yield warn(
            "machine.blas_threads",
            f"OPENBLAS_NUM_THREADS is {threads!r}: spinning BLAS threads take the cores that decode requests",
            "Unset OPENBLAS_NUM_THREADS (the server then sets 1), or set it to 1.",
        )


def cpu_quota(root: Path) -> float | None:
    """Cores that the control group grants (version 2 or 1), None when it sets no limit."""
    try:
        quota, period = (root / "sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            folder = root / "sys/fs/cgroup/cpu"
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        except OSError:
            return None
    if not quota.isdecimal() or not period.isdecimal() or int(period) == 0:
        return None  # "max", or -1
    return int(quota) / int(period)


def open_files(context: Context) -> Iterator[Finding]:
    """The limit on open files: every client connection holds one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        yield ok("machine.open_files", "no limit")
        return
    serve = context.settings.serve
    least = serve.max_open_streams + serve.max_rank_calls + OPEN_FILES_OF_ITS_OWN
    told = f"{soft} open files allowed (could be raised to {hard})"
    mend = f"Raise the limit, such as `ulimit -n {max(65_536, least)}` or LimitNOFILE= of the service."
    if soft < least:
        yield fail("machine.open_files", f"{told}; serve.max_open_streams and the rest need {least}", mend)
    elif soft < OPEN_FILES_WANTED:
        yield warn("machine.open_files", f"{told}; each client connection holds one", mend)
    else:
        yield ok("machine.open_files", told)
