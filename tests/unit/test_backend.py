"""The one decision about the device: taken once, with its reason, never silently."""

from __future__ import annotations

import ctypes
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kernels import backend
from kernels.backend import CPU, DeviceError, choose

ROOT = Path(__file__).resolve().parents[2]


def test_cpu_never_looks_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "visible_gpu", lambda: pytest.fail("looked"))
    assert choose("cpu").device == "cpu"


def test_auto_takes_the_cpu_where_no_gpu_is_visible_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend, "visible_gpu", lambda: None)
    with caplog.at_level(logging.INFO):
        assert choose("auto").xp is np
    assert "no NVIDIA driver or no visible GPU" in caplog.text


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "visible_gpu", lambda: None)
    with pytest.raises(DeviceError, match=r"no NVIDIA driver .* or no GPU"):
        choose("cuda")


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_that_cannot_be_used_stops_the_start_and_names_what_is_broken(
    monkeypatch: pytest.MonkeyPatch, device: backend.Choice
) -> None:
    monkeypatch.setattr(backend, "visible_gpu", lambda: "Test GPU")
    monkeypatch.setitem(sys.modules, "cupy", None)  # as if it were not installed
    with pytest.raises(DeviceError, match=r"Test GPU is there, but cupy cannot be imported .* install liverank\[gpu\]"):
        choose(device)


def test_a_broken_gpu_may_be_passed_over_only_where_configuration_allows_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend, "visible_gpu", lambda: "Test GPU")
    monkeypatch.setitem(sys.modules, "cupy", None)
    chosen = choose("auto", allow_cpu=True)
    assert chosen.device == "cpu" and "cupy cannot be imported" in chosen.why
    assert "serving from the CPU as configured" in caplog.text


class _Driver:
    """libcuda as far as it is asked."""

    def __init__(self, status: int, devices: int = 1) -> None:
        self._status, self._devices = status, devices

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self._status

    def cuDeviceGetCount(self, count: object) -> int:  # noqa: N802
        count._obj.value = self._devices  # type: ignore[attr-defined]
        return 0

    def cuDeviceGetName(self, name: ctypes.Array[ctypes.c_char], length: int, device: int) -> int:  # noqa: N802
        name.value = b"Test GPU"
        return 0


@pytest.mark.parametrize(("driver", "found"), [(_Driver(0), "Test GPU"), (_Driver(100), None), (_Driver(0, 0), None)])
def test_the_driver_itself_is_asked_for_a_gpu(
    monkeypatch: pytest.MonkeyPatch, driver: _Driver, found: str | None
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert backend.visible_gpu() == found


def test_a_driver_that_does_not_start_is_an_error_and_not_a_missing_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: _Driver(999))
    with pytest.raises(DeviceError, match=r"cuInit: error 999"):
        choose("auto")


def test_a_view_shares_the_columns_memory() -> None:
    column = np.zeros(3, np.float32)
    CPU.view(column)[1] = 5.0
    assert column[1] == 5.0 and CPU.to_host(column) is column


def test_mixed_devices_are_refused() -> None:
    on_gpu = backend.Backend("cuda", "test", np)
    with pytest.raises(DeviceError, match="mixed devices"):
        on_gpu.view(np.zeros(1))
    with pytest.raises(DeviceError, match="mixed devices"):
        CPU.view(object())


def test_choosing_the_cpu_loads_neither_cupy_nor_torch_nor_triton() -> None:
    program = (
        "import sys; from kernels.backend import choose; choose('cpu');"
        "import server.app, kernels.topk, kernels.slate;"
        "bad = {'cupy', 'torch', 'triton', 'cudf', 'rmm'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, cwd=ROOT)
