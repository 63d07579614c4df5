"""Named arrays in one run of bytes, on the host and on the device: one copy moves them all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from kernels.backend import Backend

_ALIGNMENT_BYTES = 16


@dataclass(frozen=True)
class Field:
    """One array of a block; bool as uint8 and unsigned integers as signed ones (see kernels/backend.py)."""

    name: str
    dtype: DTypeLike
    shape: tuple[int, ...]


class Block:
    """Twin buffers with the same layout; page-locked on the host where there is a GPU.

    host: name → NumPy view. device: name → torch view. Copies are queued on the current stream; `settle` before
    the host reads what was downloaded, or refills what was uploaded.
    """

    def __init__(self, fields: list[Field], backend: Backend) -> None:
        offsets, total = [], 0
        for field in fields:
            offsets.append(total)
            size = int(np.prod(field.shape)) * np.dtype(field.dtype).itemsize
            total += -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        self._host_bytes = torch.zeros(max(total, 1), dtype=torch.uint8, pin_memory=backend.on_gpu)
        # Kept beside its view: the view does not own the memory on a GPU.
        self._column = backend.xp.zeros(max(total, 1), np.uint8)
        self._device_bytes: Any = backend.view(self._column)
        self.host: dict[str, NDArray[Any]] = {}
        self.device: dict[str, Any] = {}
        for field, offset in zip(fields, offsets, strict=True):
            dtype = np.dtype(field.dtype)
            size = int(np.prod(field.shape)) * dtype.itemsize
            span = slice(offset, offset + size)
            self.host[field.name] = self._host_bytes[span].numpy().view(dtype).reshape(field.shape)
            torch_dtype = torch.from_numpy(np.zeros(0, dtype)).dtype
            self.device[field.name] = self._device_bytes[span].view(torch_dtype).view(field.shape)
        self.nbytes = total
        self._copied = torch.cuda.Event() if backend.on_gpu else None

    def upload(self) -> None:
        """Queues the copy to the device."""
        self._device_bytes.copy_(self._host_bytes, non_blocking=True)
        self._mark()

    def download(self) -> None:
        """Queues the copy to the host."""
        self._host_bytes.copy_(self._device_bytes, non_blocking=True)
        self._mark()

    def settle(self) -> None:
        """Waits until the last queued copy was made; other threads of Python run meanwhile."""
        if self._copied is not None:
            self._copied.synchronize()

    def _mark(self) -> None:
        if self._copied is not None:
            self._copied.record()
