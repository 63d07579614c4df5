"""The ranker's part of a batch: what it is asked about each candidate, and what its answer adds to the utility.

    utility = stream-level utility (kernels/blend.py)
            + click_weight · P(click) + watch_weight · P(watch ≥ 30 s) + purchase_weight · P(purchase)
            − report_weight · P(report)

with the weights of the request's surface. It is asked about the ``ranker.candidates`` best by stream-level utility of
each request; to the others nothing is added. It is not asked for requests whose surface gives it no weight.

A model answers so many rows per second and no more, however they are packed. So a batch is only as large as what it can
answer well within its deadline (`RankerStage.most_viewers`); the rest waits its turn, and admission sees to it that not
too many wait: its quality factor takes from the candidates that are asked about.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kernels.ranker_rows import StreamRows, add_heads, best_of_rows, gather_streams
from server.live.accumulators import HostAccumulators
from server.live.table import LiveTable
from server.ranking.slates import Candidates, Heads, RankedBy
from server.retrieval.query import QueryBatch
from server.retrieval.streams import StreamState
from server.scoring.ranker import RankerCall, RankerCaller
from server.scoring.ranker_schema import CODES, NEUTRAL_POSITION, RankerInputs
from server.viewers.table import ViewerTable, codes_of, empty_histories

_OF_A_BATCH = 0.1
"""Weight of a batch in the mean of rows per viewer."""


@dataclass(frozen=True)
class Asked:
    """A call about rows int64[R] and columns int64[R] of the candidates, whose sessions then were uint32[B, K]."""

    call: RankerCall
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    sessions: NDArray[np.uint32]


class RankerStage:
    """Asks about a batch and takes the answer in. Called by the engine thread only.

    Args:
        candidates: of each request, at most so many are scored.
    """

    def __init__(self, caller: RankerCaller, table: LiveTable, streams: StreamState, candidates: int) -> None:
        assert isinstance(table.accumulators, HostAccumulators)
        self._caller, self._table, self._streams, self._most = caller, table, streams, candidates
        self._identity = table.accumulators.identity_version
        streams.keep_features()
        capacity = table.settings.capacity
        self._codes = np.zeros((capacity, len(CODES)), np.int64)
        self._codes_of = np.full(capacity, np.iinfo(np.uint32).max, np.uint32)
        self._per_viewer = float(candidates)  # rows asked about, of late

    def most_viewers(self) -> int:
        """Of a batch, so that its call is likely to be answered in time; at least 1. Any thread."""
        return max(1, int(self._caller.rows_in_time() / max(1.0, self._per_viewer)))

    def ask(self, batch: QueryBatch, candidates: Candidates, now_ms: int, quality: float = 1.0) -> Asked | None:
        """Starts one call about the batch; None when there is nothing to ask about.

        Args:
            quality: share of the candidates to ask about, see `Pipeline.rank`; never fewer than a slate has places.
        """
        rows, columns = self.chosen(batch, candidates, quality)
        self._per_viewer += _OF_A_BATCH * (len(rows) / len(batch) - self._per_viewer)
        if not len(rows):
            return None
        call = self._caller.start(self.inputs(batch, candidates.slots[rows, columns], rows, now_ms))
        return Asked(call, rows, columns, self._streams.session[candidates.slots])

    def answer(self, asked: Asked, batch: QueryBatch, candidates: Candidates) -> tuple[Candidates, RankedBy]:
        """The candidates with what the answer adds; unchanged, with the reason, when there is none in time.

        Events were applied since `ask`: a row that holds another session by now is no candidate any more.
        """
        heads, problem = self._caller.finish(asked.call)
        slots = candidates.slots
        gone = (slots >= 0) & (self._streams.session[slots] != asked.sessions)
        if gone.any():
            candidates = replace(candidates, slots=np.where(gone, np.int32(-1), slots))
        by = RankedBy("" if heads is None else heads.model_version, problem, int(np.count_nonzero(gone)))
        if heads is None:
            return candidates, by
        utility = add_heads(candidates.utility, asked.rows, asked.columns, heads.values, batch.head_weights)
        return replace(candidates, utility=utility, heads=Heads(asked.rows, asked.columns, heads.values)), by

    def chosen(
        self, batch: QueryBatch, candidates: Candidates, quality: float = 1.0
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows and columns of the candidates to ask about, row by row."""
        weighted: NDArray[np.bool_] = (batch.head_weights != 0).any(axis=1)
        most = min(self._most, max(int(batch.limits.max()), math.ceil(quality * self._most)))
        return best_of_rows(candidates.utility, candidates.slots, weighted, most)

    def inputs(self, batch: QueryBatch, slots: NDArray[np.int32], rows: NDArray[np.int64], now_ms: int) -> RankerInputs:
        """What the model is told of streams ``slots`` int32[R], each for the viewer in row ``rows`` int64[R]."""
        features, viewers = self._streams.kept, self._table.follower
        assert features is not None
        self._look_up_codes(slots)
        embedding = self._table.columns.embedding
        streams = gather_streams(slots, StreamRows(features.values, features.states, embedding, self._codes))
        histories = (
            viewers.histories(batch.viewer_hash, now_ms)
            if isinstance(viewers, ViewerTable)
            else empty_histories(*batch.queries.shape)
        )
        return RankerInputs(
            stream_features=streams.values,
            stream_missing=streams.missing,
            stream_embedding=streams.embedding,
            codes=streams.codes,
            position=np.full((len(slots), 1), NEUTRAL_POSITION, np.float32),
            viewer_of=rows,
            viewer_embedding=batch.queries,
            sequence_embedding=histories.embedding,
            sequence_meta=histories.meta,
        )

    def _look_up_codes(self, slots: NDArray[np.int32]) -> None:
        """Codes of these streams; once per change of a row's names."""
        changed = self._codes_of[slots] != self._identity[slots]
        if changed.any():
            stale = np.unique(slots[changed])
            self._codes[stale] = codes_of(self._table, stale)
            self._codes_of[stale] = self._identity[stale]
