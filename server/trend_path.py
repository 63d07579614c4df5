"""The trendiness model under the control plane: a stream-level model, asked about the whole table each second.

A candidate scores the same rows as the version in use, right after it and in a thread of its own, so that a candidate
that hangs or fails delays nobody. Its scores go into a column of their own (server/ranking/candidate.py).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.engine import Engine
from server.errors import BadScores, Draining, Refused, ScoringError
from server.ranking.candidate import Seen
from server.rollout.agreement import compare
from server.rollout.base import Contract, Rows
from server.rollout.guard import Trial, Viewers
from server.rollout.samples import SampleRing
from server.scoring.formula import trend_formula
from server.scoring.ladder import Level
from server.scoring.model_config import INPUT, OUTPUT
from server.scoring.order import rank_rows
from server.scoring.refresh import Answer, Refresher, RefreshJob, RefreshResult, score_rows
from server.scoring.shared import SharedScorer
from server.scoring.versions import Versions

logger = logging.getLogger(__name__)

WARM_CALLS, WARM_DEADLINE_S = 5, 20.0
FLIP_WITHIN_S = 5.0
RESTORE_WITHIN_S = 0.5
"""For the version that comes back to score the table; beyond, the formula does until it has."""


class _Shadow:
    """A candidate on ``trial``. percent: of the refreshes that it scores. due: share of a refresh saved up."""

    def __init__(self, version: int, label: str, scorer: SharedScorer, percent: float, trial: Trial) -> None:
        self.version, self.label, self.scorer, self.percent, self.trial = version, label, scorer, percent, trial
        self.due = 0.0


class TrendPath:
    """See ServingPath.

    Args:
        serving: what the refresher asks; this object closes it, and every scorer it opens. version: its, 0: the newest.
        open_version: opens a version on trial; connects or loads on its first call.
    """

    def __init__(
        self,
        engine: Engine,
        refresher: Refresher,
        model: str,
        serving: SharedScorer,
        version: int,
        open_version: Callable[[int], SharedScorer],
        versions: Versions,
    ) -> None:
        n_features = len(engine.features)
        self.model, self.versions = model, versions
        self.contract = Contract(engine.features.schema, {INPUT: (n_features,)}, {OUTPUT: ()})
        self.trial = Trial()
        self._engine, self._answerer = engine, engine.answerer
        self._refresher, self._open_version = refresher, open_version
        self._serving, self._pinned = serving, version
        self._opened: dict[int, SharedScorer] = {}  # warm, or served before
        self._ring = SampleRing(n_features)
        self._last_job: RefreshJob | None = None
        self._wake = threading.Condition()
        self._shadow: _Shadow | None = None
        self._work_left: tuple[_Shadow, RefreshJob, NDArray[np.float32], float] | None = None
        self._to_close: list[SharedScorer] = []
        self._closing = False
        refresher.listener = self._scored
        self._worker = threading.Thread(target=self._work, name="score-candidate", daemon=True)
        self._worker.start()

    # --- ServingPath --------------------------------------------------------------------------

    def answering(self) -> int:
        """See ServingPath."""
        name, _, version = self._answerer.scores.model_version.partition("/")
        return int(version) if name == self.model and version.isdecimal() else 0

    def samples(self) -> Rows:
        """See ServingPath."""
        return {INPUT: self._ring.rows()}

    def pin(self, version: int) -> None:
        """See ServingPath."""
        self._serving.pin(version)
        self._pinned = version

    def warm(self, version: int) -> NDArray[np.float32]:
        """See ServingPath."""
        scorer = self._opened.get(version) or self._open_version(version)
        rows = self._ring.rows()
        try:
            for _ in range(WARM_CALLS):
                answer = self._named(scorer, version, rows, WARM_DEADLINE_S)
                if answer.rows_bad:
                    raise BadScores(f"{answer.version} gave no probability for {answer.rows_bad} of {len(rows)} rows")
        except ScoringError:
            self._let_go(scorer)
            self._opened.pop(version, None)
            raise
        self._opened[version] = scorer
        return answer.scores

    def forget(self, version: int) -> None:
        """See ServingPath."""
        scorer = self._opened.pop(version, None)
        if scorer is not None:
            self._let_go(scorer)

    def begin(self, version: int, percent: float) -> None:
        """See ServingPath."""
        label = self._label(version)
        self.trial = trial = Trial()
        self._on_engine(lambda: self._answerer.try_candidate(label))
        with self._wake:
            self._shadow = _Shadow(version, label, self._opened[version], percent, trial)

    def share(self, scored_percent: float, served_percent: float) -> None:
        """See ServingPath."""
        with self._wake:
            if self._shadow is not None:
                self._shadow.percent = scored_percent

        def set_share() -> None:
            self._answerer.candidate.share = served_percent / 100.0

        self._on_engine(set_share)

    def end(self) -> None:
        """See ServingPath."""
        with self._wake:
            self._shadow = None
        self._on_engine(lambda: self._answerer.try_candidate(""))

    def promote(self, version: int) -> None:
        """See ServingPath."""
        scorer, label = self._opened[version], self._label(version)
        fresh: RefreshResult | None = None
        if self._answerer.candidate.version != label or self._answerer.candidate.result is None:
            fresh = self._score_last_job(scorer, version, self._refresher.deadline_s)

        def flip() -> None:
            lane = self._answerer.candidate
            result = lane.result if lane.version == label and lane.result is not None else fresh
            if result is None or result.level is not Level.NONE:
                raise Refused(f"{label} has not scored the table: {'; '.join(result.reasons) if result else 'no row'}")
            self._take_over(scorer, label, result)

        self._on_engine(flip)
        self._now_serves(scorer, version)

    def restore(self, version: int) -> None:
        """See ServingPath."""
        label = self._label(version)
        scorer = self._opened.get(version)
        if scorer is None:
            scorer = self._opened[version] = self._open_version(version)
        try:
            result = self._score_last_job(scorer, version, RESTORE_WITHIN_S)
        except ScoringError as error:
            logger.error("%s comes back without scores, which the formula gives meanwhile: %s", label, error)
            result = self._by_formula(f"rolled back to {label}: {error}")
        restored = scorer
        self._on_engine(lambda: self._take_over(restored, label, result))
        self._now_serves(scorer, version)

    def viewers(self) -> tuple[Viewers, Viewers, int, int]:
        """See ServingPath."""
        lane = self._answerer.candidate
        ours, theirs = (_viewers(seen) for seen in lane.seen)
        return ours, theirs, lane.faults, lane.served

    def is_troubled(self) -> bool:
        """See ServingPath."""
        return self._refresher.level is not Level.NONE or self.trial.failures_in_a_row > 0

    def close(self) -> None:
        """Ends the thread and closes every scorer; after the refresher was closed."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._worker.join(5.0)
        for scorer in {id(s): s for s in (*self._opened.values(), *self._to_close, self._serving)}.values():
            scorer.close()

    @property
    def transport(self) -> str:
        """How tensors travel to the version that serves."""
        return self._serving.transport

    # --- the flip -----------------------------------------------------------------------------

    def _take_over(self, scorer: SharedScorer, label: str, result: RefreshResult) -> None:
        """Engine thread: from here on this model's scores, this model's refreshes and its name, all at once."""
        good_ms = result.as_of_ms if result.level is Level.NONE else None
        self._answerer.replace_scores(result, self._refresher.use(scorer, label, good_ms))

    def _now_serves(self, scorer: SharedScorer, version: int) -> None:
        with self._wake:
            self._shadow = None
        self._opened[self._pinned] = self._serving  # so that it can come back at once
        self._serving, self._pinned = scorer, version
        scorer.serve()

    def _score_last_job(self, scorer: SharedScorer, version: int, deadline_s: float) -> RefreshResult:
        job = self._last_job
        if job is None:
            return self._by_formula("the table was not scored yet")
        answer = self._named(scorer, version, job.features, deadline_s)
        return _result(job, answer)

    def _by_formula(self, reason: str) -> RefreshResult:
        job = self._last_job
        if job is None:
            none = np.zeros(0, np.int32), np.zeros(0, np.uint32)
            return RefreshResult(*none, None, None, Level.FORMULA, (reason,), "", self._engine.clock.now_ms(), 0)
        scores = trend_formula(job.features, self._engine.features.names)
        order = rank_rows(scores, job.slots, job.ids)
        return RefreshResult(job.slots, job.sessions, scores, order, Level.FORMULA, (reason,), "", job.as_of_ms, 0)

    # --- the candidate's thread ---------------------------------------------------------------

    def _scored(self, job: RefreshJob, result: RefreshResult, seconds: float) -> None:
        """The version in use is done with these rows (refresh thread): they may be the candidate's next."""
        if job.ids is None:
            return  # the row that an empty table sends belongs to nobody
        self._last_job = job
        if result.level is not Level.NONE or result.scores is None:
            return
        self._ring.offer(job.features)
        with self._wake:
            shadow = self._shadow
            if shadow is None or self._work_left is not None:
                return  # one at a time: a slow candidate skips refreshes, and is measured as slow
            shadow.due += shadow.percent / 100.0
            if shadow.due >= 1.0 - 1e-9:
                shadow.due -= 1.0
                self._work_left = (shadow, job, result.scores, seconds)
                self._wake.notify()

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._work_left is not None or self._to_close or self._closing)
                left, to_close, self._to_close = self._work_left, self._to_close, []
                if self._closing:
                    self._to_close = to_close
                    return
            for scorer in to_close:
                scorer.close()
            if left is not None:
                try:
                    self._try(*left)
                except Draining:
                    logger.debug("the engine stopped before it took a candidate's scores")
                except Exception as error:  # a foreign model's: it must not end the thread, but its own trial
                    logger.exception("unexpected error while a candidate scored")
                    left[0].trial.failed(f"{type(error).__name__}: {error}")
                with self._wake:
                    self._work_left = None

    def _try(self, shadow: _Shadow, job: RefreshJob, serving: NDArray[np.float32], serving_s: float) -> None:
        trial, lane = shadow.trial, self._answerer.candidate
        began_s = time.monotonic()
        try:
            answer = self._named(shadow.scorer, shadow.version, job.features, self._refresher.deadline_s)
        except ScoringError as error:
            told = f"{type(error).__name__}: {error}"
            if shadow is self._shadow:
                trial.failed(told)
                self._on_engine(lambda: lane.failing(shadow.label, told))
            return
        seconds = time.monotonic() - began_s
        result, agreement = _result(job, answer), compare(serving, answer.scores)
        self._on_engine(lambda: lane.take(result))
        if shadow is self._shadow:
            trial.scored(agreement, serving_s, seconds)

    def _named(self, scorer: SharedScorer, version: int, rows: NDArray[np.float32], deadline_s: float) -> Answer:
        """Scores, and makes sure who gave them. Raises ScoringError."""
        answer = score_rows(scorer, rows, deadline_s)
        if answer.version != self._label(version):
            raise BadScores(f"{self._label(version)} was asked, {answer.version} answered")
        return answer

    # --- small things -------------------------------------------------------------------------

    def _label(self, version: int) -> str:
        return f"{self.model}/{version}"

    def _let_go(self, scorer: SharedScorer) -> None:
        """Closed in the worker: whoever rolls back does not wait for a call in progress."""
        with self._wake:
            self._to_close.append(scorer)
            self._wake.notify()

    def _on_engine(self, step: Callable[[], Any]) -> None:
        """Runs between two batches. Raises what ``step`` raises, and Draining."""
        done: Future[Any] = self._engine.call(step)
        done.result(FLIP_WITHIN_S)


def _result(job: RefreshJob, answer: Answer) -> RefreshResult:
    order = rank_rows(answer.scores, job.slots, job.ids)
    return RefreshResult(
        job.slots, job.sessions, answer.scores, order, Level.NONE, (), answer.version, job.as_of_ms, answer.rows_bad
    )


def _viewers(seen: Seen) -> Viewers:
    return Viewers(seen.impressions, seen.dead, seen.ours)
