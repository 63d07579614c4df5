"""A real Triton for tests, and the small models it serves.

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

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from server.scoring.model_config import render_config

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "triton" / "run.py"
CANNOT_RUN_HERE = 3
N_FEATURES = 6
SCHEMA = "schema-of-the-tests"


def eventually(condition: Callable[[], Any], within_s: float = 10.0, what: str = "") -> Any:
    """The first true value of ``condition``; fails when there is none within ``within_s`` seconds."""
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


# Models. Each maps features float32[n, F] to trend float32[n].


def put_model(
    repository: Path, name: str, model: onnx.ModelProto, version: int = 1, schema: str = SCHEMA,
    n_features: int = N_FEATURES, config: str = "",
) -> None:  # fmt: skip
    """Adds a version; it appears complete, as the exporter promises."""
    folder = repository / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.pbtxt").write_text(config or render_config(schema, n_features, model_name=name))
    fresh = folder / f".{version}"
    fresh.mkdir()
    onnx.save(model, str(fresh / "model.onnx"))
    fresh.rename(folder / str(version))


def small_net(seed: int = 1, n_features: int = N_FEATURES, schema: str | None = None) -> onnx.ModelProto:
    """sigmoid(relu(x W1) w2), weights from ``seed``."""
    random = np.random.default_rng(seed)
    weights = {
        "w1": random.normal(0, 0.3, (n_features, 16)).astype(np.float32),
        "w2": random.normal(0, 0.3, 16).astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["features", "w1"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("MatMul", ["active", "w2"], ["logit"]),
        helper.make_node("Sigmoid", ["logit"], ["trend"]),
    ]
    return _model(nodes, weights, n_features=n_features, schema=schema)


def nan_where_first_feature_is_negative() -> onnx.ModelProto:
    """sqrt(x0): NaN for x0 < 0, a probability for 0 <= x0 <= 1."""
    nodes = [
        helper.make_node("Gather", ["features", "zero"], ["first"], axis=1),
        helper.make_node("Sqrt", ["first"], ["trend"]),
    ]
    return _model(nodes, {"zero": np.array(0, dtype=np.int64)})


def two_columns_out() -> onnx.ModelProto:
    """Answers float32[n, 2] whatever its configuration says."""
    nodes = [
        helper.make_node("MatMul", ["features", "w"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["trend"]),
    ]
    return _model(nodes, {"w": np.ones((N_FEATURES, 2), np.float32)}, out_shape=["n", 2])


def endless() -> onnx.ModelProto:
    """Adds one to a scalar 10^9 times before it answers 0.5: minutes."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Add", ["sum", "one"], ["sum_out"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum_out", TensorProto.FLOAT, []),
        ],
    )
    weights = {
        "times": np.array(10**9, np.int64), "yes": np.array(True), "one": np.array(1, np.float32),
        "w": np.zeros(N_FEATURES, np.float32), "nothing": np.array(0, np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("Loop", ["times", "yes", "one"], ["total"], body=body),
        helper.make_node("Mul", ["total", "nothing"], ["none"]),
        helper.make_node("MatMul", ["features", "w"], ["logit"]),
        helper.make_node("Add", ["logit", "none"], ["shifted"]),
        helper.make_node("Sigmoid", ["shifted"], ["trend"]),
    ]
    return _model(nodes, weights)


def _model(
    nodes: list[onnx.NodeProto], weights: dict[str, NDArray[Any]], n_features: int = N_FEATURES,
    out_shape: list[Any] | None = None, schema: str | None = None,
) -> onnx.ModelProto:  # fmt: skip
    graph = helper.make_graph(
        nodes, "trend",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", n_features])],
        [helper.make_tensor_value_info("trend", TensorProto.FLOAT, out_shape or ["n"])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if schema is not None:
        helper.set_model_props(model, {"feature_schema": schema})
    return model
