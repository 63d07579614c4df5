"""Feature rows that were really scored: what a new version is tried on before anybody is served by it."""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray


class SampleRing:
    """The newest ``capacity`` of the rows offered, a few of each offer. Thread-safe.

    Args:
        per_offer: rows taken of one offer at most, evenly spread, so that the ring spans many refreshes.
    """

    def __init__(self, n_features: int, capacity: int = 1_024, per_offer: int = 64) -> None:
        self._rows = np.zeros((capacity, n_features), np.float32)
        self._per_offer, self._filled, self._next = per_offer, 0, 0
        self._turn = 0
        self._lock = threading.Lock()

    def offer(self, features: NDArray[np.float32]) -> None:
        """Takes some rows of float32[n, F]."""
        step = max(1, -(-len(features) // self._per_offer))
        taken = features[self._turn % step :: step]  # other rows each time
        with self._lock:
            self._turn += 1
            at = (self._next + np.arange(len(taken))) % len(self._rows)
            self._rows[at] = taken
            self._next = (self._next + len(taken)) % len(self._rows)
            self._filled = min(len(self._rows), self._filled + len(taken))

    def rows(self) -> NDArray[np.float32]:
        """A copy, float32[m, F]; one row of zeros before anything was scored."""
        with self._lock:
            return self._rows[: max(1, self._filled)].copy()
