"""One scorer for more than one thread: the refresh, and whoever warms it up or takes it back into service."""

from __future__ import annotations

import threading
import time

import numpy as np
from numpy.typing import NDArray

from server.errors import ScorerTimeout
from server.scoring.base import Scores, VersionedScorer


class SharedScorer:
    """Asks the scorer within for one caller after the other; waiting counts towards the deadline."""

    def __init__(self, scorer: VersionedScorer) -> None:
        self._scorer = scorer
        self._lock = threading.Lock()
        self.name = scorer.name

    @property
    def transport(self) -> str:
        """See Scorer."""
        return self._scorer.transport

    def score(self, features: NDArray[np.float32], deadline_s: float) -> Scores:
        """See Scorer. Raises ScorerTimeout also when others did not finish in time."""
        began_s = time.monotonic()
        if not self._lock.acquire(timeout=max(0.0, deadline_s)):
            raise ScorerTimeout(f"another call of this version took {deadline_s * 1e3:.0f} ms and more")
        try:
            return self._scorer.score(features, deadline_s - (time.monotonic() - began_s))
        finally:
            self._lock.release()

    def pin(self, version: int) -> None:
        """See VersionedScorer."""
        self._scorer.pin(version)

    def serve(self) -> None:
        """See VersionedScorer."""
        self._scorer.serve()

    def close(self) -> None:
        """See Scorer. Waits for a call in progress."""
        with self._lock:
            self._scorer.close()
