"""From the host to the device in one copy: arrays laid out side by side in pinned memory, sent together."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from kernels.backend import Backend

LEAST_BYTES = 1 << 16
ALIGNED_BYTES = 64
"""Every array starts at a multiple of this, so that kernels see the same alignment on every call."""

Layout = Mapping[str, tuple[DTypeLike, tuple[int, ...]]]


class Staging:
    """Two pinned host buffers, used in turn, and the device buffer that they are copied to.

    Two, so that the next content can be written while the last copy still runs. They grow by doubling and never
    shrink. One thread uses it; ``copies`` counts how often something was sent, ``bytes_sent`` how much.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._pinned: list[torch.Tensor] = []
        self._copied: list[Any] = [None, None]
        self._turn = 0
        self._parts: dict[str, tuple[int, int, tuple[int, ...]]] = {}
        self._dtypes: dict[str, np.dtype[Any]] = {}
        self._used_bytes = 0
        self.copies = 0
        self.bytes_sent = 0
        self._grow(LEAST_BYTES)

    @property
    def nbytes(self) -> int:
        """Bytes that fit into one copy before the buffers grow."""
        return int(self._device.shape[0])

    def lay_out(self, layout: Layout) -> dict[str, NDArray[Any]]:
        """Host arrays of these dtypes and shapes, to be filled before `send`. Their content is rubbish.

        Waits for the copy before last, if it still runs.
        """
        at = 0
        self._parts.clear()
        self._dtypes.clear()
        for name, (given, shape) in layout.items():
            dtype = np.dtype(given)
            size = prod(shape) * dtype.itemsize
            self._parts[name], self._dtypes[name] = (at, size, shape), dtype
            at += -(-size // ALIGNED_BYTES) * ALIGNED_BYTES
        self._used_bytes = at
        if at > self.nbytes:
            self._grow(1 << (at - 1).bit_length())
        self._turn ^= 1
        if self._copied[self._turn] is not None:
            self._copied[self._turn].synchronize()
        host = self._pinned[self._turn].numpy()
        return {
            name: host[begin : begin + size].view(self._dtypes[name]).reshape(shape)
            for name, (begin, size, shape) in self._parts.items()
        }

    def send(self) -> dict[str, torch.Tensor]:
        """Copies what was laid out; device tensors with the same names, valid until the next `send`.

        Records come as int32[n, words], uint64 as int64, bool as uint8: the same bits.
        """
        if self._used_bytes:
            used = slice(0, self._used_bytes)
            self._device[used].copy_(self._pinned[self._turn][used], non_blocking=True)
            if self._backend.on_gpu:
                self._copied[self._turn] = torch.cuda.Event()
                self._copied[self._turn].record()
            self.copies += 1
            self.bytes_sent += self._used_bytes
        return {
            name: _tensor(self._device[begin : begin + size], self._dtypes[name], shape)
            for name, (begin, size, shape) in self._parts.items()
        }

    def _grow(self, nbytes: int) -> None:
        # Copies from the old buffers may still run: torch keeps pinned memory until they are done, and memory of
        # the device is handed on in the order of its one stream.
        self._pinned = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._backend.on_gpu) for _ in range(2)]
        self._copied = [None, None]
        self._device = self._backend.view(self._backend.xp.empty(nbytes, np.uint8))


_SIGNED = {np.dtype(np.uint64): torch.int64, np.dtype(np.bool_): torch.uint8}


def _tensor(part: torch.Tensor, dtype: np.dtype[Any], shape: tuple[int, ...]) -> torch.Tensor:
    if dtype.names is not None:
        return part.view(torch.int32).view(*shape, dtype.itemsize // 4)
    known = _SIGNED.get(dtype)
    return part.view(known or getattr(torch, dtype.name)).view(*shape)
