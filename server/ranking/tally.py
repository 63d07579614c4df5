"""Sums over a ranked batch, for the metrics: a few dozen numbers, whatever the batch's size."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kernels.eligibility import Drop
from kernels.slate import Outcome, Slates
from kernels.tally import DROPS, OUTCOMES, count_batch
from server.ranking.slates import Candidates, Tally
from server.retrieval.sources import SOURCES

_NOT_PROPOSED, _NOT_SELECTED = np.zeros((0, 0), np.uint32), np.zeros((0, 0), np.uint8)
_NONE_EXCLUDED = np.zeros(0, np.int32)


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
    counts = count_batch(
        _NOT_PROPOSED if candidates is None else candidates.sources,
        _NOT_SELECTED if selected is None else selected.outcome,
        picks, drops, slots, sources, exploration,
        _NONE_EXCLUDED if candidates is None else candidates.excluded,
    )  # fmt: skip
    return Tally(
        proposed=counts.proposed[: len(SOURCES)],
        served=counts.served[: len(SOURCES)],
        excluded=int(counts.totals[2]),
        outcomes=counts.outcomes,
        drops=counts.drops,
        shown=int(counts.totals[0]),
        explored=int(counts.totals[1]),
    )


assert (len(Outcome), len(Drop)) == (OUTCOMES, DROPS)
