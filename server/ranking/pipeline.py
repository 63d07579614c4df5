"""The way of a batch of requests: retrieve → merge → blend → select → verify. Columns all the way."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kernels.blend import blend
from kernels.eligibility import FilterColumns
from kernels.merge import Proposed, Seen, merge_candidates, merge_proposals
from kernels.slate import Slates, select_slates
from kernels.verify import verify_picks, verify_slates
from server.clock import Clock
from server.config import Settings
from server.live.table import LiveTable
from server.ranking.ranker import Asked, RankerStage
from server.ranking.slates import Candidates, SlateBatch, StageTimes
from server.ranking.tally import tally_of
from server.retrieval.base import SearchEngine
from server.retrieval.query import QueryBatch
from server.retrieval.sources import SOURCES, Batch, bit_of
from server.retrieval.streams import StreamState
from server.retrieval.view import JoinedViews, Snapshot, View

_LEAST_PER_PLACE = 2
"""Candidates per place of the slate and its reserve that are scored at any quality: caps and ends take some."""


@dataclass(frozen=True)
class Started:
    """A batch on its way: `finish` has its slates. quality: see `Pipeline.rank`."""

    batch: QueryBatch
    quality: float

    def wait_s(self) -> float:
        """Seconds for which `finish` would wait for something that comes meanwhile."""
        return 0.0


@dataclass(frozen=True)
class Gathered(Started):
    """A batch with its candidates. filters, and filter_of int32[B] into them, as its views have them.
    asked: what the ranker works on; None: there is none, or nothing to ask."""

    filters: FilterColumns
    filter_of: NDArray[np.int32]
    candidates: Candidates
    clock: _StageClock
    asked: Asked | None

    def wait_s(self) -> float:
        """See Started."""
        return 0.0 if self.asked is None else self.asked.call.wait_s()


class Pipeline:
    """Ranks batches against the table. Called by the engine thread only."""

    overlaps = False
    """Whether work goes on between `start` and `finish`, so that there is something to do meanwhile."""

    def __init__(
        self, settings: Settings, clock: Clock, table: LiveTable, streams: StreamState, search: SearchEngine
    ) -> None:
        self._settings, self._clock = settings, clock
        self._table, self._streams, self._search = table, streams, search
        self.ranker: RankerStage | None = None
        self._followed_bit, self._fresh_bit = bit_of("followed"), bit_of("fresh")
        self._seen = Seen(settings.table.capacity)
        self.snapshot = Snapshot(table, streams, settings.retrieval, 0, np.zeros(0, np.int32))

    def most_rows(self, allowed: int) -> int:
        """Viewers to rank together now, from 1 to ``allowed``: so many that the ranker is likely to answer in time."""
        return allowed if self.ranker is None else min(allowed, self.ranker.most_viewers())

    def rank(self, batch: QueryBatch, quality: float = 1.0) -> SlateBatch:
        """The whole way of B requests.

        Every stage either keeps or counts: kept + removed = offered, stage by stage.

        Args:
            quality: share of the candidates to score, in (0, 1]; enough to fill the slate are scored at any.
        """
        return Pipeline.finish(self, Pipeline.start(self, batch, quality))  # on the host, whatever a subclass does

    def start(self, batch: QueryBatch, quality: float = 1.0) -> Started:
        """Begins with a batch. At most two may be started and not finished, and they are finished in order."""
        clock = _StageClock()
        views = self.snapshot.joined(batch.filters, self._view)
        filter_of = views.rows_of(batch.filters, batch.filter_of)
        candidates = self._retrieve(batch, views, filter_of, quality)
        clock.stage("retrieve_us")
        utility, similarity = self._blend(batch, candidates[0], candidates[1])
        scored = Candidates(*candidates, utility, similarity)
        asked = None if self.ranker is None else self.ranker.ask(batch, scored, self._clock.now_ms(), quality)
        clock.stage("blend_us")
        return Gathered(batch, quality, views.filters, filter_of, scored, clock, asked)

    def finish(self, started: Started) -> SlateBatch:
        """The slates of a batch, checked against the table as it is now. Waits `Started.wait_s`."""
        assert isinstance(started, Gathered)
        batch, scored, clock = started.batch, started.candidates, started.clock
        filters, filter_of = started.filters, started.filter_of
        ranked_by = None
        if started.asked is not None:
            assert self.ranker is not None
            scored, ranked_by = self.ranker.answer(started.asked, batch, scored)
            clock.stage("score_us")
            # Names may have other numbers by now.
            filters, filter_of = self.snapshot.filter_columns(batch.filters), batch.filter_of
        selected = self._select(batch, scored)
        clock.stage("select_us")
        return replace(self._verify(batch, filters, filter_of, scored, selected, clock), ranked_by=ranked_by)

    def trace(self, batch: QueryBatch) -> SlateBatch:
        """Like `rank`, on the host, with every candidate kept: for Explain."""
        return Pipeline.rank(self, batch)

    def prepare(self) -> None:
        """Gets ready for the first request, where there is something to get ready."""

    def popular(self, batch: QueryBatch) -> SlateBatch:
        """The cached popular list, for requests with no time left to rank; verified all the same."""
        clock = _StageClock()
        filters = self.snapshot.filter_columns(batch.filters)
        b, slots = len(batch), self.snapshot.popular
        excluded = [
            batch.excluded[i:j] for i, j in zip(batch.excluded_offsets, batch.excluded_offsets[1:], strict=False)
        ]
        rows = [slots[~np.isin(slots, gone)] for gone in excluded]
        picks = np.full((b, max([1, *map(len, rows)])), -1, np.int32)
        for i, row in enumerate(rows):
            picks[i, : len(row)] = row
        n_picks = np.array([len(row) for row in rows], np.int32)
        now_ms = self._clock.now_ms()
        kept, counts, drops = self._last_check(batch, filters, picks, n_picks, now_ms)
        shown = np.take_along_axis(picks, np.maximum(kept, 0), axis=1)
        viewers = self.snapshot.viewers[np.maximum(shown, 0)]
        clock.stage("verify_us")
        width = max(1, int(counts.max(initial=0)))
        slots = np.ascontiguousarray(np.where(kept >= 0, shown, -1)[:, :width])
        sources, exploration = np.zeros((b, width), np.uint32), np.zeros((b, width), np.float32)
        return SlateBatch(
            batch=batch,
            slots=slots,
            counts=counts,
            scores=np.ascontiguousarray(viewers[:, :width]),
            sources=sources,
            exploration=exploration,
            as_of_ms=now_ms,
            times=clock.times(),
            picks=picks,
            drops=drops,
            tally=tally_of(slots, sources, exploration, picks, drops),
            popular=True,
        )

    # --- stages -------------------------------------------------------------------------------

    def _view(self, filters: FilterColumns, v: int) -> View:
        """The filter's view of this tick, row ``v`` of ``filters``."""
        eligible = self.snapshot.eligible(filters, v)
        found = [
            (source.view(self.snapshot, eligible), 1 << i)
            for i, source in enumerate(SOURCES)
            if source.view is not None
        ]
        slots = np.concatenate([slots for slots, _ in found])
        sources = np.concatenate([np.full(len(slots), bit, np.uint32) for slots, bit in found])
        order = np.argsort(np.concatenate([np.arange(len(s)) / max(1, len(s)) for s, _ in found]), kind="stable")
        # Merged here once, so that requests merge only what is theirs.
        merged, bits, counts, _ = merge_candidates(
            slots[order], sources[order], np.array([0, len(slots)]), np.zeros(0, np.int32),
            np.zeros(2, np.int64), self._table.rows,
        )  # fmt: skip
        return View(eligible, merged[0, : counts[0]], bits[0, : counts[0]])

    def _retrieve(
        self, batch: QueryBatch, views: JoinedViews, filter_of: NDArray[np.int32], quality: float
    ) -> tuple[NDArray[np.int32], NDArray[np.uint32], NDArray[np.int32], NDArray[np.int32]]:
        """Candidates of every request: its view's, then those of the query sources; merged, attributed."""
        work, view_limits = self._work(batch, views, filter_of, quality)
        found = [(source.query(work), 1 << i) for i, source in enumerate(SOURCES) if source.query is not None]
        offsets, first = np.empty((len(found), len(batch) + 1), np.int64), 0
        for row, (proposals, _) in zip(offsets, found, strict=True):
            np.add(proposals.offsets, first, out=row)
            first += len(proposals.slots)
        every = np.concatenate([proposals.slots for proposals, _ in found])
        proposed = Proposed(every, offsets, np.array([bit for _, bit in found], np.uint32))
        return merge_proposals(
            views.lists, filter_of, view_limits, proposed, batch.excluded, batch.excluded_offsets, self._seen
        )

    def _work(
        self, batch: QueryBatch, views: JoinedViews, filter_of: NDArray[np.int32], quality: float
    ) -> tuple[Batch, NDArray[np.int32]]:
        """What query sources work on, and int32[B]: how much of its view each request takes at this quality."""
        least = _LEAST_PER_PLACE * (batch.limits + self._settings.rank.reserve) + np.diff(batch.excluded_offsets)
        lengths = np.diff(views.lists.starts)[filter_of]
        limits = lengths if quality >= 1.0 else np.minimum(lengths, np.maximum(least, np.ceil(quality * lengths)))
        work = Batch(batch, self.snapshot, views.eligible, filter_of, self._search, quality, int(least.max()))
        return work, limits.astype(np.int32)

    def _blend(
        self, batch: QueryBatch, slots: NDArray[np.int32], sources: NDArray[np.uint32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        columns = self._table.columns
        return blend(
            slots, sources, batch.queries, self._streams.trend, self._streams.boost,
            columns.started_ms, columns.embedding, batch.weights,
            followed_bit=self._followed_bit, fresh_bit=self._fresh_bit,
            now_ms=self.snapshot.now_ms, fresh_age_ms=self._settings.retrieval.fresh_age_ms,
        )  # fmt: skip

    def _select(self, batch: QueryBatch, candidates: Candidates) -> Slates:
        columns = self._table.columns
        return select_slates(
            candidates.slots, candidates.utility, (candidates.sources & np.uint32(self._fresh_bit)) != 0,
            columns.creator, columns.category, columns.embedding, columns.ids,
            batch.limits, batch.explore_slots, batch.seeds,
            batch.creator_caps, batch.category_caps, batch.diversity, self._settings.rank.reserve,
        )  # fmt: skip

    def _verify(
        self,
        batch: QueryBatch,
        filters: FilterColumns,
        filter_of: NDArray[np.int32],
        candidates: Candidates,
        selected: Slates,
        clock: _StageClock,
    ) -> SlateBatch:
        """The last check, against the newest columns and the time now; gaps close from the reserve."""
        now_ms = self._clock.now_ms()
        shown = verify_slates(
            selected.picks, selected.n_slate, selected.n_reserve, selected.exploration,
            candidates.slots, candidates.utility, candidates.sources, batch.limits, filter_of,
            self._streams.row_columns(), filters, self._streams.book.exclude_bits, now_ms,
        )  # fmt: skip
        clock.stage("verify_us")
        return SlateBatch(
            batch=batch,
            slots=shown.slots,
            counts=shown.counts,
            scores=shown.scores,
            sources=shown.sources,
            exploration=shown.exploration,
            as_of_ms=now_ms,
            times=clock.times(),
            picks=shown.pick_slots,
            drops=shown.drops,
            tally=tally_of(
                shown.slots, shown.sources, shown.exploration, shown.pick_slots, shown.drops, candidates, selected
            ),
            candidates=candidates,
            selected=selected,
        )

    def _last_check(
        self,
        batch: QueryBatch,
        filters: FilterColumns,
        picks: NDArray[np.int32],
        n_picks: NDArray[np.int32],
        now_ms: int,
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.uint8]]:
        return verify_picks(
            picks, n_picks, batch.limits, batch.filter_of, self._streams.row_columns(), filters,
            self._streams.book.exclude_bits, now_ms,
        )  # fmt: skip


class _StageClock:
    """Wall time between stages."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._us: dict[str, int] = {}

    def stage(self, name: str) -> None:
        now = time.perf_counter()
        self._us[name] = int((now - self._last) * 1e6)
        self._last = now

    def times(self) -> StageTimes:
        return StageTimes(**self._us)
