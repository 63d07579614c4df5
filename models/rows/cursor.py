"""The live table as of one record of the log; the only place where features of dataset rows are read.

A `Reading` says itself which state it was read from: the offset is the cursor's own, not one that a caller gives.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from server.config import TableSettings, ViewerSettings
from server.live import state as live_state
from server.live.features import FeatureSet
from server.live.table import Applied, LiveTable
from server.log.commit import Committed
from server.log.snapshot import Contents
from server.viewers.table import Histories, ViewerTable


@dataclass(frozen=True)
class Reading:
    """n rows as the table had them after record ``offset``, as of ``at_ms``.

    features float32[n, F], states uint8[n, F], embedding float32[n, D], attributes: name → n texts.
    """

    offset: int
    at_ms: int
    features: NDArray[np.float32]
    states: NDArray[np.uint8]
    embedding: NDArray[np.float32]
    attributes: dict[str, list[str]]


class Cursor:
    """Applies records one after the other, as recovery does: without ticks, which change no feature.

    Args:
        start: a snapshot to begin after, where the log does not reach back to its first record.
        viewers: what is remembered of viewers; None: nothing.
    """

    def __init__(
        self,
        settings: TableSettings,
        features: FeatureSet,
        start: Contents | None = None,
        viewers: ViewerSettings | None = None,
    ) -> None:
        self.viewers = ViewerTable(viewers, settings.embedding_dim) if viewers and viewers.capacity else None
        embedding = np.zeros((settings.capacity, settings.embedding_dim), np.float32)
        self.table = LiveTable(settings, embedding, follower=self.viewers)
        self.offset = self.stamp_ms = 0
        self._features = features
        if start is not None:
            live_state.restore(self.table, start.state)
            self.offset, self.stamp_ms = start.manifest.offset, start.manifest.stamp_ms

    def apply(self, committed: Committed) -> Applied | None:
        """The next record; None when nobody can decode it."""
        applied = None
        if committed.batch is not None:
            applied = self.table.apply(committed.batch.events, committed.record.applied_ms)
        self.offset, self.stamp_ms = committed.record.offset, committed.record.applied_ms
        return applied

    def lookup(
        self, ids: NDArray[np.uint8], lengths: NDArray[np.uint8], epochs: NDArray[np.int64]
    ) -> NDArray[np.int32]:
        """int32[n] rows of these sessions; -1 where the table does not hold just that session."""
        slots = self.table.map.lookup(ids, lengths)
        known = slots >= 0
        known[known] = self.table.columns.epoch[slots[known]] == epochs[known]
        return np.where(known, slots, -1).astype(np.int32)

    def read(self, slots: NDArray[np.int32], at_ms: int) -> Reading:
        """Features, embeddings and attributes of used rows int32[n], as of ``at_ms``."""
        table, columns = self.table, self.table.columns
        found = self._features.compute(columns, slots, at_ms, table.landmark_ms)
        attributes = {
            name: [interner.names[number] for number in column[slots].tolist()]
            for name, column, interner in (
                ("creator", columns.creator, table.creators),
                ("category", columns.category, table.categories),
                ("language", columns.language, table.languages),
            )
        }
        return Reading(self.offset, at_ms, found.values, found.states, columns.embedding[slots], attributes)

    def histories(self, viewer_hash: NDArray[np.uint64], at_ms: int) -> Histories | None:
        """What viewers uint64[n] (0: nobody) did lately, as the server would tell a ranker; None: not remembered."""
        return None if self.viewers is None else self.viewers.histories(viewer_hash, at_ms)
