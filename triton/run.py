#!/usr/bin/env python3
"""Runs a real Triton Inference Server on this machine, until told to stop. Run triton/setup.sh first.

    python triton/run.py --model-repository model_repository --load trendiness [--grpc-port 8001]

Prints one line of JSON on stdout and nothing else:

    {"ready": true, "grpc": "127.0.0.1:8001", "pid": …, "http": …, "metrics": …, "log": …}
    {"ready": false, "reason": "…"}      and exits 1

Stops on SIGTERM, SIGINT, or, when stdin is a pipe, as soon as the other end of that pipe is closed: a parent
that dies takes Triton with it. Exits 0 after a stop that was asked for, 1 if Triton ended by itself.
Needs only the standard library.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import http.client
import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
SETUP = ROOT / "build" / "triton" / "setup.json"
SHM = Path("/dev/shm")
SHM_PREFIX = "liverank-triton"
HOST = "127.0.0.1"
DRAIN_S = 10  # Triton's own exit timeout
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
BIND_ATTEMPTS = 3
POLL_S = 0.05

libc = ctypes.CDLL(None, use_errno=True)


class NotReadyError(Exception):
    """Triton did not become ready; the message is the reason."""


class PortTakenError(NotReadyError):
    """Somebody took a port between choosing and using it."""


class StopRequestedError(Exception):
    """SIGTERM or SIGINT arrived."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class Triton:
    """One tritonserver process with everything that belongs to it: stub processes, shared memory, log."""

    def __init__(self, repository: Path, models: list[str], grpc_port: int | None, log: Path) -> None:
        setup = json.loads(SETUP.read_text())
        self.grpc, self.http, self.metrics = grpc_port or free_port(), free_port(), free_port()
        self.models, self.log = models, log
        # Named after this process, in this process namespace, so that a later run can tell an orphan.
        self.shm_prefix = f"{_shm_family()}-{os.getpid()}-{self.grpc}-"
        command = [
            setup["tritonserver"],
            f"--model-repository={repository.resolve()}",
            f"--backend-directory={setup['backends']}",
            "--model-control-mode=explicit",  # poll mode may load half-written files
            *(f"--load-model={model}" for model in models),
            f"--exit-timeout-secs={DRAIN_S}",
            "--allow-gpu-metrics=false",
            "--pinned-memory-pool-byte-size=0",
            f"--backend-config=python,shm-region-prefix-name={self.shm_prefix}",
            f"--grpc-address={HOST}", f"--grpc-port={self.grpc}",
            f"--http-address={HOST}", f"--http-port={self.http}",
            f"--metrics-address={HOST}", f"--metrics-port={self.metrics}",
        ]  # fmt: skip
        environment = dict(os.environ)
        environment.pop("PYTHONHOME", None)  # the stub embeds the Triton environment's Python, nobody else's
        environment.pop("PYTHONPATH", None)
        # The stub takes the first python3 on PATH, and needs its libpython.
        environment["PATH"] = f"{setup['venv']}/bin:{environment.get('PATH', '')}"
        environment["LD_LIBRARY_PATH"] = setup["libdir"]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=environment,
                start_new_session=True, preexec_fn=_dies_with(os.getpid()),
            )  # fmt: skip

    def wait_ready(self, deadline: float, until: Stopper) -> None:
        """Returns when gRPC, metrics and every named model answer. Raises NotReadyError."""
        waiting_for = "gRPC port"
        while time.monotonic() < deadline:
            if until.wait(POLL_S):
                raise StopRequestedError
            if self.process.poll() is not None:
                raise self._ended()
            # Each model's own endpoint: the server's stays "not ready" for good after one broken version.
            missing = [path for path in self._ready_paths() if not _http_ok(self.http, path)]
            closed = [port for port in (self.grpc, self.metrics) if not _listens(port)]
            if not missing and not closed:
                return
            waiting_for = ", ".join([*missing, *(f"port {port}" for port in closed)])
        raise NotReadyError(f"still waiting for {waiting_for}; log: {self.log}: {self._tail()}")

    def address_card(self) -> dict[str, object]:
        """What a caller needs to use this server."""
        return {
            "ready": True,
            "grpc": f"{HOST}:{self.grpc}",
            "pid": self.process.pid,
            "http": f"{HOST}:{self.http}",
            "metrics": f"{HOST}:{self.metrics}",
            "log": str(self.log),
        }

    def _ready_paths(self) -> list[str]:
        return ["/v2/health/live", *(f"/v2/models/{model}/ready" for model in self.models)]

    def _ended(self) -> NotReadyError:
        tail = self._tail()
        kind = PortTakenError if "address already in use" in tail.lower() else NotReadyError
        return kind(f"tritonserver exited with {self.process.returncode}; log: {self.log}: {tail}")

    def _tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        told = [line for line in lines if line[:1] in "EF" or "error" in line.lower()]
        return " / ".join((told or lines)[-3:])

    def stop(self) -> None:
        """Ends tritonserver and its stubs, however they are, and removes their shared memory."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.send_signal(signal.SIGCONT)  # a stopped process cannot obey
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(DRAIN_S + 2)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # stubs included: they share the session
        self.process.wait()
        _reap_orphans()
        for region in SHM.glob(f"{self.shm_prefix}*"):
            region.unlink(missing_ok=True)


class Stopper:
    """Knows when to stop: a signal, or end of file on a stdin that is a pipe or a socket."""

    def __init__(self) -> None:
        mode = os.fstat(0).st_mode if sys.stdin is not None else 0
        # /dev/null, files and terminals are no statement about a parent's life.
        self.watched = [0] if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) else []
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        self.signalled = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True

    def wait(self, timeout_s: float) -> bool:
        """True when it is time to stop; waits ``timeout_s`` seconds at most."""
        if not self.signalled:
            readable, _, _ = select.select(self.watched, [], [], timeout_s)
            return self.signalled or (bool(readable) and os.read(0, 4096) == b"")
        return True


def main() -> int:
    options = _parse()
    until = Stopper()
    if not SETUP.exists():
        return _refuse(f"{SETUP} is missing: run triton/setup.sh first")
    _sweep_orphaned_shm()
    # A killed tritonserver leaves its stubs to us instead of to init, so that we can end them.
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if not options.model_repository.is_dir():
        return _refuse(f"{options.model_repository} is not a directory")
    deadline = time.monotonic() + options.timeout_s
    for attempt in range(1, BIND_ATTEMPTS + 1):
        triton = Triton(options.model_repository, options.load, options.grpc_port, options.log)
        try:
            triton.wait_ready(deadline, until)
            _say(triton.address_card())
            return _stay(triton, until)
        except PortTakenError as taken:
            if attempt == BIND_ATTEMPTS:
                return _refuse(str(taken))
        except NotReadyError as reason:
            return _refuse(str(reason))
        except StopRequestedError:
            return 0
        finally:
            triton.stop()
    return 1


def _stay(triton: Triton, until: Stopper) -> int:
    while triton.process.poll() is None:
        if until.wait(0.2):
            return 0
    print(f"tritonserver ended by itself with {triton.process.returncode}", file=sys.stderr)
    return 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Runs a real Triton Inference Server until told to stop.")
    parser.add_argument("--model-repository", type=Path, required=True)
    parser.add_argument("--load", nargs="+", default=[], metavar="MODEL", help="models to load at start")
    parser.add_argument("--grpc-port", type=int, help="default: a free one")
    parser.add_argument("--log", type=Path, help="default: build/triton/log/<pid>.log")
    parser.add_argument("--timeout-s", type=float, default=60.0, help="for becoming ready")
    options = parser.parse_args()
    options.log = (options.log or ROOT / "build" / "triton" / "log" / f"{os.getpid()}.log").resolve()
    return options


def _say(answer: dict[str, object]) -> None:
    with contextlib.suppress(BrokenPipeError):  # a parent that no longer listens also closed our stdin
        print(json.dumps(answer), flush=True)


def _refuse(reason: str) -> int:
    _say({"ready": False, "reason": reason})
    return 1


def _dies_with(parent: int) -> Callable[[], None]:
    """For a new child: the kernel kills it when ``parent`` ends, even when that is by SIGKILL."""

    def prepare() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it ended before the line above
            os._exit(1)

    return prepare


def _reap_orphans() -> None:
    """Collects the exit status of stubs that became our children; all of them were killed before."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            time.sleep(POLL_S)


def _shm_family() -> str:
    return f"{SHM_PREFIX}-{os.stat('/proc/self/ns/pid').st_ino}"


def _sweep_orphaned_shm() -> None:
    """Removes regions of earlier runs that were killed too hard to do it themselves."""
    family = _shm_family()
    for region in SHM.glob(f"{family}-*"):
        owner = region.name.removeprefix(f"{family}-").split("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            with contextlib.suppress(OSError):  # another user's: not ours to remove
                region.unlink()


def _http_ok(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=2)
    try:
        # Open keep-alive connections would delay Triton's shutdown.
        connection.request("GET", path, headers={"Connection": "close"})
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex((HOST, port)) == 0


if __name__ == "__main__":
    sys.exit(main())
