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

from server.live.accumulators import HostAccumulators
from server.live.table import LiveTable
from server.ranking.slates import Candidates, RankedBy
from server.retrieval.query import QueryBatch
from server.retrieval.streams import StreamState
from server.scoring.ranker import RankerCall, RankerCaller
from server.scoring.ranker_schema import CODES, HEADS, NEUTRAL_POSITION, RankerInputs, missing_of
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
        weights, values = batch.head_weights[asked.rows], heads.values
        value = np.zeros(len(values), np.float32)
        for head in range(len(HEADS)):  # in a fixed order, so that equal heads give equal sums
            value += weights[:, head] * values[:, head]
        utility = candidates.utility.copy()
        utility[asked.rows, asked.columns] += value
        told = np.full((*slots.shape, len(HEADS)), np.nan, np.float32)
        told[asked.rows, asked.columns] = values
        return replace(candidates, utility=utility, heads=told), by

    def chosen(
        self, batch: QueryBatch, candidates: Candidates, quality: float = 1.0
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows and columns of the candidates to ask about, row by row."""
        weighted: NDArray[np.bool_] = (batch.head_weights != 0).any(axis=1)
        wanted = (candidates.slots >= 0) & weighted[:, None]
        most = min(self._most, max(int(batch.limits.max()), math.ceil(quality * self._most)))
        if candidates.slots.shape[1] > most:
            utility = np.where(wanted & np.isfinite(candidates.utility), candidates.utility, -np.inf)
            best = np.argpartition(utility, -most, axis=1)[:, -most:]
            among = np.zeros(wanted.shape, np.bool_)
            np.put_along_axis(among, best, True, axis=1)
            wanted &= among
        rows, columns = np.nonzero(wanted)
        return rows, columns

    def inputs(self, batch: QueryBatch, slots: NDArray[np.int32], rows: NDArray[np.int64], now_ms: int) -> RankerInputs:
        """What the model is told of streams ``slots`` int32[R], each for the viewer in row ``rows`` int64[R]."""
        features, viewers = self._streams.kept, self._table.follower
        assert features is not None
        histories = (
            viewers.histories(batch.viewer_hash, now_ms)
            if isinstance(viewers, ViewerTable)
            else empty_histories(*batch.queries.shape)
        )
        return RankerInputs(
            stream_features=features.values[slots],
            stream_missing=missing_of(features.states[slots]),
            stream_embedding=self._table.columns.embedding[slots],
            codes=self._codes_for(slots),
            position=np.full((len(slots), 1), NEUTRAL_POSITION, np.float32),
            viewer_of=rows,
            viewer_embedding=batch.queries,
            sequence_embedding=histories.embedding,
            sequence_meta=histories.meta,
        )

    def _codes_for(self, slots: NDArray[np.int32]) -> NDArray[np.int64]:
        """int64[R, 3]; computed once per change of a row's names."""
        stale = np.unique(slots[self._codes_of[slots] != self._identity[slots]])
        if len(stale):
            self._codes[stale] = codes_of(self._table, stale)
            self._codes_of[stale] = self._identity[stale]
        return self._codes[slots]
