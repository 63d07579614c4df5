"""An approximate index behind a recall gate, as a search engine.

The index proposes from a copy of the rows as of its build. What changed since then is not in it, so every changed row
is a candidate of every query beside the proposals; all candidates are filtered by the mask and scored canonically
from the live rows. A deleted, forbidden or rewritten stream is therefore as impossible as with the exact engine; the
one thing that can go wrong is a good row that the index does not propose. `server.retrieval.recall` watches that.

Indexes are built in a thread of their own that reads the live rows while they change. A row written during a build
counts as changed since, so it does not matter what the builder read of it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kernels.topk import rescore_topk
from server.retrieval.base import Hits, SearchEngine
from server.retrieval.recall import Mode, RecallGate, recall_of
from server.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)


class ApproximateIndex(Protocol):
    """An index over rows as they once were. Used by one thread at a time."""

    def search(self, queries: NDArray[np.float32], k: int) -> NDArray[np.int32]:
        """int32[B, k]: about the k best rows per query float32[B, D], distinct, -1 padded, in any order."""
        ...


BuildIndex = Callable[[NDArray[np.float32]], ApproximateIndex]
"""Builds over rows float32[N, D], which may change meanwhile. Called in a thread of its own."""


@dataclass(frozen=True)
class GatePolicy:
    """overfetch: candidates asked for per place. rebuild_ms: a new index this long after the last was begun.

    max_changed_rows: with more rows changed since the build the index is stale, and a new one is begun at once.
    """

    overfetch: int = 4
    rebuild_ms: int = 60_000
    max_changed_rows: int = 4_096


class GatedSearch:
    """The exact engine, or while the gate is open an approximate index over the same rows.

    Args:
        exact: owns the rows, answers whenever the gate is not open.
        build: makes an index.
        gate: when it may answer.
        now_s: monotonic seconds.

    Owned by one thread like every engine; only the builder's thread runs beside it, and shares nothing with it but
    the rows it reads. Mode, bound, transitions, builds and queries by way of answering are in the metrics.
    """

    def __init__(
        self,
        exact: SearchEngine,
        build: BuildIndex,
        gate: RecallGate,
        policy: GatePolicy,
        metrics: Metrics,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = f"{exact.name}+approximate"
        self.embeddings = exact.embeddings
        self._exact, self._build, self._gate, self._policy, self._now_s = exact, build, gate, policy, now_s
        self._metrics = metrics
        self._index: ApproximateIndex | None = None
        self._changed = np.zeros(len(self.embeddings), np.bool_)
        self._building: _Build | None = None
        self._begun_s = -float("inf")
        self._written_rows = 0
        self._short = 0
        self._disclose()

    @property
    def fallback_queries(self) -> int:
        """See :class:`SearchEngine`; includes queries for which the index found too little."""
        return self._exact.fallback_queries + self._short

    @property
    def mode(self) -> Mode:
        """Who answers now."""
        return self._gate.mode

    def write_rows(self, slots: NDArray[np.int32], rows: NDArray[np.float32]) -> None:
        """See :class:`SearchEngine`."""
        # Marked first: a builder that reads the row half written must find it among the changed.
        self._changed[slots] = True
        if self._building is not None:
            self._building.changed[slots] = True
        self._written_rows = max(self._written_rows, int(slots.max(initial=-1)) + 1)
        self._exact.write_rows(slots, rows)

    def search(
        self, queries: NDArray[np.float32], eligible: NDArray[np.bool_], mask_of: NDArray[np.int32], k: int
    ) -> Hits:
        """See :class:`SearchEngine`; exact while the gate is closed, above its recall while it is open."""
        self._tend_index()
        before = self._gate.mode
        batch = len(queries)
        if before is Mode.EXACT or self._index is None or batch == 0:
            self._count("exact", batch)
            return self._exact.search(queries, eligible, mask_of, k)
        picked = self._gate.pick(batch)
        if before is Mode.PROVING:
            hits = self._exact.search(queries, eligible, mask_of, k)
            self._count("exact", batch)
            if picked.any():
                tried, short = self._approximate(self._index, queries[picked], eligible, mask_of[picked], k)
                place = np.flatnonzero(picked)[~short]
                self._measure(_some(tried, ~short), _some(hits, place))
            return hits
        hits, short = self._approximate(self._index, queries, eligible, mask_of, k)
        again = picked | short
        if again.any():
            exact = self._exact.search(queries[again], eligible, mask_of[again], k)
            judged = picked & ~short  # a short one is answered exactly, whether measured or not
            self._measure(_some(hits, judged), _some(exact, judged[again]))
            hits.slots[again], hits.scores[again] = exact.slots, exact.scores
        self._short += int(short.sum())
        self._count("approximate", int((~again).sum()))
        self._count("measured", int((picked & ~short).sum()))
        self._count("short", int(short.sum()))
        return hits

    def _approximate(
        self,
        index: ApproximateIndex,
        queries: NDArray[np.float32],
        eligible: NDArray[np.bool_],
        mask_of: NDArray[np.int32],
        k: int,
    ) -> tuple[Hits, NDArray[np.bool_]]:
        """Hits, and bool[B]: fewer than k although there may be more."""
        rows = eligible.shape[1]
        proposed = index.search(queries, self._policy.overfetch * k)
        proposed = np.where(proposed < rows, proposed, -1)
        changed = np.flatnonzero(self._changed[:rows]).astype(np.int32)
        proposed = np.where((proposed >= 0) & ~self._changed[proposed], proposed, -1)
        candidates = np.concatenate([proposed, np.broadcast_to(changed, (len(queries), changed.size))], axis=1)
        allowed = (candidates >= 0) & eligible[mask_of[:, None], np.maximum(candidates, 0)] if rows else False
        candidates = np.where(allowed, candidates, -1).astype(np.int32)
        hits = Hits(*rescore_topk(queries, self.embeddings[:rows], candidates, k))
        available = eligible.sum(axis=1)[mask_of]
        return hits, (hits.slots >= 0).sum(axis=1) < np.minimum(k, available)

    def _measure(self, approximate: Hits, exact: Hits) -> None:
        before = self._gate.mode
        self._gate.measured(recall_of(approximate, exact))
        self._moved(before)

    def _tend_index(self) -> None:
        """Takes over an index that is ready, gives up one that is stale, begins the next when it is time."""
        before = self._gate.mode
        ready = self._building if self._building is not None and self._building.done.is_set() else None
        if ready is not None:
            self._building = None
            self._metrics.index_builds.labels("failed" if ready.index is None else "built").inc()
            if ready.index is not None:
                self._index, self._changed = ready.index, ready.changed
                self._gate.index_built()
        changed_rows = int(np.count_nonzero(self._changed))
        stale = self._index is not None and changed_rows > self._policy.max_changed_rows
        if stale:
            self._gate.index_stale()
            self._index = None
        due = self._now_s() - self._begun_s >= self._policy.rebuild_ms / 1000
        if self._building is None and self._written_rows and (due or stale):
            self._begun_s = self._now_s()
            self._building = _Build(self._build, self.embeddings[: self._written_rows], len(self.embeddings))
        self._metrics.index_changed_rows.set(changed_rows)
        self._moved(before)

    def _moved(self, before: Mode) -> None:
        """Logs and discloses what the gate has decided since it was in ``before``."""
        mode = self._gate.mode
        self._disclose()
        if mode is not before:
            level = logging.WARNING if before is Mode.APPROXIMATE else logging.INFO
            logger.log(level, "retrieval: %s → %s (recall bound %.4f)", before, mode, self._gate.bound)

    def _disclose(self) -> None:
        self._metrics.retrieval_approximate.set(self._gate.mode is Mode.APPROXIMATE)
        self._metrics.recall_lower_bound.set(self._gate.bound)
        for (mode, reason), count in self._gate.changes.items():
            self._metrics.recall_gate_changes.labels(mode, reason).inc(count)
        self._gate.changes.clear()

    def _count(self, way: str, queries: int) -> None:
        self._metrics.searched_queries.labels(way).inc(queries)


def _some(hits: Hits, which: NDArray[Any]) -> Hits:
    return Hits(hits.slots[which], hits.scores[which])


class _Build:
    """One index being built in a thread of its own. ``index`` is None until ``done``, and after a failure."""

    def __init__(self, build: BuildIndex, rows: NDArray[np.float32], capacity: int) -> None:
        self.changed = np.zeros(capacity, np.bool_)
        self.done = threading.Event()
        self.index: ApproximateIndex | None = None
        self._build, self._rows = build, rows
        threading.Thread(target=self._run, name="index-builder", daemon=True).start()

    def _run(self) -> None:
        started_s = time.monotonic()
        try:
            self.index = self._build(self._rows)
            logger.info("retrieval: index over %d rows in %.1f s", len(self._rows), time.monotonic() - started_s)
        except Exception:
            # Whatever a library raises, the exact engine goes on; the failure is counted and tried again later.
            logger.exception("retrieval: the index could not be built")
        finally:
            self.done.set()
