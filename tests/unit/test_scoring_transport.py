"""Which way tensors take, and the order of calls for CUDA shared memory (regions replaced by host memory)."""

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from server.errors import ConfigError, SharedMemoryRefused
from server.scoring import cuda_shm, shared_memory, system_shm, transport
from server.scoring.system_shm import SystemSharedMemory
from server.scoring.transport import Auto, PlainTensors, open_transport

ROWS = np.arange(12, dtype=np.float32).reshape(2, 6)


class CudaSharedMemoryError(Exception):
    """As the real module's, under another name."""


class FakeCuda(ModuleType):
    """`tritonclient.utils.cuda_shared_memory` with regions in host memory."""

    CudaSharedMemoryException = CudaSharedMemoryError

    def __init__(self, most_bytes: int = 1 << 30) -> None:
        super().__init__(cuda_shm.CUDA)
        self.alive: dict[str, np.ndarray[Any, Any]] = {}
        self.most_bytes = most_bytes

    def create_shared_memory_region(self, name: str, size: int, device_id: int) -> str:
        if size > self.most_bytes:
            raise CudaSharedMemoryError("out of memory")
        self.alive[name] = np.zeros(size // 4, np.float32)
        return name

    def destroy_shared_memory_region(self, handle: str) -> None:
        del self.alive[handle]

    def get_raw_handle(self, handle: str) -> bytes:
        return handle.encode()

    def set_shared_memory_region(self, handle: str, values: list[Any]) -> None:
        self.alive[handle][: values[0].size] = values[0].ravel()

    def get_contents_as_numpy(self, handle: str, dtype: Any, shape: list[int]) -> Any:
        return self.alive[handle][: int(np.prod(shape))].reshape(shape).copy()


class FakeTriton:
    """Knows regions, as Triton does: a name once, and no forgetting while in use."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}
        self.in_use: set[str] = set()
        self.refuses = False

    def register_cuda_shared_memory(
        self, name: str, raw: bytes, device_id: int, size: int, client_timeout: float
    ) -> None:
        if self.refuses or name in self.known:
            raise InferenceServerException("no", status="StatusCode.INTERNAL")
        self.known[name] = size

    def unregister_cuda_shared_memory(self, name: str, client_timeout: float) -> None:
        if name in self.in_use:
            raise InferenceServerException("currently in use", status="StatusCode.INTERNAL")
        self.known.pop(name, None)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setitem(sys.modules, cuda_shm.CUDA, fake)
    return fake


def answer(n: int) -> Any:
    return SimpleNamespace(get_output=lambda name: SimpleNamespace(shape=[n], datatype="FP32"))


def test_cuda_regions_are_registered_once_and_carry_rows_and_scores(cuda: FakeCuda) -> None:
    tensors, triton = open_transport("cuda_shm", "127.0.0.1:1"), FakeTriton()
    for _ in range(3):
        call = tensors.prepare(triton, ROWS, 1.0)  # type: ignore[arg-type]
    (inputs, outputs) = sorted(cuda.alive)
    assert triton.known == {inputs: 1024 * 6 * 4, outputs: 1024 * 4}
    np.testing.assert_array_equal(cuda.alive[inputs][:12], ROWS.ravel())
    cuda.alive[outputs][:2] = [0.25, 0.5]
    assert tensors.read(answer(2), 2, "m/1").tolist() == [0.25, 0.5]
    (tensor,) = call.inputs
    assert tensor.name() == "features" and tensor.shape() == [2, 6]
    tensors.close(triton)  # type: ignore[arg-type]
    assert cuda.alive == {} and triton.known == {}


def test_cuda_memory_that_a_call_still_uses_is_not_freed_before_triton_lets_go(cuda: FakeCuda) -> None:
    tensors, triton = open_transport("cuda_shm", "127.0.0.1:1"), FakeTriton()
    tensors.prepare(triton, ROWS, 1.0)  # type: ignore[arg-type]
    first = set(cuda.alive)
    triton.in_use = set(first)
    tensors.failed()
    tensors.prepare(triton, ROWS, 1.0)  # type: ignore[arg-type]
    assert first <= set(cuda.alive) and len(cuda.alive) == 4
    triton.in_use = set()
    tensors.failed()
    tensors.prepare(triton, ROWS, 1.0)  # type: ignore[arg-type]
    assert not first & set(cuda.alive) and len(cuda.alive) == 2


def test_a_region_in_use_when_its_owner_goes_is_asked_for_again_until_triton_forgets_it(cuda: FakeCuda) -> None:
    tensors, triton, asked = open_transport("cuda_shm", "127.0.0.1:1"), FakeTriton(), list[str]()
    tensors.prepare(triton, ROWS, 1.0)  # type: ignore[arg-type]
    tensors.prepare(triton, np.tile(ROWS, (2_000, 1)), 1.0)  # type: ignore[arg-type]
    assert triton.known
    triton.in_use = set(triton.known)
    forget = triton.unregister_cuda_shared_memory

    def at_the_third_time(name: str, client_timeout: float) -> None:
        asked.append(name)
        if asked.count(name) == 3:
            triton.in_use.discard(name)
        forget(name, client_timeout)

    triton.unregister_cuda_shared_memory = at_the_third_time  # type: ignore[method-assign]
    tensors.close(triton)  # type: ignore[arg-type]
    assert not triton.known and not cuda.alive


@pytest.mark.parametrize(("status", "again"), [("StatusCode.INTERNAL", True), ("StatusCode.UNAVAILABLE", False)])
def test_a_triton_that_never_forgets_or_is_gone_holds_nobody_up(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, status: str, again: bool
) -> None:
    monkeypatch.setattr(shared_memory, "CLOSE_S", 0.03)
    tensors, triton, calls = open_transport("cuda_shm", "127.0.0.1:1"), FakeTriton(), list[str]()
    tensors.prepare(triton, ROWS, 1.0)  # type: ignore[arg-type]

    def never(name: str, client_timeout: float) -> None:
        calls.append(name)
        raise InferenceServerException("no", status=status)

    triton.unregister_cuda_shared_memory = never  # type: ignore[method-assign]
    tensors.close(triton)  # type: ignore[arg-type]
    assert not cuda.alive and (len(calls) > 1) is again


def test_no_room_on_the_device_and_a_refusing_triton_are_refusals(cuda: FakeCuda) -> None:
    tensors, triton = open_transport("cuda_shm", "127.0.0.1:1"), FakeTriton()
    cuda.most_bytes = 5000  # the output fits, the input does not
    with pytest.raises(SharedMemoryRefused, match="device 0: out of memory"):
        tensors.prepare(triton, ROWS, 1.0)  # type: ignore[arg-type]
    assert cuda.alive == {}
    cuda.most_bytes, triton.refuses = 1 << 30, True
    with pytest.raises(SharedMemoryRefused, match="cannot map our cuda_shm region"):
        tensors.prepare(triton, ROWS, 1.0)  # type: ignore[arg-type]


def test_auto_takes_shared_memory_only_with_a_triton_on_this_machine(cuda: FakeCuda) -> None:
    assert open_transport("auto", "192.0.2.1:8001").name == "plain"
    assert open_transport("auto", "192.0.2.1:8001", on_gpu=True).name == "plain"
    for here in ("127.0.0.1:8001", "localhost:8001", "[::1]:8001", "unix:/run/triton.sock"):
        assert open_transport("auto", here).name == "system_shm"
        assert open_transport("auto", here, on_gpu=True).name == "cuda_shm"
    assert open_transport("system_shm", "192.0.2.1:8001").name == "system_shm", "who says so must know"
    assert open_transport("plain", "127.0.0.1:8001").name == "plain"


def test_cuda_without_its_libraries_names_the_setting_and_auto_does_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, cuda_shm.CUDA, None)
    with pytest.raises(ConfigError, match=r"^scoring\.transport: "):
        open_transport("cuda_shm", "127.0.0.1:8001")
    fallbacks: list[int] = []
    auto = open_transport("auto", "127.0.0.1:8001", on_gpu=True, on_fallback=lambda: fallbacks.append(1))
    assert auto.name == "system_shm" and fallbacks == [1]


class Refusing(PlainTensors):
    name = "system_shm"

    def __init__(self) -> None:
        self.asked = 0
        self.refuses = True

    def prepare(self, client: Any, rows: Any, timeout_s: float) -> Any:
        self.asked += 1
        if self.refuses:
            raise SharedMemoryRefused("no room")
        return super().prepare(client, rows, timeout_s)


def test_auto_counts_a_refusal_goes_plain_and_asks_again_later_or_after_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = [1000.0]
    monkeypatch.setattr(transport, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    refusals: list[int] = []
    shared = Refusing()
    auto = Auto(shared, lambda: refusals.append(1))
    for _ in range(3):
        auto.prepare(None, ROWS, 1.0)  # type: ignore[arg-type]
    assert (auto.name, shared.asked, refusals) == ("plain", 1, [1])
    now_s[0] += transport.RETRY_S
    auto.prepare(None, ROWS, 1.0)  # type: ignore[arg-type]
    assert (auto.name, shared.asked, refusals) == ("plain", 2, [1, 1])
    shared.refuses = False
    auto.prepare(None, ROWS, 1.0)  # type: ignore[arg-type]
    assert auto.name == "plain"
    auto.failed()
    auto.prepare(None, ROWS, 1.0)  # type: ignore[arg-type]
    assert (auto.name, refusals) == ("system_shm", [1, 1])


def test_auto_leaves_triton_its_share_of_a_small_dev_shm(monkeypatch: pytest.MonkeyPatch) -> None:
    free = system_shm.SPARE_BYTES + (1 << 14)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_frsize=1, f_bavail=free))
    with pytest.raises(SharedMemoryRefused, match="64 MiB free"):
        SystemSharedMemory(polite=True).make("liverank-test", 1024, 6)
    region = SystemSharedMemory().make("liverank-test", 1024, 6)
    region.release()
    (system_shm.SHM / "liverank-test").unlink()


def test_memory_that_cannot_be_had_is_a_refusal_and_leaves_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SharedMemoryRefused, match="No space left"):
        SystemSharedMemory().make("liverank-test-full", 1024, 6)
    assert not (system_shm.SHM / "liverank-test-full").exists()
