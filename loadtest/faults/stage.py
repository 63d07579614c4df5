"""Where faults happen: a real Triton behind a forwarder, a real server, and everything needed to break them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import onnx
from tritonclient.grpc import InferenceServerClient

from loadtest.bench.overload import QUICK as QUICK_FLOOD
from loadtest.faults import nets
from loadtest.faults.probe import Probe
from loadtest.faults.proxy import Proxy
from loadtest.liveness.producer import CHANNEL_OPTIONS
from loadtest.liveness.traffic import CHECKED_TABLE, TrafficPlan
from loadtest.processes import (
    Server,
    Triton,
    children_of,
    running_triton,
    set_up_triton,
    start_server,
    wait_for,
)
from server.config import TableSettings
from server.live.features import FeatureSet

MODEL = "trendiness"
WITHIN_S = 60.0
TRAFFIC = TrafficPlan(producers=2, streams_each=10, rankers=1, watchers=1, ranker_pause_s=0.01, producer_pause_s=0.02)
SETTINGS: dict[str, dict[str, Any]] = {
    "table": {**CHECKED_TABLE, "capacity": 30_000},
    "rank": {"tick_ms": 50},
    "serve": {"watch_buffer": 4_096, "drain_grace_ms": 2_000},
    "scoring": {
        "refresh_ms": 100, "deadline_ms": 250, "max_score_age_ms": 1_000, "breaker_failures": 2,
        "breaker_open_ms": 200,
    },
}  # fmt: skip
"""Short times, so that every step of every fault is seen within seconds."""


class Stage:
    """Starts on construction; `close` ends everything.

    Attributes:
        no_triton: why there is none here; "" when there is. The server then scores in process.
        settings: of the server. version: newest of the model. repository: where models are. soak_s, flood: how long
            a soak takes here, and what an overload is.

    Raises:
        NotStartedError: the server or Triton did not start.
    """

    def __init__(self, folder: Path, module: str = "loadtest.faults.launcher") -> None:
        self.folder, self._module = folder, module
        features = FeatureSet.load(TableSettings().features_file)
        self._n_features, self._schema = len(features), features.schema
        self.repository = folder / "models"
        self.version = 0
        self.soak_s = 3.0
        self.flood = QUICK_FLOOD
        self.no_triton = set_up_triton()
        self.put_version(self.good_net())
        self._triton_stack = contextlib.ExitStack()
        self.settings = {section: dict(values) for section, values in SETTINGS.items()}
        if self.no_triton:
            self.settings["scoring"] |= {"mode": "local", "model_repository": str(self.repository)}
        else:
            self.triton = self._start_triton(0)
            self.proxy = Proxy(self.triton.address)
            self.settings["scoring"] |= {"mode": "triton", "triton_address": self.proxy.address}
        try:
            self.server = start_server(folder / "server", self.settings, module=module)
        except BaseException:
            self.close()
            raise
        self.settings["serve"] |= {"port": int(self.server.address.rpartition(":")[2])}

    # --- the server ---------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """Of the server; the same after a restart."""
        return self.server.address

    def kill_server(self) -> None:
        """kill -9; returns when it is gone."""
        self.server.process.kill()
        self.server.process.wait(WITHIN_S)

    def start_server(self) -> Server:
        """Starts it again at its address, from its log."""
        self.server = start_server(self.folder / "server", self.settings, module=self._module)
        return self.server

    def command(self, line: str) -> None:
        """Tells the server's launcher to do something; returns when it has been done."""
        assert self.server.process.stdin is not None
        said = self.server.log.read_text(errors="replace").count("obeyed: ")
        self.server.process.stdin.write(f"{line}\n".encode())
        self.server.process.stdin.flush()
        wait_for(lambda: self.server.log.read_text(errors="replace").count("obeyed: ") > said, WITHIN_S, line)

    def metric(self, name: str) -> float:
        """Value of a metric, by its exposed name (and labels)."""
        with urlopen(f"http://127.0.0.1:{self.server.metrics_port}/metrics", timeout=WITHIN_S) as page:
            lines = page.read().decode().splitlines()
        return float(next(line.rpartition(" ")[2] for line in lines if line.startswith(f"{name} ")))

    def own_folder(self, name: str) -> Path:
        """A path that nothing is at yet, for files of a scenario's own."""
        return self.folder / f"{name}-{time.monotonic_ns()}"

    def channel(self, *options: tuple[str, Any]) -> grpc.Channel:
        return grpc.insecure_channel(self.address, options=(*CHANNEL_OPTIONS, *options))

    @contextlib.contextmanager
    def probe(self) -> Iterator[Probe]:
        """A caller that has had a usual answer already."""
        probe = Probe(self.address)
        try:
            probe.wait_usual(0.0, WITHIN_S)
            yield probe
        finally:
            probe.close()

    # --- Triton -------------------------------------------------------------------------------

    def good_net(self) -> onnx.ModelProto:
        """A model that the server accepts; another one at each version."""
        return nets.small_net(self.version + 1, self._n_features, self._schema)

    def all_nan(self) -> onnx.ModelProto:
        return nets.all_nan(self._n_features, self._schema)

    def two_columns(self) -> onnx.ModelProto:
        return nets.two_columns_out(self._n_features, self._schema)

    def one_row_short(self) -> onnx.ModelProto:
        return nets.one_row_short(self._n_features, self._schema)

    def put_version(self, net: onnx.ModelProto) -> str:
        """Adds a version to the repository; returns how replies will name it. Not loaded yet."""
        self.version += 1
        nets.put_model(self.repository, MODEL, net, self.version, self._schema, self._n_features)
        return f"{MODEL}/{self.version}"

    def load(self) -> None:
        """Makes Triton serve the newest version."""
        client = InferenceServerClient(self.triton.address)
        try:
            client.load_model(MODEL)
        finally:
            client.close()

    def kill_triton(self) -> None:
        """kill -9; returns when everything of it is gone."""
        os.kill(self.triton.pid, signal.SIGKILL)
        self._triton_stack.close()

    def restart_triton(self) -> None:
        """A new one, where the server looks for it."""
        self.triton = self._start_triton(0)
        self.proxy.target = self.triton.address

    def model_processes(self) -> set[int]:
        """Process ids of the model's own processes, one per version that is loaded."""
        return {pid for pid, line in children_of(self.triton.pid).items() if "python_backend_stub" in line}

    def _start_triton(self, port: int) -> Triton:
        self._triton_stack = contextlib.ExitStack()
        log = self.folder / f"triton-{time.monotonic_ns()}.log"
        return self._triton_stack.enter_context(running_triton(self.repository, log, MODEL, port=port))

    # --- the end ------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends all processes; the server in order, or it is an error."""
        if hasattr(self, "server") and self.server.process.poll() is None:
            try:
                self.server.stop()
            except subprocess.TimeoutExpired:
                self.server.process.kill()
                self.server.process.wait()
        if hasattr(self, "triton"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.triton.pid, signal.SIGKILL)  # its orderly stop takes seconds
            self._triton_stack.close()
            self.proxy.close()


@contextlib.contextmanager
def open_stage(folder: Path, module: str = "loadtest.faults.launcher") -> Iterator[Stage]:
    """A stage in ``folder``, closed at the end."""
    stage = Stage(folder, module)
    try:
        yield stage
    finally:
        stage.close()
