"""Where GPU kernels run in tests: on a GPU where one is had, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
_SIGNED = {np.dtype(np.uint32): np.int32, np.dtype(np.uint64): np.int64, np.dtype(np.bool_): np.uint8}


def put(array: NDArray[Any]) -> torch.Tensor:
    """A copy on the device; bool as uint8, uint32 and uint64 as the signed integers with the same bits."""
    array = np.ascontiguousarray(array)
    array = array.view(_SIGNED.get(array.dtype, array.dtype))
    return torch.from_numpy(array.copy()).to(DEVICE)


def get(tensor: torch.Tensor) -> NDArray[Any]:
    """A copy on the host."""
    return tensor.cpu().numpy().copy()


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An output buffer full of rubbish, so that a kernel that does not write is seen."""
    rubbish = torch.empty(shape, dtype=dtype, device=DEVICE)
    return rubbish.fill_(float("nan") if dtype.is_floating_point else 77)
