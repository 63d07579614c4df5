"""Tensors through CUDA shared memory, with a Triton on the same GPU. Not run on a GPU yet.

Written against tritonclient's ``cuda_shared_memory``; its tests replace that module by one that keeps the regions in
host memory, which proves the order of calls, not the memory. Needs ``cuda-python`` (liverank[gpu]).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import InferenceServerClient

from server.errors import ConfigError, SharedMemoryRefused
from server.scoring.shared_memory import Region, SharedMemory

CUDA = "tritonclient.utils.cuda_shared_memory"


class CudaRegion(Region):
    """Two allocations on one device, so that reading the scores does not copy the features back."""

    output_offset = 0

    def __init__(self, cuda: Any, name: str, capacity_rows: int, n_features: int, device_id: int) -> None:
        super().__init__(capacity_rows, n_features)
        self.input_name, self.output_name = f"{name}-in", f"{name}-out"
        self._cuda, self._device_id = cuda, device_id
        self._input = cuda.create_shared_memory_region(self.input_name, self.input_bytes, device_id)
        try:
            self._output = cuda.create_shared_memory_region(self.output_name, self.output_bytes, device_id)
        except cuda.CudaSharedMemoryException:
            cuda.destroy_shared_memory_region(self._input)
            raise

    def register(self, client: InferenceServerClient, timeout_s: float) -> None:
        """See Region."""
        for name, handle, size in (
            (self.input_name, self._input, self.input_bytes),
            (self.output_name, self._output, self.output_bytes),
        ):
            raw = self._cuda.get_raw_handle(handle)
            client.register_cuda_shared_memory(name, raw, self._device_id, size, client_timeout=timeout_s)

    def unregister(self, client: InferenceServerClient, timeout_s: float) -> None:
        """See Region."""
        for name in (self.input_name, self.output_name):
            client.unregister_cuda_shared_memory(name, client_timeout=timeout_s)

    def write(self, rows: NDArray[np.float32]) -> None:
        """See Region. An array that is on the device already (DLPack) is copied there, not through the host."""
        if isinstance(rows, np.ndarray):
            self._cuda.set_shared_memory_region(self._input, [rows])
        else:
            self._cuda.set_shared_memory_region_from_dlpack(self._input, [rows])

    def read(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """See Region."""
        return np.asarray(self._cuda.get_contents_as_numpy(self._output, np.float32, list(shape)))

    def release(self) -> None:
        """See Region. Only after `unregister`: freeing what another process has mapped is undefined in CUDA."""
        self._cuda.destroy_shared_memory_region(self._input)
        self._cuda.destroy_shared_memory_region(self._output)


class CudaSharedMemory(SharedMemory):
    """`Transport` over CUDA IPC.

    Raises:
        ConfigError: the libraries cannot be loaded.
    """

    name = "cuda_shm"

    def __init__(self, device_id: int = 0) -> None:
        super().__init__()
        self._device_id = device_id
        try:
            self._cuda = import_module(CUDA)
        except (ImportError, OSError) as error:
            raise ConfigError(f"scoring.transport: cuda_shm needs cuda-python (liverank[gpu]): {error}") from error

    def make(self, name: str, capacity_rows: int, n_features: int) -> Region:
        """See SharedMemory."""
        try:
            return CudaRegion(self._cuda, name, capacity_rows, n_features, self._device_id)
        except self._cuda.CudaSharedMemoryException as error:
            raise SharedMemoryRefused(f"no CUDA shared memory on device {self._device_id}: {error}") from error
