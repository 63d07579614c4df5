"""The host's side of embeddings that a search engine keeps on a device."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kernels.checks import require_array
from kernels.lines import zeros_in_lines


class MirroredRows:
    """Embeddings float32[capacity, D] on the host, and which of them the device has not seen.

    Rows are written one event at a time and searched in batches: so they are collected here and go to the device
    together, before the next search.
    """

    def __init__(self, capacity: int, dim: int) -> None:
        if capacity < 1 or dim < 1:
            raise ValueError(f"capacity, dim: must be at least 1, got {capacity}, {dim}")
        self.embeddings: NDArray[np.float32] = zeros_in_lines((capacity, dim), np.float32)
        self._unseen: list[NDArray[np.int32]] = []

    def write(self, slots: NDArray[np.int32], rows: NDArray[np.float32]) -> None:
        """Writes rows float32[n, D] at slots int32[n]. Raises ValueError naming the argument."""
        require_array("slots", slots, np.int32, (None,))
        require_array("rows", rows, np.float32, (slots.size, self.embeddings.shape[1]))
        self.embeddings[slots] = rows
        self._unseen.append(slots.copy())

    def take_unseen(self) -> NDArray[np.int32]:
        """int32[n]: slots written since the last call, each once, ascending."""
        if not self._unseen:
            return np.zeros(0, np.int32)
        slots = np.unique(np.concatenate(self._unseen))
        self._unseen.clear()
        return slots
