"""The argument check that the GPU kernels share."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def require_tensor(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: Sequence[int | None], device: torch.device
) -> None:
    """Raises ValueError naming ``name`` unless ``tensor`` has this dtype, shape and device and is contiguous.

    ``None`` in ``shape`` allows any length. Values are not looked at: that would wait for the device.
    """
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype:
        found = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(f"{name}: must be a tensor of {dtype}, got {found}")
    wrong_length = any(want is not None and got != want for got, want in zip(tensor.shape, shape, strict=False))
    if tensor.ndim != len(shape) or wrong_length:
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise ValueError(f"{name}: must have shape [{wanted}], got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: must be on {device}, got {tensor.device}: mixed devices")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: must be contiguous")
