"""What is derived about each row on a tick: rule bits, boosts, trend scores, exposures.

Not part of the log's state: it is computed again after a restart.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kernels.eligibility import RowColumns
from server.live.columns import Columns
from server.live.features import Features, FeatureSet
from server.live.table import LiveTable
from server.rules.bits import UNASSESSED, assess, boosts, built_in
from server.rules.rulebook import RuleBook


class StreamState:
    """Derived columns, C rows. Owned by the engine thread.

    rule_bits uint32[C]; boost float32[C]; trend float32[C] (NaN: not scored in this session); candidate_trend
    float32[C] (the same, by the model on trial); exposures uint32[C] (times served in this session); session
    uint32[C], changes whenever the row holds another session, so that late results can be told apart.
    """

    def __init__(self, table: LiveTable, features: FeatureSet, book: RuleBook) -> None:
        capacity = table.settings.capacity
        self._table, self._features, self.book = table, features, book
        self.rule_bits = np.full(capacity, UNASSESSED, np.uint32)
        self.boost = np.zeros(capacity, np.float32)
        self.trend = np.full(capacity, np.nan, np.float32)
        self.candidate_trend = np.full(capacity, np.nan, np.float32)
        self.exposures = np.zeros(capacity, np.uint32)
        self.session = np.zeros(capacity, np.uint32)
        self.kept: Features | None = None
        """Features of every row as they were last assessed, once `keep_features` was called."""
        self._session_epoch = np.full(capacity, -1, np.int64)
        self._session_generation = np.zeros(capacity, np.uint32)

    def keep_features(self) -> None:
        """From now on `assess` also keeps the features it computes; before any row is assessed."""
        shape = (self._table.settings.capacity, len(self._features))
        self.kept = Features(np.zeros(shape, np.float32), np.ones(shape, np.uint8))

    def set_book(self, book: RuleBook) -> None:
        """Takes other rules; every row must be assessed again before it is shown."""
        self.book = book
        self.rule_bits[:] = UNASSESSED
        self.boost[:] = 0.0

    def forget_changed_sessions(self, slots: NDArray[np.int32]) -> NDArray[np.int32]:
        """Resets rows whose session is not the one they were derived for; returns them. Call after every apply.

        A new session inherits nothing: not shown until assessed, no score, no exposures.
        """
        columns = self._table.columns
        changed = slots[
            (columns.epoch[slots] != self._session_epoch[slots])
            | (columns.generation[slots] != self._session_generation[slots])
        ]
        self.rule_bits[changed] = UNASSESSED
        self.boost[changed] = 0.0
        self.trend[changed] = np.nan
        self.candidate_trend[changed] = np.nan
        self.exposures[changed] = 0
        self.session[changed] += np.uint32(1)
        self._session_epoch[changed] = columns.epoch[changed]
        self._session_generation[changed] = columns.generation[changed]
        return changed

    def apply_moderation(self, slots: NDArray[np.int32], now_ms: int) -> None:
        """Takes over blocks and spam marks at once, without waiting for the tick."""
        unassessed = self.rule_bits[slots] & UNASSESSED
        mask = np.uint32((1 << 5) - 1)
        self.rule_bits[slots] = (
            (self.rule_bits[slots] & ~mask) | built_in(self._table.columns, slots, now_ms) | unassessed
        )

    def assess(self, slots: NDArray[np.int32], now_ms: int) -> Features:
        """Computes rule bits and boosts of rows int32[n]; returns the features they rest on."""
        columns: Columns = self._table.columns
        features = self._table.accumulators.features(self._features, slots, now_ms, self._table.landmark_ms)
        reported = self._features.reported(self._table.counters_seen)
        bits = assess(self.book, self._features.names, features.values, reported, self.rule_bits[slots])
        self.rule_bits[slots] = bits | built_in(columns, slots, now_ms)
        self.boost[slots] = boosts(self.book, bits)
        if self.kept is not None:
            self.kept.values[slots], self.kept.states[slots] = features.values, features.states
        return features

    def set_trend(self, slots: NDArray[np.int32], scores: NDArray[np.float32]) -> None:
        """Takes over finite scores float32[n] of rows int32[n]."""
        self.trend[slots] = scores

    def forget_trend(self) -> None:
        """No row has a score any more: those of two models must not stand side by side."""
        self.trend[:] = np.nan

    def row_columns(self) -> RowColumns:
        """What the eligibility predicate reads (the same memory)."""
        c = self._table.columns
        return RowColumns(c.state, c.lease_expires_ms, self.rule_bits, c.region, c.age_rating, c.language, c.category)
