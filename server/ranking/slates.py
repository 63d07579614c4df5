"""What a ranked batch is, before it is encoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels.slate import Slates
from server.retrieval.query import QueryBatch
from server.scoring.ladder import Level


@dataclass(frozen=True)
class StageTimes:
    """Wall time of the stages of one batch, microseconds."""

    retrieve_us: int = 0
    blend_us: int = 0
    score_us: int = 0
    select_us: int = 0
    verify_us: int = 0


class Heads(NamedTuple):
    """The ranker's answer, float32[R, 4], to candidates in rows int64[R] and columns int64[R]."""

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    values: NDArray[np.float32]

    def of(self, row: int, column: int) -> list[float]:
        """Of one candidate; NaN where it was not asked."""
        (at,) = np.nonzero((self.rows == row) & (self.columns == column))
        return self.values[at[0]].tolist() if len(at) else [float("nan")] * self.values.shape[1]


@dataclass(frozen=True)
class Candidates:
    """B x K candidates as they were scored; what Explain and the exposure record read.

    slots int32[B, K] (-1 padding), sources uint32[B, K], counts int32[B], excluded int32[B] (dropped
    because the request excludes them), utility and similarity float32[B, K]. heads: the ranker's answer; None
    without one.
    """

    slots: NDArray[np.int32]
    sources: NDArray[np.uint32]
    counts: NDArray[np.int32]
    excluded: NDArray[np.int32]
    utility: NDArray[np.float32]
    similarity: NDArray[np.float32]
    heads: Heads | None = None


@dataclass(frozen=True)
class RankedBy:
    """What became of the ranker's part. version: that scored, such as "ranker/3", or "" and the ``problem``.

    gone: candidates whose rows held another session when the answer came.
    """

    version: str
    problem: str
    gone: int


@dataclass(frozen=True)
class Tally:
    """What a batch did, summed for the metrics.

    proposed, served: int64[S], candidates and shown streams per source. excluded: candidates the requests
    exclude. outcomes int64[7] by `Outcome`, drops int64[9] by `Drop`. shown, explored: streams in the slates,
    and how many of them were drawn by chance.
    """

    proposed: NDArray[np.int64]
    served: NDArray[np.int64]
    excluded: int
    outcomes: NDArray[np.int64]
    drops: NDArray[np.int64]
    shown: int
    explored: int


@dataclass(frozen=True)
class SlateBatch:
    """Verified slates of B requests.

    slots int32[B, L] padded with -1, counts int32[B], scores float32[B, L], sources uint32[B, L],
    exploration float32[B, L] (propensity; 0: not exploration), as_of_ms: time of the last check.
    picks int32[B, P] and drops uint8[B, P] say what the last check was offered and removed.
    """

    batch: QueryBatch
    slots: NDArray[np.int32]
    counts: NDArray[np.int32]
    scores: NDArray[np.float32]
    sources: NDArray[np.uint32]
    exploration: NDArray[np.float32]
    as_of_ms: int
    times: StageTimes
    picks: NDArray[np.int32]
    drops: NDArray[np.uint8]
    tally: Tally
    candidates: Candidates | None = None
    selected: Slates | None = None
    popular: bool = False
    ranked_by: RankedBy | None = None
    """None: no ranker was asked."""
    wire: list[bytes] | None = None
    """The ``streams`` of each reply as wire bytes, where the device has written them already."""


@dataclass(frozen=True)
class ReplyState:
    """What every reply discloses about the state that answered it. quality: share of the candidates scored."""

    applied_offset: int
    model_version: str
    level: Level
    reasons: tuple[str, ...]
    score_age_ms: int
    quality: float = 1.0
