"""The one argument check that the public kernels share."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_DTYPES: dict[Any, np.dtype[Any]] = {
    scalar: np.dtype(scalar)
    for scalar in (np.bool_, np.uint8, np.int32, np.uint32, np.int64, np.uint64, np.float32, np.float64)
}


def _fits(found: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    if len(found) != len(wanted):
        return False
    for have, want in zip(found, wanted, strict=True):  # noqa: SIM110 - a generator costs more than the comparisons
        if want is not None and want != have:
            return False
    return True


def require_array(name: str, array: NDArray[Any], dtype: DTypeLike, shape: tuple[int | None, ...]) -> None:
    """Raises ValueError naming ``name`` unless ``array`` has this dtype and shape and is C-contiguous.

    ``None`` in ``shape`` allows any length. Another memory layout would be correct, but would make
    Numba compile a kernel again, seconds long, in the middle of serving.
    """
    if isinstance(array, np.ndarray) and array.dtype is _DTYPES.get(dtype) and array.flags.c_contiguous:
        # Once per argument and batch: what is right is let pass quickly.
        found_shape = array.shape
        if found_shape == shape or (None in shape and _fits(found_shape, shape)):
            return
    if not isinstance(array, np.ndarray) or array.dtype != np.dtype(dtype):
        found = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{name}: must be an array of {np.dtype(dtype)}, got {found}")
    wrong_length = any(want is not None and got != want for got, want in zip(array.shape, shape, strict=False))
    if array.ndim != len(shape) or wrong_length:
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise ValueError(f"{name}: must have shape [{wanted}], got {list(array.shape)}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name}: must be C-contiguous; copy it with numpy.ascontiguousarray")
