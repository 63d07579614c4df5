"""Sums over a ranked batch, for the metrics: a few dozen numbers, whatever the batch's size."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kernels.slate import Outcome, Slates
from kernels.verify import Drop
from server.ranking.slates import Candidates, Tally
from server.retrieval.sources import SOURCES


def tally_of(
    slots: NDArray[np.int32],
    sources: NDArray[np.uint32],
    exploration: NDArray[np.float32],
    picks: NDArray[np.int32],
    drops: NDArray[np.uint8],
    candidates: Candidates | None = None,
    selected: Slates | None = None,
) -> Tally:
    """The tally of B verified slates; shapes as in `SlateBatch`. Without candidates nothing was proposed."""
    shown = slots >= 0
    none = np.zeros(len(SOURCES), np.int64)
    outcomes = np.zeros(len(Outcome), np.int64)
    if selected is not None:
        outcomes = np.bincount(selected.outcome.ravel(), minlength=len(Outcome))
    return Tally(
        proposed=none if candidates is None else _count_bits(candidates.sources.ravel()),
        served=_count_bits(sources[shown]),
        excluded=0 if candidates is None else int(candidates.excluded.sum()),
        outcomes=outcomes,
        drops=np.bincount(drops[picks >= 0], minlength=len(Drop)),
        shown=int(np.count_nonzero(shown)),
        explored=int(np.count_nonzero(shown & (exploration > 0))),
    )


def _count_bits(sources: NDArray[np.uint32]) -> NDArray[np.int64]:
    """How many of ``sources`` uint32[n] have each source's bit, int64[S]: one histogram of bit patterns."""
    patterns = np.bincount(sources, minlength=1 << len(SOURCES))
    every = np.arange(len(patterns))
    return np.array([patterns[(every >> bit) & 1 == 1].sum() for bit in range(len(SOURCES))], np.int64)
