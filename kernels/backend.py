"""One decision: which device this process computes on, and why. Nothing else asks.

Importing this module loads NumPy only; CuPy, torch and Triton are imported when a GPU was chosen.
"""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

Choice = Literal["auto", "cuda", "cpu"]
_CUDA_SUCCESS, _CUDA_NO_DEVICE = 0, 100


class DeviceError(RuntimeError):
    """A GPU was asked for, or is there, and cannot be used; the message says what is broken and the mend."""


@dataclass(frozen=True)
class Backend:
    """The device of this process.

    device: "cpu" or "cuda". why: one sentence for the log and the doctor. xp: NumPy or CuPy, for columns.
    pool: who allocates device memory ("rmm", "cupy", or "" on the CPU).
    """

    device: Literal["cpu", "cuda"]
    why: str
    xp: ModuleType
    pool: str = ""

    @property
    def on_gpu(self) -> bool:
        """Whether columns live on a GPU."""
        return self.device == "cuda"

    def to_host(self, array: Any) -> NDArray[Any]:
        """A NumPy array with the values of a column; the array itself on the CPU. Waits for the device."""
        return array if isinstance(array, np.ndarray) else self.xp.asnumpy(array)

    def view(self, array: Any) -> Any:
        """The torch tensor over a column's own memory, without a copy (DLPack on the GPU).

        Raises:
            DeviceError: the array lives on another device than this backend's.
        """
        torch = import_module("torch")
        if isinstance(array, np.ndarray):
            if self.on_gpu:
                raise DeviceError("a NumPy array was given where a device column is wanted: mixed devices")
            return torch.from_numpy(array)
        if not self.on_gpu:
            raise DeviceError("a device column was given on a CPU backend: mixed devices")
        return torch.from_dlpack(array)


CPU = Backend("cpu", "chosen: cpu", np)


def choose(device: Choice, allow_cpu: bool = False) -> Backend:
    """Picks the device once and logs why.

    Args:
        device: "cpu" never looks for a GPU; "cuda" insists on one; "auto" takes one that is there.
        allow_cpu: with "auto", a GPU that is there but cannot be used is logged and the CPU taken instead of
            stopping. Off by default: a machine that should have a GPU must not silently serve without it.

    Raises:
        DeviceError: see above.
    """
    backend = _choose(device, allow_cpu)
    logger.info("device: %s (%s)", backend.device, backend.why)
    return backend


def _choose(device: Choice, allow_cpu: bool) -> Backend:
    if device == "cpu":
        return CPU
    try:
        name = visible_gpu()
        if name is None:
            if device == "cuda":
                raise DeviceError(
                    "no NVIDIA driver (libcuda.so.1) or no GPU is visible; set device = 'cpu' to serve so"
                )
            return Backend("cpu", "auto: no NVIDIA driver or no visible GPU", np)
        return _open_gpu(name)
    except DeviceError as error:
        if device == "cuda" or not allow_cpu:
            raise
        logger.error("the GPU cannot be used, serving from the CPU as configured: %s", error)
        return Backend("cpu", f"auto: the GPU cannot be used: {error}", np)


def visible_gpu() -> str | None:
    """The first GPU's name, asked of the driver itself; None: no driver or no device.

    Raises:
        DeviceError: there is a driver, and it does not start.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    status = driver.cuInit(0)
    if status == _CUDA_NO_DEVICE:
        return None
    if status != _CUDA_SUCCESS:
        raise DeviceError(f"the NVIDIA driver does not start (cuInit: error {status}); look at nvidia-smi")
    count = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    if count.value == 0:
        return None
    name = ctypes.create_string_buffer(100)
    driver.cuDeviceGetName(name, len(name), 0)
    return name.value.decode(errors="replace")


def _open_gpu(name: str) -> Backend:
    """Loads what the GPU path needs and proves that it computes. Raises DeviceError naming what does not."""
    modules: dict[str, Any] = {}
    for needed in ("cupy", "torch", "triton"):
        try:
            modules[needed] = import_module(needed)
        except Exception as error:
            raise DeviceError(
                f"{name} is there, but {needed} cannot be imported ({error}); install liverank[gpu]"
            ) from error
    if not modules["torch"].cuda.is_available():
        raise DeviceError(
            f"{name} is there, but torch {modules['torch'].__version__} was built without CUDA or cannot use it"
        )
    pool = _share_pool(modules["cupy"])
    try:
        column = modules["cupy"].arange(4, dtype=np.int32)
        total = int(modules["torch"].from_dlpack(column).sum())
    except Exception as error:
        raise DeviceError(f"{name} is there, but a first computation failed: {error}") from error
    if total != 6:
        raise DeviceError(f"{name} is there, but CuPy and torch do not share memory (sum of 0..3 gave {total})")
    return Backend("cuda", f"{name}, memory pool: {pool}", modules["cupy"], pool)


def _share_pool(cupy: Any) -> str:
    """One RMM pool for CuPy (hence our columns and torch's views of them) and cuDF, if RMM is installed.

    Torch's own allocator is left alone: torch allocates nothing on the request path but the workspace inside a
    captured CUDA graph, and that must come from the graph's private pool, which RMM cannot give.
    """
    try:
        rmm = import_module("rmm")
        allocators = import_module("rmm.allocators.cupy")
    except ImportError:
        return "cupy"
    rmm.reinitialize(pool_allocator=True)
    cupy.cuda.set_allocator(allocators.rmm_cupy_allocator)
    return "rmm"
