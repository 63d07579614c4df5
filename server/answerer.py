"""The life of a batch, from the queue's turn to the replies in their callers' hands.

turn ─▶ start ──▶ on its way ─▶ finish ──▶ encode ─▶ hand out
        gather,   (a device or  select,    count     replies, then
        split     model works)  verify               whoever logs them
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kernels.exposures import count_exposures
from server.admission.gate import Admission
from server.applier import Applier
from server.batching.base import Turn, Waiting, hand_out
from server.batching.queue import RankQueue
from server.clock import Clock
from server.errors import LiverankError, OffsetNotReached
from server.live.table import LiveTable
from server.ranking.candidate import Candidate
from server.ranking.pipeline import Pipeline, Started
from server.ranking.slates import RankedBy, ReplyState, SlateBatch
from server.recorder import Recorder
from server.retrieval.query import QueryBatch, RankQuery, build_batch
from server.retrieval.streams import StreamState
from server.scoring.ladder import Level
from server.scoring.refresh import RefreshResult

logger = logging.getLogger(__name__)

Encoder = Callable[[SlateBatch, ReplyState, LiveTable, float], Sequence[bytes]]
"""Turns a ranked batch into one serialised RankResponse per request; the float is when it began, monotonic."""
_BATCH_WEIGHT = 0.13
"""Of a batch in the mean of their times, a half-life of about 5: it follows load and ignores one slow batch."""


@dataclass(frozen=True)
class OnItsWay:
    """A batch between start and finish, and who waits for it.

    started: the viewers ranked by the model in use, None for nobody. by_candidate: bool[B], the other ones.
    """

    items: list[Waiting[RankQuery]]
    started: Started | None
    began_s: float
    quality: float
    by_candidate: NDArray[np.bool_] | None

    def wait_s(self) -> float:
        """Seconds for which finishing it would wait for something that comes meanwhile."""
        return 0.0 if self.started is None else self.started.wait_s()


class Answerer:
    """Answers what the queue's turns took, and decides whose scores rank it. Engine thread only.

    Everything in a turn is resolved once, by its replies or by an error, at the latest by the next `answer` or
    `settle`; a fault costs the calls of its batch and nobody else. A reply has one version's scores: they are
    replaced only between batches.

    on_its_way: a batch that was started and waits for a device or model. scores: those in use.

    Args:
        applier: knows how far the table is. queue: whether more waits; nothing is taken from it here.
        admission: told how long requests took; gives the quality factor.
    """

    def __init__(
        self,
        clock: Clock,
        table: LiveTable,
        streams: StreamState,
        pipeline: Pipeline,
        candidate: Candidate,
        applier: Applier,
        queue: RankQueue[RankQuery],
        admission: Admission,
        encode: Encoder,
        recorder: Recorder,
        min_budget_s: float,
    ) -> None:
        self._clock, self._table, self._streams, self._pipeline = clock, table, streams, pipeline
        self._applier, self._queue, self._admission = applier, queue, admission
        self._encode, self._recorder, self._min_budget_s = encode, recorder, min_budget_s
        self.candidate = candidate
        self.scores = RefreshResult(
            np.zeros(0, np.int32), np.zeros(0, np.uint32), None, None, Level.FORMULA,
            ("no scores yet",), "", clock.now_ms(), 0,
        )  # fmt: skip
        self.first_scores = threading.Event()
        self._scorer_turn = 0  # which of the refresher's scorers is listened to
        self.on_its_way: OnItsWay | None = None
        self.on_served: Callable[[SlateBatch, ReplyState], None] | None = None
        """Told of each batch after it was answered, before anything else is applied. Set before the engine starts."""
        self._served: list[tuple[SlateBatch, ReplyState]] = []  # to be told once they are handed out
        self._batch_s = 0.0

    # --- a batch ------------------------------------------------------------------------------

    def budget_s(self) -> float:
        """Time that ranking a batch takes."""
        return max(self._batch_s, self._min_budget_s)

    def answer(self, turn: Turn[RankQuery], closing: bool) -> None:
        """Answers what was taken. Where the pipeline overlaps, a batch is finished after the next was started.

        Args:
            closing: nothing more comes, so a batch is finished even if that means to wait for it.
        """
        if turn.abandoned_rows:
            self._recorder.abandoned(turn.abandoned_rows)
        for item in turn.unreached:
            problem = f"min_offset: {item.min_offset} wanted, {self._applier.offset} applied"
            item.done.set_exception(OffsetNotReached(problem))
        before, self.on_its_way = self.on_its_way, self._start(turn.rank)
        if before is not None:
            self._finish(before)
        if self.on_its_way is not None and not (
            (self._pipeline.overlaps and self._queue.rows) or (self.on_its_way.wait_s() and not closing)
        ):
            last, self.on_its_way = self.on_its_way, None
            self._finish(last)
        if turn.late:
            with self._guarded(turn.late):
                batch, began_s = self._batch_of(_queries_of(turn.late)), time.monotonic()
                replies = self._encoded(self._pipeline.popular(batch), self.reply_state(popular=True), began_s)
                self._hand_out(turn.late, replies, began_s)

    def settle(self) -> None:
        """Answers what was started: with other scores than it began with, it would tell the wrong version."""
        before, self.on_its_way = self.on_its_way, None
        if before is not None:
            self._finish(before)

    def _start(self, items: list[Waiting[RankQuery]]) -> OnItsWay | None:
        if not items:
            return None
        with self._guarded(items):
            queries, quality = _queries_of(items), self._admission.quality
            split = self.candidate.split(queries)
            usual = queries if split is None else [q for q, theirs in zip(queries, split, strict=True) if not theirs]
            began_s = time.monotonic()
            started = self._pipeline.start(self._batch_of(usual), quality) if usual else None
            return OnItsWay(items, started, began_s, quality, split)
        return None

    def _finish(self, on_its_way: OnItsWay) -> None:
        items, began_s = on_its_way.items, on_its_way.began_s
        with self._guarded(items):
            replies: Sequence[bytes] = []
            if on_its_way.started is not None:
                slates = self._pipeline.finish(on_its_way.started)
                state = self.reply_state(quality=on_its_way.quality, by=slates.ranked_by)
                replies = self._encoded(slates, state, began_s)
            if on_its_way.by_candidate is not None:
                replies = self._with_candidate(on_its_way, on_its_way.by_candidate, replies)
            self._hand_out(items, replies, began_s)
            self._admission.answered(items, began_s)
        self._batch_s += _BATCH_WEIGHT * (min(time.monotonic() - began_s, 0.1) - self._batch_s)

    def _with_candidate(
        self, on_its_way: OnItsWay, by_candidate: NDArray[np.bool_], usual: Sequence[bytes]
    ) -> list[bytes]:
        """All replies in order: ``usual``, and between them those of the viewers ranked by the candidate.

        A fault in its ranking costs nobody a reply: the version in use answers, and the fault is held against it.
        """
        queries = _queries_of(on_its_way.items)
        batch = self._batch_of([q for q, mine in zip(queries, by_candidate, strict=True) if mine])
        began_s = on_its_way.began_s
        try:
            with self.candidate.ranking():
                slates = Pipeline.rank(self._pipeline, batch, on_its_way.quality)
            usual_state = self.reply_state(quality=on_its_way.quality, by=slates.ranked_by)
            state = self.candidate.reply_state(usual_state, self._clock.now_ms())
        except Exception:
            logger.exception("unexpected fault while ranking by %s", self.candidate.version)
            self._recorder.fault("candidate")
            self.candidate.faults += 1
            slates = self._pipeline.rank(batch, on_its_way.quality)
            state = self.reply_state(quality=on_its_way.quality, by=slates.ranked_by)
        else:
            self.candidate.served += len(batch)
            self._recorder.ranked_by_candidate(len(batch))
            if self._pipeline.overlaps:
                self._recorder.ranked_on_host("canary", len(batch))
        ours, theirs = iter(usual), iter(self._encoded(slates, state, began_s))
        return [next(theirs if mine else ours) for mine in by_candidate]

    def _batch_of(self, queries: list[RankQuery]) -> QueryBatch:
        return build_batch(queries, self._table, self._streams.book, self._clock.now_ms())

    def _encoded(self, slates: SlateBatch, state: ReplyState, began_s: float) -> Sequence[bytes]:
        """The replies, counted."""
        replies = self._encode(slates, state, self._table, began_s)
        count_exposures(self._streams.exposures, slates.slots)
        self._recorder.ranked(slates, state.level.name.lower(), began_s)
        if self.on_served is not None:
            self._served.append((slates, state))
        return replies

    def _hand_out(self, items: list[Waiting[RankQuery]], replies: Sequence[bytes], began_s: float) -> None:
        self._recorder.waited(items, began_s)
        hand_out(items, replies)
        served, self._served = self._served, []
        for slates, state in served:  # after the callers were answered: it reads features
            assert self.on_served is not None
            self.on_served(slates, state)

    @contextmanager
    def _guarded(self, items: list[Waiting[RankQuery]]) -> Iterator[None]:
        """A fault is the answer to these calls, and to no other."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, LiverankError):
                logger.exception("unexpected fault while ranking")
                self._recorder.fault("rank")
            for item in items:
                if not item.done.done():
                    item.done.set_exception(error)

    def reply_state(self, popular: bool = False, quality: float = 1.0, by: RankedBy | None = None) -> ReplyState:
        """What replies disclose now. ``by``: the ranker's part of a batch."""
        scores = self.scores
        age_ms = max(0, self._clock.now_ms() - scores.as_of_ms)
        if popular:
            reasons = ("deadline: no time left to rank", *scores.reasons)
            return ReplyState(self._applier.offset, "popular", Level.POPULAR, reasons, 0)
        version, level, reasons = scores.model_version or "formula", scores.level, scores.reasons
        if by is not None and by.problem:
            level, reasons = max(level, Level.LAST_GOOD), (*reasons, f"ranker: {by.problem}")
        elif by is not None:
            version = f"{version}+{by.version}"
        return ReplyState(self._applier.offset, version, level, reasons, age_ms, quality)

    # --- whose scores -------------------------------------------------------------------------

    def take_scores(self, result: RefreshResult) -> None:
        """Writes new scores to the rows that still hold the session that was scored."""
        if result.turn != self._scorer_turn:
            return  # of a model that was replaced meanwhile
        if result.model_version != self.scores.model_version:
            self.settle()
            if result.scores is not None:
                self._streams.forget_trend()  # a row that got no new score must not keep the other version's
        self.scores = result
        self.first_scores.set()
        self._recorder.scored(result)
        if result.scores is None or result.order is None:
            return
        slots = result.slots
        same = (self._streams.session[slots] == result.sessions) & np.isfinite(result.scores)
        self._streams.set_trend(slots[same], result.scores[same])
        self._pipeline.snapshot.rescored(result.order)

    def replace_scores(self, result: RefreshResult, turn: int) -> None:
        """Ranks everybody by these scores from the next batch on, in one step.

        Args:
            turn: of the scorer that made them (`Refresher.use`); results of others that are on their way are dropped.
        """
        self.settle()
        self.candidate.begin("")
        self._scorer_turn = turn
        self.take_scores(replace(result, turn=turn))

    def try_candidate(self, version: str) -> None:
        """Begins with a version on trial, "" ends it."""
        self.settle()
        self.candidate.begin(version)

    @contextmanager
    def ranked_for(self, query: RankQuery) -> Iterator[None]:
        """Inside, the host's pipeline ranks by the version that this viewer is ranked by."""
        if self.candidate.split([query]) is None:
            yield
        else:
            with self.candidate.ranking():
                yield


def _queries_of(items: list[Waiting[RankQuery]]) -> list[RankQuery]:
    return [query for item in items for query in item.rows]
