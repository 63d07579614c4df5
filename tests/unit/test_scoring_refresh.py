"""The refresher: one job at a time, chunked within one deadline, never dead, always honest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from numpy.typing import NDArray

from server.clock import ManualClock
from server.config import ScoringSettings
from server.errors import BadScores, ConfigError, SchemaMismatch, ScorerTimeout, ScorerUnavailable
from server.scoring import refresh
from server.scoring.base import Scores
from server.scoring.formula import trend_formula
from server.scoring.ladder import Level
from server.scoring.refresh import Refresher, RefreshJob, RefreshResult

NAMES = ("viewers_mean_1m", "viewers_mean_30m", "likes_per_viewer_5m")
SETTINGS = ScoringSettings()
Answer = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class ScriptedScorer:
    """Answers with ``answer(features)``; remembers the calls."""

    name = "scripted"

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.version = "m/1"
        self.calls: list[tuple[int, float]] = []

    def score(self, features: NDArray[np.float32], deadline_s: float) -> Scores:
        self.calls.append((len(features), deadline_s))
        return Scores(self.answer(features), self.version)

    def close(self) -> None:
        pass


def first_feature(features: NDArray[np.float32]) -> NDArray[np.float32]:
    return features[:, 0] / 1000


def job(values: list[float], as_of_ms: int = 100) -> RefreshJob:
    rows = len(values)
    features = np.zeros((rows, 3), np.float32)
    features[:, 0] = values
    ids = np.array([b"id-%d" % row for row in range(rows)], dtype="S64")
    slots = np.arange(10, 10 + rows, dtype=np.int32)
    return RefreshJob(slots, np.full(rows, 7, np.uint32), features, ids, as_of_ms)


@contextmanager
def refresher_for(
    scorer: ScriptedScorer,
    clock: ManualClock | None = None,
    post: Callable[[RefreshResult], None] = lambda result: None,
    on_call: Callable[[str, float], None] = lambda outcome, seconds: None,
) -> Iterator[Refresher]:
    subject = Refresher(scorer, SETTINGS, NAMES, clock or ManualClock(1_000), post, on_call)
    try:
        yield subject
    finally:
        subject.close()


def raising(error: Exception) -> Answer:
    def answer(features: NDArray[np.float32]) -> NDArray[np.float32]:
        raise error

    return answer


def test_scores_come_back_in_row_order_with_slots_by_score() -> None:
    with refresher_for(ScriptedScorer(first_feature)) as subject:
        result = subject.run_once(job([100, 900, 500, 900]))
    assert result.scores is not None
    assert result.order is not None
    np.testing.assert_allclose(result.scores, [0.1, 0.9, 0.5, 0.9])
    assert result.order.tolist() == [11, 13, 12, 10]
    assert (result.level, result.reasons, result.model_version, result.as_of_ms) == (0, (), "m/1", 100)
    assert result.sessions.tolist() == [7, 7, 7, 7]


def test_large_jobs_are_chunked_and_every_chunk_gets_the_time_that_is_left() -> None:
    rows = 2 * refresh.CHUNK_ROWS + 5
    scorer = ScriptedScorer(first_feature)
    values = np.linspace(0, 1000, rows).tolist()
    with refresher_for(scorer) as subject:
        result = subject.run_once(job(values))
    assert [size for size, _ in scorer.calls] == [refresh.CHUNK_ROWS, refresh.CHUNK_ROWS, 5]
    left = [seconds for _, seconds in scorer.calls]
    assert SETTINGS.deadline_ms / 1000 >= left[0] > left[1] > left[2] > 0
    assert result.scores is not None
    np.testing.assert_allclose(result.scores, np.array(values) / 1000, atol=1e-6)


def test_chunks_that_use_up_the_deadline_are_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    monkeypatch.setattr(refresh.time, "monotonic", lambda: now_s[0])

    def slow(features: NDArray[np.float32]) -> NDArray[np.float32]:
        now_s[0] += 0.5
        return first_feature(features)

    scorer = ScriptedScorer(slow)
    with refresher_for(scorer) as subject:
        result = subject.run_once(job([1.0] * (3 * refresh.CHUNK_ROWS)))
    assert result.reasons[0].startswith("timeout: 131072 of 196608 rows")
    assert len(scorer.calls) == 2


def test_a_version_change_between_chunks_is_disclosed() -> None:
    scorer = ScriptedScorer(first_feature)

    def change(features: NDArray[np.float32]) -> NDArray[np.float32]:
        scorer.version = f"m/{len(scorer.calls)}"
        return first_feature(features)

    scorer.answer = change
    with refresher_for(scorer) as subject:
        assert subject.run_once(job([1.0] * (refresh.CHUNK_ROWS + 1))).model_version == "m/1,m/2"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1.5, -0.5])
def test_rows_without_a_probability_are_nan_counted_and_ranked_last(bad: float) -> None:
    def answer(features: NDArray[np.float32]) -> NDArray[np.float32]:
        scores = first_feature(features).copy()
        scores[1] = bad
        return scores

    with refresher_for(ScriptedScorer(answer)) as subject:
        result = subject.run_once(job([100, 999, 500]))
    assert result.scores is not None
    assert result.order is not None
    assert np.isnan(result.scores).tolist() == [False, True, False]
    assert result.order.tolist() == [12, 10, 11]
    assert (result.level, result.model_rows_bad, subject.rows_bad) == (Level.NONE, 1, 1)


@pytest.mark.parametrize(("bad", "level"), [(2, Level.NONE), (3, Level.FORMULA)])
def test_more_than_half_bad_rows_fail_the_call(bad: int, level: Level) -> None:
    def answer(features: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.array([np.nan] * bad + [0.5] * (4 - bad), np.float32)

    work = job([1, 2, 3, 4])
    with refresher_for(ScriptedScorer(answer)) as subject:
        result = subject.run_once(work)
    assert result.level is level
    if level is Level.FORMULA:
        assert result.reasons[0].startswith("bad_scores: m/1")
        np.testing.assert_array_equal(result.scores, trend_formula(work.features, NAMES))


def test_rounding_just_outside_the_range_is_clipped_not_refused() -> None:
    scorer = ScriptedScorer(lambda features: np.array([1.0000002, -1e-7], np.float32))
    with refresher_for(scorer) as subject:
        result = subject.run_once(job([1, 2]))
    assert result.scores is not None
    assert result.scores.tolist() == [1.0, 0.0]
    assert result.model_rows_bad == 0


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ScorerTimeout("late"), "timeout"),
        (ScorerUnavailable("down"), "unavailable"),
        (BadScores("odd"), "bad_scores"),
        (SchemaMismatch("other"), "schema_mismatch"),
        (ZeroDivisionError("bug"), "internal"),
    ],
)
def test_every_failure_is_named_counted_and_degrades(error: Exception, outcome: str) -> None:
    told: list[str] = []
    with refresher_for(
        ScriptedScorer(raising(error)), on_call=lambda outcome, seconds: told.append(outcome)
    ) as subject:
        result = subject.run_once(job([300, 400]))
    assert told == [outcome]
    assert subject.outcomes == {outcome: 1}
    assert result.level is Level.FORMULA
    assert result.reasons[0].startswith(f"{outcome}: ")
    assert str(error) in result.reasons[0]


def test_a_wrong_number_of_scores_fails_the_call() -> None:
    with refresher_for(ScriptedScorer(lambda features: np.zeros(1, np.float32))) as subject:
        assert subject.run_once(job([1, 2])).reasons[0].startswith("bad_scores: ")


def test_the_ladder_goes_down_and_up_with_the_clock() -> None:
    clock = ManualClock(1_000)
    scorer = ScriptedScorer(first_feature)
    with refresher_for(scorer, clock) as subject:
        assert subject.run_once(job([1], as_of_ms=1_000)).level is Level.NONE
        scorer.answer = raising(ScorerUnavailable("down"))
        for _ in range(SETTINGS.breaker_failures):
            kept = subject.run_once(job([1], as_of_ms=1_500))
            assert (kept.level, kept.scores, kept.order, kept.as_of_ms) == (
                Level.LAST_GOOD,
                None,
                None,
                1_000,
            )
        calls = len(scorer.calls)
        subject.run_once(job([1]))
        assert len(scorer.calls) == calls, "the open breaker holds calls back"
        assert subject.outcomes["skipped"] == 1
        clock.advance(SETTINGS.max_score_age_ms + 1)
        assert subject.run_once(job([1])).level is Level.FORMULA
        scorer.answer = first_feature
        clock.advance(SETTINGS.breaker_open_ms)
        assert subject.run_once(job([1])).level is Level.NONE
        assert subject.level is Level.NONE


def test_an_empty_table_is_not_sent_to_the_model() -> None:
    scorer = ScriptedScorer(first_feature)
    with refresher_for(scorer) as subject:
        result = subject.run_once(job([]))
    assert scorer.calls == []
    assert result.scores is not None
    assert result.order is not None
    assert result.scores.shape == result.order.shape == (0,)


def test_one_job_at_a_time_and_none_after_close() -> None:
    started, release, posted = threading.Event(), threading.Event(), threading.Semaphore(0)

    def wait(features: NDArray[np.float32]) -> NDArray[np.float32]:
        started.set()
        assert release.wait(10)
        return first_feature(features)

    with refresher_for(ScriptedScorer(wait), post=lambda result: posted.release()) as subject:
        assert subject.submit(job([1]))
        assert started.wait(10)
        assert not subject.submit(job([1]))
        assert not subject.close(timeout_s=0.01)
        release.set()
        assert posted.acquire(timeout=10)
        assert subject.close()
        assert not subject.submit(job([1]))


def test_the_worker_survives_a_post_that_raises_and_a_bug_of_our_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    results: list[RefreshResult] = []
    done = threading.Semaphore(0)

    def post(result: RefreshResult) -> None:
        results.append(result)
        done.release()
        if len(results) == 1:
            raise RuntimeError("engine is gone")

    def submit(subject: Refresher) -> None:
        idle = threading.Event()
        while not subject.submit(job([1])):
            idle.wait(0.001)
        assert done.acquire(timeout=10)

    def broken(*arguments: object) -> NDArray[np.int32]:
        raise IndexError("our bug")

    with refresher_for(ScriptedScorer(first_feature), post=post) as subject:
        submit(subject)
        with monkeypatch.context() as patch:
            patch.setattr(refresh, "rank_rows", broken)
            submit(subject)
        submit(subject)
    assert [result.level for result in results] == [Level.NONE, Level.LAST_GOOD, Level.NONE]
    assert results[1].scores is None
    assert results[1].reasons == ("internal: IndexError: our bug",)
    assert subject.post_failures == 1
    assert "our bug" in caplog.text
    assert "engine is gone" in caplog.text


def test_telemetry_that_raises_changes_nothing() -> None:
    def on_call(outcome: str, seconds: float) -> None:
        raise KeyError(outcome)

    with refresher_for(ScriptedScorer(first_feature), on_call=on_call) as subject:
        assert subject.run_once(job([1])).level is Level.NONE


def test_a_feature_file_without_the_formulas_features_fails_at_start() -> None:
    with pytest.raises(ConfigError, match="viewers_mean_30m"):
        Refresher(ScriptedScorer(first_feature), SETTINGS, ("viewers_mean_1m",), ManualClock(0), lambda result: None)
