"""Real Triton and real servers as child processes, for demo, benches and tests; none is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_PROCESS_CLOCK = 2
"""What clock_getcpuclockid(3) puts into the lowest bits; Python has that call for threads only."""
CANNOT_RUN_HERE = 3
"""Exit status of triton/setup.sh on a machine that the bundled Triton does not support."""


class NotStartedError(Exception):
    """A child process did not become ready; the message says which, and where its log is."""


@dataclass(frozen=True)
class Triton:
    """A running Triton. ``version`` is unknown here: replies tell it."""

    address: str
    pid: int


@dataclass(frozen=True)
class Server:
    """A running `liverank serve`."""

    address: str
    metrics_port: int
    process: subprocess.Popen[bytes]
    log: Path

    def stop(self, within_s: float = 20.0) -> int:
        """SIGTERM, then waits; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(within_s)


def set_up_triton() -> str:
    """Prepares the bundled Triton. Returns "" when it is ready, or why this machine cannot run it.

    Raises:
        NotStartedError: the set-up failed for another reason.
    """
    done = subprocess.run([ROOT / "triton" / "setup.sh"], capture_output=True, text=True, timeout=900, check=False)
    if done.returncode == CANNOT_RUN_HERE:
        return done.stdout.strip()
    if done.returncode != 0:
        raise NotStartedError(f"triton/setup.sh failed ({done.returncode}): {done.stderr.strip()[-2000:]}")
    return ""


@contextmanager
def running_triton(repository: Path, log: Path, *models: str, port: int = 0) -> Iterator[Triton]:
    """A Triton serving ``models`` of ``repository`` on loopback; set up before with `set_up_triton`."""
    command = [sys.executable, str(ROOT / "triton" / "run.py"), "--model-repository", str(repository)]
    command += ["--log", str(log), *(["--load", *models] if models else [])]
    command += ["--grpc-port", str(port)] if port else []
    runner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert runner.stdin is not None and runner.stdout is not None
    try:
        line = runner.stdout.readline()
        answer = json.loads(line) if line else {"ready": False, "reason": "triton/run.py said nothing"}
        if not answer["ready"]:
            raise NotStartedError(f"Triton: {answer['reason']} (log: {log})")
        yield Triton(answer["grpc"], answer["pid"])
    finally:
        runner.stdin.close()  # run.py stops when its parent lets go of this pipe
        runner.terminate()
        runner.wait(30)
        runner.stdout.close()


def to_toml(settings: dict[str, dict[str, Any]]) -> str:
    """Sections of plain values as TOML (JSON's strings, numbers and booleans are TOML's)."""
    lines = []
    for section, values in settings.items():
        lines.append(f"[{section}]")
        lines += [f"{key if key.isidentifier() else json.dumps(key)} = {json.dumps(v)}" for key, v in values.items()]
    return "\n".join(lines) + "\n"


def start_server(
    folder: Path,
    settings: dict[str, dict[str, Any]],
    within_s: float = 180.0,
    module: str = "server",
    options: tuple[str, ...] = (),
) -> Server:
    """Starts `liverank serve` on free ports with its files in ``folder`` and waits until it serves.

    The caller stops it. A second start in the same folder recovers from the same log. Another ``module`` with
    the same command line may stand in for the server; its stdin is a pipe.

    Raises:
        NotStartedError: it ended, or was not ready in time; the message holds the end of its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    merged: dict[str, dict[str, Any]] = {section: dict(values) for section, values in settings.items()}
    merged.setdefault("serve", {})
    merged["serve"] = {"port": 0, "metrics_port": 0, **merged["serve"]}
    merged.setdefault("log", {}).setdefault("path", str(folder / "events.sqlite3"))
    config, ready, log = folder / "liverank.toml", folder / "ready.json", folder / "server.log"
    config.write_text(to_toml(merged))
    ready.unlink(missing_ok=True)
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", module, "serve", "--config", str(config), "--ready-file", str(ready), *options],
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL if module == "server" else subprocess.PIPE,
            cwd=ROOT,
        )
    try:
        wait_for(lambda: ready.exists() or process.poll() is not None, within_s, "server ready")
        if process.poll() is not None:
            raise NotStartedError(f"server: exit status {process.returncode}\n{_tail(log)}")
    except TimeoutError as error:
        process.kill()
        process.wait()
        raise NotStartedError(f"server: not ready within {within_s} s\n{_tail(log)}") from error
    ports = json.loads(ready.read_text())
    return Server(f"127.0.0.1:{ports['port']}", ports["metrics_port"], process, log)


@contextmanager
def running_server(folder: Path, settings: dict[str, dict[str, Any]], within_s: float = 180.0) -> Iterator[Server]:
    """`start_server`, and an orderly stop at the end (or a kill, if that takes too long)."""
    server = start_server(folder, settings, within_s)
    try:
        yield server
    finally:
        try:
            server.stop()
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.process.wait()


def wait_for(condition: Callable[[], Any], within_s: float, what: str) -> Any:
    """The first true value of ``condition``. Raises TimeoutError naming ``what`` when none comes in time."""
    ends_at = time.monotonic() + within_s
    while not (value := condition()):
        if time.monotonic() > ends_at:
            raise TimeoutError(f"{what}: not within {within_s} s")
        time.sleep(0.02)
    return value


def cpu_seconds(pid: int) -> float:
    """User and system time a process has used, seconds (Linux); to the nanosecond, not to /proc's hundredths."""
    return time.clock_gettime(~pid << 3 | _PROCESS_CLOCK)


def children_of(pid: int) -> dict[int, str]:
    """Command lines of the direct children of a process, by process id, zombies left out (Linux)."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:2]
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:  # ended while we looked
                continue
            if int(parent) == pid and state != "Z":
                found[int(entry.name)] = line
    return found


def rss_bytes(pid: int) -> int:
    """Resident memory of a process (Linux)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]
