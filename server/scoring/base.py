"""What a scorer is: features in, one trend score per row out, or a ScoringError."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Scores:
    """The model's answer.

    values: float32[n], calibrated probability in [0, 1]; a row may be non-finite (the ladder handles it).
    model_version: such as "trendiness/1".
    """

    values: NDArray[np.float32]
    model_version: str


class Scorer(Protocol):
    """A trendiness model behind some transport. Called from one thread at a time."""

    name: str

    @property
    def transport(self) -> str:
        """How tensors travel now: "in_process", "plain", "system_shm" or "cuda_shm"."""
        ...

    def score(self, features: NDArray[np.float32], deadline_s: float) -> Scores:
        """Scores float32[n, F] rows; never answers after ``deadline_s`` seconds.

        Raises:
            ScorerUnavailable, ScorerTimeout, BadScores, SchemaMismatch.
        """
        ...

    def close(self) -> None:
        """Releases connections; idempotent."""
        ...


class VersionedScorer(Scorer, Protocol):
    """A scorer that can be told which version answers."""

    def pin(self, version: int) -> None:
        """From the next call on only this version answers. Any thread."""
        ...

    def serve(self) -> None:
        """It is no longer on trial: a broken model may be reloaded, which interrupts all its versions."""
        ...
