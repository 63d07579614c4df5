"""The one argument check that the public kernels share."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


def require_array(name: str, array: NDArray[Any], dtype: DTypeLike, shape: tuple[int | None, ...]) -> None:
    """Raises ValueError naming ``name`` unless ``array`` has this dtype and shape and is C-contiguous.

    ``None`` in ``shape`` allows any length. Another memory layout would be correct, but would make
    Numba compile a kernel again, seconds long, in the middle of serving.
    """
    if not isinstance(array, np.ndarray) or array.dtype != np.dtype(dtype):
        found = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{name}: must be an array of {np.dtype(dtype)}, got {found}")
    wrong_length = any(want is not None and got != want for got, want in zip(array.shape, shape, strict=False))
    if array.ndim != len(shape) or wrong_length:
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise ValueError(f"{name}: must have shape [{wanted}], got {list(array.shape)}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name}: must be C-contiguous; copy it with numpy.ascontiguousarray")
