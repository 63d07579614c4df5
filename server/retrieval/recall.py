"""When an approximate index may answer: a policy over measured recall, without clocks, threads or indexes.

    EXACT ──index built──▶ PROVING ──proven──▶ APPROXIMATE
      ▲                       │                    │
      └──── not proven ───────┴──── recall, stale ─┘

A share of live queries is answered both ways. Recall is judged by a lower confidence bound over a sliding window of
them, so a short run of luck opens nothing, and too few measurements never do.
"""

from __future__ import annotations

from collections import deque
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from server.retrieval.base import Hits

_Z = 2.33  # one-sided 99 %


class Mode(StrEnum):
    """Who answers. While PROVING the exact engine does, and the index is only watched."""

    EXACT = "exact"
    PROVING = "proving"
    APPROXIMATE = "approximate"


class RecallGate:
    """Decides the mode from measured recall.

    Args:
        threshold: recall@k that must hold, in (0, 1).
        window: measurements judged together.
        share: of queries to measure, in (0, 1].

    ``changes`` counts transitions by (mode, reason). A closed gate opens again only through ``index_built``.

    Raises:
        ValueError: an argument outside its limits, or a window in which even perfect recall proves nothing.
    """

    def __init__(self, threshold: float, window: int, share: float) -> None:
        if not 0.0 < threshold < 1.0 or not 0.0 < share <= 1.0:
            raise ValueError(f"threshold, share: must lie in (0, 1), got {threshold}, {share}")
        if lower_bound(np.ones(window)) < threshold:
            raise ValueError(f"window: {window} measurements cannot prove a recall of {threshold}; take more")
        self.threshold, self.share = threshold, share
        self.mode = Mode.EXACT
        self.changes: dict[tuple[Mode, str], int] = {}
        self._recalls: deque[float] = deque(maxlen=window)
        self._owed = 0.0

    def pick(self, batch: int) -> NDArray[np.bool_]:
        """bool[batch]: the queries to measure; every 1/share-th, counted across batches."""
        owed = self._owed + self.share * np.arange(1, batch + 1)
        due = np.floor(owed)
        picked: NDArray[np.bool_] = np.diff(due, prepend=np.floor(self._owed)) > 0
        self._owed = float(owed[-1] % 1.0) if batch else self._owed
        return picked

    @property
    def bound(self) -> float:
        """The lower confidence bound of recall; 0 without measurements."""
        return lower_bound(np.array(self._recalls))

    def measured(self, recalls: NDArray[np.float64]) -> None:
        """Takes recalls float64[n] of measured queries, oldest first, and decides."""
        self._recalls.extend(recalls.tolist())
        if not recalls.size or self.mode is Mode.EXACT:
            return
        proven = self.bound >= self.threshold
        if self.mode is Mode.PROVING and proven:
            self._change(Mode.APPROXIMATE, "proven")
        elif self.mode is Mode.PROVING and len(self._recalls) == self._recalls.maxlen:
            self._change(Mode.EXACT, "not_proven")
        elif self.mode is Mode.APPROXIMATE and not proven:
            self._change(Mode.EXACT, "recall")

    def index_built(self) -> None:
        """Another index is there: nothing that was measured before says anything about it."""
        self._recalls.clear()
        self._change(Mode.PROVING, "built")

    def index_stale(self) -> None:
        """Too much changed since the index was built."""
        if self.mode is not Mode.EXACT:
            self._change(Mode.EXACT, "stale")

    def _change(self, mode: Mode, reason: str) -> None:
        self.mode = mode
        self.changes[mode, reason] = self.changes.get((mode, reason), 0) + 1


def lower_bound(recalls: NDArray[np.float64]) -> float:
    """One-sided 99 % bound of the mean recall, by normal approximation over the measurements and one more of 0.

    The added zero keeps the bound honest where there is no variance to go by: n perfect queries prove
    1 - 3.33 / (n + 1), not 1.
    """
    if not recalls.size:
        return 0.0
    sample = np.append(recalls, 0.0)
    return max(0.0, float(sample.mean() - _Z * sample.std(ddof=1) / np.sqrt(sample.size)))


def recall_of(approximate: Hits, exact: Hits) -> NDArray[np.float64]:
    """float64[n]: per query with exact hits, the share of places filled as well as exactly.

    By score, not by id: of rows with equal scores any is as good.
    """
    found = exact.slots >= 0
    counts = found.sum(axis=1)
    asked = counts > 0
    worst = np.where(found, exact.scores, np.inf).min(axis=1, keepdims=True)
    good = ((approximate.slots >= 0) & (approximate.scores >= worst)).sum(axis=1)
    recalls: NDArray[np.float64] = np.minimum(good[asked], counts[asked]) / counts[asked]
    return recalls
