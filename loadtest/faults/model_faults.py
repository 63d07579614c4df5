"""Triton dies, hangs, drags, breaks or changes under a server that goes on answering."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import onnx

from loadtest.faults.base import Seen, scenario
from loadtest.faults.stage import WITHIN_S, Stage


def _broken_then_mended(
    stage: Stage, break_it: Callable[[], object], mend: Callable[[], object], reason: str, version: str = "",
    loading: bool = False,
) -> Seen:  # fmt: skip
    """Breaks, waits until answers are degraded for this ``reason`` (an outcome of the model call), mends, waits
    until they are as usual (by ``version``).

    ``loading``: breaking and mending take time of their own, so both times count from when they are done.
    """
    with stage.probe() as probe:
        broken_s = time.monotonic()
        break_it()
        done_s = time.monotonic()
        probe.wait_unusual(broken_s, WITHIN_S, reason)
        first = probe.wait_unusual(broken_s, WITHIN_S)
        mend()
        mended_s = time.monotonic()
        again = probe.wait_usual(mended_s, WITHIN_S, version)
        answered = all(not a.failed for a in probe.since(broken_s))
        return Seen(
            max(0.0, first.at_s - (done_s if loading else broken_s)), again.at_s - mended_s,
            probe.discloses(broken_s) and answered, f"{first.level}: {reason}",
        )  # fmt: skip


@scenario("Triton killed", needs_triton=True)
def triton_killed(stage: Stage) -> Seen:
    """kill -9; a new one comes up where the server looks for it."""
    return _broken_then_mended(stage, stage.kill_triton, stage.restart_triton, "unavailable")


@scenario("Triton back with another version", needs_triton=True)
def triton_back_with_another_version(stage: Stage) -> Seen:
    """The model was replaced while Triton was away; replies name the new one."""
    version = stage.put_version(stage.good_net())
    return _broken_then_mended(stage, stage.kill_triton, stage.restart_triton, "unavailable", version)


@scenario("Triton stalled", needs_triton=True)
def triton_stalled(stage: Stage) -> Seen:
    """SIGSTOP: connections stay open and nobody answers."""
    return _broken_then_mended(
        stage,
        lambda: os.kill(stage.triton.pid, signal.SIGSTOP),
        lambda: os.kill(stage.triton.pid, signal.SIGCONT),
        "timeout",
    )


@scenario("Triton slow", needs_triton=True)
def triton_slow(stage: Stage) -> Seen:
    """Every answer takes longer than the deadline."""

    def delay(seconds: float) -> None:
        stage.proxy.delay_s = seconds

    deadline_s = stage.settings["scoring"]["deadline_ms"] / 1000
    return _broken_then_mended(stage, lambda: delay(2 * deadline_s), lambda: delay(0.0), "timeout")


@scenario("model process killed", needs_triton=True)
def model_process_killed(stage: Stage) -> Seen:
    """Triton lives and says that the model is ready; its process is gone. The server has it loaded again."""
    before = stage.model_processes()

    def kill() -> None:
        for pid in before:
            os.kill(pid, signal.SIGKILL)

    seen = _broken_then_mended(stage, kill, lambda: None, "timeout")  # Triton's own word takes longer than the deadline
    if not before or before & stage.model_processes():
        raise AssertionError(f"model processes before {before}, after {stage.model_processes()}")
    return seen


def _bad_version(stage: Stage, bad: onnx.ModelProto) -> Seen:
    """A bad model is loaded; then a good one is."""
    stage.put_version(bad)

    def load_good() -> None:
        stage.put_version(stage.good_net())
        stage.load()

    return _broken_then_mended(stage, stage.load, load_good, "bad_scores", loading=True)


@scenario("model answers NaN", needs_triton=True)
def model_answers_nan(stage: Stage) -> Seen:
    return _bad_version(stage, stage.all_nan())


@scenario("model answers a wrong shape", needs_triton=True)
def model_answers_a_wrong_shape(stage: Stage) -> Seen:
    return _bad_version(stage, stage.two_columns())


@scenario("model answers too few rows", needs_triton=True)
def model_answers_too_few_rows(stage: Stage) -> Seen:
    return _bad_version(stage, stage.one_row_short())
