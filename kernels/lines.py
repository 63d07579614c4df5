"""Arrays that begin where a cache line does: a vector that lies across two lines takes twice as long to load."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

LINE_BYTES = 64


def zeros_in_lines(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """What ``np.zeros`` returns, from the beginning of a cache line; NumPy itself promises 16 bytes."""
    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    store = np.zeros(size + LINE_BYTES, np.uint8)
    first = -store.ctypes.data % LINE_BYTES
    return store[first : first + size].view(kind).reshape(shape)
