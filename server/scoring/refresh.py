"""The tick that scores the whole table: one worker thread between the engine and the model."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from server.clock import Clock
from server.config import ScoringSettings
from server.errors import (
    BadScores,
    SchemaMismatch,
    ScorerTimeout,
    ScorerUnavailable,
    ScoringError,
    SharedMemoryRefused,
)
from server.scoring.base import Scorer
from server.scoring.formula import formula_columns, trend_formula
from server.scoring.ladder import Ladder, Level
from server.scoring.order import rank_rows

log = logging.getLogger(__name__)

CHUNK_ROWS = 65_536
RANGE_TOLERANCE = 1e-3  # beyond [0, 1] by more than this is not a probability but a broken model

OUTCOMES: dict[type[ScoringError], str] = {
    ScorerTimeout: "timeout",
    ScorerUnavailable: "unavailable",
    BadScores: "bad_scores",
    SchemaMismatch: "schema_mismatch",
    SharedMemoryRefused: "no_shared_memory",
}

T = TypeVar("T")


@dataclass(frozen=True)
class RefreshJob:
    """Rows to score. The job owns its arrays: nobody changes them after ``submit``.

    slots int32[n], sessions uint32[n] (which session each row held; handed back as it is),
    features float32[n, F], ids 'S64'[n] or None (ties go by slot),
    as_of_ms: engine time of the features.
    """

    slots: NDArray[np.int32]
    sessions: NDArray[np.uint32]
    features: NDArray[np.float32]
    ids: NDArray[np.bytes_] | None
    as_of_ms: int


@dataclass(frozen=True)
class RefreshResult:
    """What the engine takes over.

    slots int32[n], sessions uint32[n]: as in the job.
    scores: float32[n] in [0, 1], or None: keep every last good score. A row that is NaN has no new score:
        keep that row's last good one. Rows that never had a score stay without one.
    order: int32[n], the slots by new score descending, rows without a new score last, ties by id ascending;
        None together with scores.
    level, reasons: where the scores come from, and why not from the model.
    model_version: such as "trendiness/1"; "" unless level is NONE or LAST_GOOD. Two versions, separated by
        a comma, if the model was replaced during the call.
    as_of_ms: the job's, or that of the last good scores when these are to be kept.
    model_rows_bad: rows of this call that the model answered with NaN, an infinity or no probability.
    """

    slots: NDArray[np.int32]
    sessions: NDArray[np.uint32]
    scores: NDArray[np.float32] | None
    order: NDArray[np.int32] | None
    level: Level
    reasons: tuple[str, ...]
    model_version: str
    as_of_ms: int
    model_rows_bad: int
    turn: int = 0
    """Which scorer was asked: counts `Refresher.use`."""


@dataclass(frozen=True)
class Answer:
    """scores: float32[n] in [0, 1], NaN where the model gave no probability: ``rows_bad`` rows. version: its label."""

    scores: NDArray[np.float32]
    version: str
    rows_bad: int


@dataclass
class _Asked:
    """The scorer in use, with what is remembered about it."""

    scorer: Scorer
    ladder: Ladder
    last_good_ms: int | None
    turn: int


Listener = Callable[[RefreshJob, RefreshResult, float], None]
"""(job, its result, seconds that the model took); called in the worker thread, returns at once."""


class Refresher:
    """Scores one job at a time in its own thread; falls down the ladder when the model fails.

    Args:
        scorer: the model; the caller closes it, after this object. `use` replaces it.
        settings: deadline_ms bounds all chunks of one job together; breaker and maximum score age.
        feature_names: the F names, for the formula.
        clock: decides breaker and score age; must be the clock of ``as_of_ms``.
        post: receives each result, in the worker thread.
        on_call: told each outcome ("ok", a value of OUTCOMES, "internal", or "skipped" while the breaker is
            open) and its seconds.

    Attributes:
        outcomes: Counter by outcome. rows_bad: sum of model_rows_bad. level: of the newest result.
        post_failures: results that ``post`` did not take.

    Raises:
        ConfigError: the formula's features are not in ``feature_names``.
    """

    def __init__(
        self,
        scorer: Scorer,
        settings: ScoringSettings,
        feature_names: Sequence[str],
        clock: Clock,
        post: Callable[[RefreshResult], None],
        on_call: Callable[[str, float], None] = lambda outcome, seconds: None,
    ) -> None:
        formula_columns(feature_names)  # fail at start, not when the model does
        self._settings = settings
        self._asked = _Asked(scorer, self._new_ladder(), None, 0)
        self._deadline_s = settings.deadline_ms / 1000
        self._feature_names = tuple(feature_names)
        self._clock = clock
        self._post = post
        self._on_call = on_call
        self.listener: Listener | None = None
        self.outcomes: Counter[str] = Counter()
        self.rows_bad = 0
        self.post_failures = 0
        self.level = Level.FORMULA
        self._wake = threading.Condition()
        self._job: RefreshJob | None = None  # set while a job waits or runs
        self._closing = False
        self._worker = threading.Thread(target=self._work, name="score-refresh", daemon=True)
        self._worker.start()

    @property
    def scorer(self) -> Scorer:
        """The model that is asked now."""
        return self._asked.scorer

    @property
    def deadline_s(self) -> float:
        """For all chunks of one job."""
        return self._deadline_s

    def use(self, scorer: Scorer, version: str = "", last_good_ms: int | None = None) -> int:
        """Asks another model from the next job on; returns its turn. Any thread.

        A job in progress ends with the model that it began with, and its result says so (``RefreshResult.turn``).

        Args:
            version, last_good_ms: of the scores that this model gave already, if it did.
        """
        ladder = self._new_ladder()
        if last_good_ms is not None:
            ladder.succeeded(self._clock.now_ms(), version)
        turn = self._asked.turn + 1
        self._asked = _Asked(scorer, ladder, last_good_ms, turn)
        return turn

    def _new_ladder(self) -> Ladder:
        s = self._settings
        return Ladder(s.breaker_failures, s.breaker_open_ms, s.max_score_age_ms)

    def submit(self, job: RefreshJob) -> bool:
        """Hands over a job. False, and nothing happens, while another is in progress or after close."""
        with self._wake:
            if self._job is not None or self._closing:
                return False
            self._job = job
            self._wake.notify_all()
            return True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Waits until no job is in progress and takes no new one meanwhile; everything due was posted."""
        with self._wake:
            self._wake.wait_for(lambda: self._job is None)
            yield

    def close(self, timeout_s: float = 5.0) -> bool:
        """Stops the worker after the job in progress. False when that takes longer than ``timeout_s``."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._worker.join(timeout_s)
        return not self._worker.is_alive()

    def run_once(self, job: RefreshJob) -> RefreshResult:
        """Scores ``job`` in the calling thread: worker, replay, tests. A failing model is no error."""
        asked, began_s = self._asked, time.monotonic()
        answer = self._ask_model(asked, job) if len(job.slots) else None
        seconds = time.monotonic() - began_s
        assessment = asked.ladder.assess(self._clock.now_ms(), asked.last_good_ms)
        self.level = assessment.level
        scores, as_of_ms, version, rows_bad = None, job.as_of_ms, "", 0
        if answer is not None:
            scores, version, rows_bad = answer.scores, answer.version, answer.rows_bad
        elif len(job.slots) == 0:
            scores = np.empty(0, dtype=np.float32)
        elif assessment.level is Level.LAST_GOOD and asked.last_good_ms is not None:
            as_of_ms, version = asked.last_good_ms, asked.ladder.model_version
        else:
            scores = trend_formula(job.features, self._feature_names)
        order = None if scores is None else rank_rows(scores, job.slots, job.ids)
        result = RefreshResult(
            job.slots, job.sessions, scores, order, assessment.level, assessment.reasons, version,
            as_of_ms, rows_bad, asked.turn,
        )  # fmt: skip
        if self.listener is not None:
            self._shielded(partial(self.listener, job, result, seconds))
        return result

    def _ask_model(self, asked: _Asked, job: RefreshJob) -> Answer | None:
        """One call of the model if the breaker allows; None when there are no new scores."""
        if not asked.ladder.may_call(self._clock.now_ms()):
            self._count("skipped", 0.0)
            return None
        started = time.monotonic()
        answer, error = self._shielded(partial(score_rows, asked.scorer, job.features, self._deadline_s))
        seconds = time.monotonic() - started
        now_ms = self._clock.now_ms()
        if answer is None:
            outcome = OUTCOMES.get(type(error), "internal") if isinstance(error, ScoringError) else "internal"
            self._count(outcome, seconds)
            told = error if isinstance(error, ScoringError) else f"{type(error).__name__}: {error}"
            asked.ladder.failed(now_ms, f"{outcome}: {told}")
            return None
        self._count("ok", seconds)
        self.rows_bad += answer.rows_bad
        asked.ladder.succeeded(now_ms, answer.version)
        asked.last_good_ms = job.as_of_ms
        return answer

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._job is not None or self._closing)
                job = self._job
            if job is None:
                return
            result, error = self._shielded(partial(self.run_once, job))
            if result is None:
                result = self._crashed(job, f"internal: {type(error).__name__}: {error}")
            _, error = self._shielded(partial(self._post, result))
            self.post_failures += error is not None
            with self._wake:
                self._job = None
                self._wake.notify_all()

    def _crashed(self, job: RefreshJob, reason: str) -> RefreshResult:
        """Our own code failed around the model: keep what there is, and say so."""
        self._count("internal", 0.0)
        asked = self._asked
        asked.ladder.failed(self._clock.now_ms(), reason)
        self.level = Level.LAST_GOOD
        as_of_ms = job.as_of_ms if asked.last_good_ms is None else asked.last_good_ms
        return RefreshResult(
            job.slots, job.sessions, None, None, Level.LAST_GOOD, (reason,), asked.ladder.model_version,
            as_of_ms, 0, asked.turn,
        )  # fmt: skip

    def _count(self, outcome: str, seconds: float) -> None:
        self.outcomes[outcome] += 1
        self._shielded(partial(self._on_call, outcome, seconds))

    def _shielded(self, step: Callable[[], T]) -> tuple[T | None, Exception | None]:
        """(result, None) or (None, error): no exception may end the worker, which nobody would notice."""
        try:
            return step(), None
        except ScoringError as error:
            return None, error
        except Exception as error:  # the foreign code of scorer, telemetry and post
            log.exception("unexpected error in the score refresh")
            return None, error


def score_rows(scorer: Scorer, features: NDArray[np.float32], deadline_s: float) -> Answer:
    """Scores all rows float32[n, F], in chunks, within one deadline.

    Raises:
        ScoringError: no answer in time, or for more than half of the rows no probability.
    """
    ends_at = time.monotonic() + deadline_s
    scores = np.empty(len(features), dtype=np.float32)
    versions: dict[str, None] = {}  # in order of appearance
    for start in range(0, len(features), CHUNK_ROWS):
        left_s = ends_at - time.monotonic()
        if left_s <= 0:
            raise ScorerTimeout(f"{start} of {len(features)} rows were scored within {deadline_s * 1e3:.0f} ms")
        chunk = features[start : start + CHUNK_ROWS]
        part = scorer.score(chunk, left_s)
        if part.values.shape != (len(chunk),):
            raise BadScores(f"{part.model_version} answered {part.values.shape} for {len(chunk)} rows")
        scores[start : start + CHUNK_ROWS] = part.values
        versions[part.model_version] = None
    label = ",".join(versions)
    usable = (scores >= -RANGE_TOLERANCE) & (scores <= 1 + RANGE_TOLERANCE)  # False for NaN
    rows_bad = len(scores) - int(np.count_nonzero(usable))
    if 2 * rows_bad > len(scores):
        raise BadScores(f"{label} gave no probability for {rows_bad} of {len(scores)} rows")
    np.clip(scores, 0.0, 1.0, out=scores)
    scores[~usable] = np.nan
    return Answer(scores, label, rows_bad)
