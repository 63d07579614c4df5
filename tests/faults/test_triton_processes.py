"""triton/run.py leaves nothing behind, however it ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import triton_server as ts

Ending = Callable[["subprocess.Popen[str]", int], None]


def _close_stdin(runner: subprocess.Popen[str], triton_pid: int) -> None:
    assert runner.stdin is not None
    runner.stdin.close()


def _hang_then_terminate(runner: subprocess.Popen[str], triton_pid: int) -> None:
    os.kill(triton_pid, signal.SIGSTOP)
    runner.terminate()


def _hang_the_stub_then_kill_triton(runner: subprocess.Popen[str], triton_pid: int) -> None:
    (stub,) = set(ts.triton_processes(runner.pid)) - {triton_pid}
    os.kill(stub, signal.SIGSTOP)  # a healthy stub would end by itself
    os.kill(triton_pid, signal.SIGKILL)


ENDINGS: dict[str, tuple[Ending, int]] = {
    "SIGTERM": (lambda runner, pid: runner.terminate(), 0),
    "stdin closes": (_close_stdin, 0),
    "SIGTERM while Triton hangs": (_hang_then_terminate, 0),
    "Triton is killed while its stub hangs": (_hang_the_stub_then_kill_triton, 1),
    "run.py is killed": (lambda runner, pid: runner.kill(), -signal.SIGKILL),
}


@pytest.fixture(scope="module")
def runners(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """One server per ending; they start side by side because starting is mostly waiting."""
    ts.require_triton()
    path = tmp_path_factory.mktemp("endings")
    ts.put_model(path, "trendiness", ts.small_net())
    logs = tmp_path_factory.mktemp("logs")
    started = {ending: ts.start_runner(path, logs / f"{ending}.log", "trendiness") for ending in ENDINGS}
    yield started
    for runner in started.values():
        ts.finish(runner, None)


@pytest.mark.parametrize("ending", ENDINGS)
def test_no_process_is_left_behind_when(ending: str, runners: dict[str, subprocess.Popen[str]]) -> None:
    end, code = ENDINGS[ending]
    runner = runners[ending]
    answer = ts.said(runner)
    assert answer["ready"], answer
    lines = ts.triton_processes(runner.pid)
    assert answer["pid"] in lines
    assert len(lines) == 2, "tritonserver and one stub"
    assert ts.shm_regions(runner.pid)
    end(runner, answer["pid"])
    assert runner.wait(60) == code
    if code != -signal.SIGKILL:
        # Gone at once, not soon.
        assert ts.triton_processes(runner.pid) == {}
        assert ts.shm_regions(runner.pid) == []
    ts.eventually(lambda: not ts.triton_processes(runner.pid), what=f"gone: {lines}")


def test_shared_memory_of_a_killed_runner_is_swept_by_the_next(tmp_path: Path) -> None:
    ts.require_triton()
    gone = subprocess.Popen(["true"])
    gone.wait()
    orphan = Path("/dev/shm") / f"{ts.shm_mark(gone.pid)}1234-left"
    mine = Path("/dev/shm") / f"{ts.shm_mark(os.getpid())}1234-in-use"
    orphan.write_bytes(b"x")
    mine.write_bytes(b"x")
    try:
        runner = ts.start_runner(tmp_path / "missing", tmp_path / "triton.log")
        assert ts.said(runner)["ready"] is False
        runner.wait(10)
        assert not orphan.exists()
        assert mine.exists()
    finally:
        orphan.unlink(missing_ok=True)
        mine.unlink(missing_ok=True)


@pytest.mark.parametrize(("option", "answer"), [("-s", "Darwin"), ("-m", "aarch64")])
def test_setup_says_in_one_sentence_why_a_machine_cannot_run_triton(option: str, answer: str, tmp_path: Path) -> None:
    shutil.copytree(ts.ROOT / "triton", tmp_path / "triton")
    uname = tmp_path / "bin" / "uname"
    uname.parent.mkdir()
    uname.write_text(f'#!/bin/sh\n[ "$1" = {option} ] && echo {answer} || exec /bin/uname "$@"\n')
    uname.chmod(0o755)
    done = subprocess.run(
        [tmp_path / "triton" / "setup.sh"], capture_output=True, text=True, check=False, timeout=20,
        env={**os.environ, "PATH": f"{uname.parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == ts.CANNOT_RUN_HERE
    assert done.stdout.startswith("Triton cannot run on this machine: ")
    assert answer in done.stdout
    assert not (tmp_path / ".triton").exists()


def test_a_model_that_cannot_load_is_reported_and_nothing_stays(tmp_path: Path) -> None:
    ts.require_triton()
    ts.put_model(tmp_path / "repository", "trendiness", ts.small_net())
    (tmp_path / "repository" / "trendiness" / "1" / "model.onnx").write_bytes(b"not a model")
    runner = ts.start_runner(tmp_path / "repository", tmp_path / "triton.log", "trendiness")
    answer = ts.said(runner)
    assert answer["ready"] is False
    assert "model.onnx" in answer["reason"]
    assert runner.wait(60) == 1
    assert ts.triton_processes(runner.pid) == {}
    assert ts.shm_regions(runner.pid) == []
