"""A Triton that dies, hangs, breaks or changes: what the scorer says and where the ladder goes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tritonclient.grpc import InferenceServerClient

from server.clock import ManualClock
from server.config import ScoringSettings
from server.errors import BadScores, SchemaMismatch, ScorerTimeout, ScorerUnavailable, ScoringError
from server.scoring.ladder import Level
from server.scoring.local import LocalScorer
from server.scoring.refresh import Refresher, RefreshJob, RefreshResult
from server.scoring.triton import TritonScorer
from tests import triton_server as ts

# The formula's three features are among the six of the test models.
NAMES = ("viewers_mean_1m", "viewers_mean_30m", "likes_per_viewer_5m", "a", "b", "c")
MODELS = ("trendiness", "nan", "two_columns", "other_schema", "wide")
HANGING_S = 1.0
"""A deadline that is told from twice as long on a busy machine, too."""
SETTINGS = ScoringSettings(deadline_ms=2_000, max_score_age_ms=15_000, breaker_open_ms=2_000)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("repository")
    ts.put_model(path, "trendiness", ts.small_net())
    ts.put_model(path, "nan", ts.nan_where_first_feature_is_negative())
    ts.put_model(path, "two_columns", ts.two_columns_out())
    ts.put_model(path, "other_schema", ts.small_net(), schema="another-schema")
    ts.put_model(path, "wide", ts.small_net(n_features=9), n_features=9)
    return path


@pytest.fixture(scope="module")
def triton(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ts.RunningTriton]:
    """One server for the tests that leave it as it was."""
    log = tmp_path_factory.mktemp("log") / "triton.log"
    with ts.running_triton(repository, log, *MODELS) as running:
        yield running


@pytest.fixture
def own_triton(tmp_path: Path) -> Iterator[ts.RunningTriton]:
    """A server with "trendiness" alone, to be broken."""
    ts.put_model(tmp_path / "repository", "trendiness", ts.small_net())
    with ts.running_triton(tmp_path / "repository", tmp_path / "triton.log", "trendiness") as running:
        yield running


def scorer_for(triton: ts.RunningTriton, model: str = "trendiness") -> TritonScorer:
    return TritonScorer(triton.address, model, ts.SCHEMA, ts.N_FEATURES)


def features(rows: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(0, 1, (rows, ts.N_FEATURES)).astype(np.float32)


def job(clock: ManualClock, rows: int = 50) -> RefreshJob:
    slots = np.arange(rows, dtype=np.int32)
    ids = np.array([b"id-%06d" % slot for slot in slots], dtype="S64")
    return RefreshJob(slots, np.zeros(rows, np.uint32), features(rows), ids, clock.now_ms())


@pytest.mark.parametrize("rows", [1, 1_000, 65_536])
def test_triton_and_local_agree_on_the_same_model(triton: ts.RunningTriton, repository: Path, rows: int) -> None:
    remote = scorer_for(triton)
    local = LocalScorer(repository, "trendiness", ts.SCHEMA, ts.N_FEATURES)
    x = features(rows)
    ours, theirs = local.score(x, 10.0), remote.score(x, 10.0)
    assert theirs.values.dtype == np.float32
    assert theirs.values.shape == (rows,)
    np.testing.assert_allclose(theirs.values, ours.values, atol=1e-5)
    assert np.ptp(theirs.values) > 0.05 or rows == 1
    assert theirs.model_version == ours.model_version == "trendiness/1"
    remote.close()


@pytest.mark.parametrize(
    ("model", "error", "told"),
    [
        ("other_schema", SchemaMismatch, "'another-schema'.*'schema-of-the-tests'"),
        ("wide", SchemaMismatch, "9 features per row.*has 6"),
        ("two_columns", BadScores, r"\[10, 2\].*\[10\]"),
        ("absent", ScorerUnavailable, "absent"),
    ],
)
def test_an_unfit_model_is_refused_with_the_reason(
    triton: ts.RunningTriton, model: str, error: type[ScoringError], told: str
) -> None:
    scorer = scorer_for(triton, model)
    for _ in range(2):  # the second time as well: nothing was remembered as accepted
        with pytest.raises(error, match=told):
            scorer.score(features(10), 5.0)
    scorer.close()


@pytest.mark.parametrize(("bad_rows", "level"), [(3, Level.NONE), (30, Level.FORMULA)])
def test_rows_answered_with_nan_keep_their_score_unless_most_rows_are(
    triton: ts.RunningTriton, bad_rows: int, level: Level
) -> None:
    clock = ManualClock(1_000_000)
    scorer = scorer_for(triton, "nan")
    refresher = Refresher(scorer, SETTINGS, NAMES, clock, post=lambda result: None)
    work = job(clock)
    work.features[:bad_rows, 0] = -1.0
    result = refresher.run_once(work)
    assert result.level is level
    assert result.scores is not None
    assert result.order is not None
    if level is Level.NONE:
        assert result.model_rows_bad == refresher.rows_bad == bad_rows
        assert np.flatnonzero(np.isnan(result.scores)).tolist() == list(range(bad_rows))
        assert set(result.order[-bad_rows:]) == set(range(bad_rows))
    else:
        assert result.reasons[0].startswith("bad_scores: ")
        assert np.isfinite(result.scores).all()
    refresher.close()
    scorer.close()


def test_a_newly_loaded_version_answers_and_is_named(own_triton: ts.RunningTriton, tmp_path: Path) -> None:
    scorer = scorer_for(own_triton)
    before = scorer.score(features(20), 5.0)
    ts.put_model(tmp_path / "repository", "trendiness", ts.small_net(seed=2), version=2)
    control = InferenceServerClient(own_triton.address)
    control.load_model("trendiness")
    after = scorer.score(features(20), 5.0)
    assert (before.model_version, after.model_version) == ("trendiness/1", "trendiness/2")
    assert not np.allclose(before.values, after.values)

    ts.put_model(tmp_path / "repository", "trendiness", ts.small_net(seed=3), version=3, schema="another")
    control.load_model("trendiness")
    with pytest.raises(SchemaMismatch, match="'another'"):
        scorer.score(features(20), 5.0)
    control.close()
    scorer.close()


def test_a_version_built_for_another_schema_than_its_config_does_not_load(
    own_triton: ts.RunningTriton, tmp_path: Path
) -> None:
    scorer = scorer_for(own_triton)
    ts.put_model(tmp_path / "repository", "trendiness", ts.small_net(seed=2, schema="another"), version=2)
    control = InferenceServerClient(own_triton.address)
    with pytest.raises(Exception, match="built for feature schema 'another'"):
        control.load_model("trendiness")
    assert scorer.score(features(5), 5.0).model_version == "trendiness/1"
    control.close()
    scorer.close()


def test_a_killed_stub_is_healed_by_one_reload(own_triton: ts.RunningTriton) -> None:
    scorer = scorer_for(own_triton)
    expected = scorer.score(features(10), 5.0).values
    (stub,) = own_triton.stub_pids()
    os.kill(stub, signal.SIGKILL)
    failures: list[ScoringError] = []

    def healed() -> bool:
        try:
            values = scorer.score(features(10), 5.0).values
        except ScorerUnavailable as error:
            failures.append(error)
            return False
        return bool(np.array_equal(values, expected))

    ts.eventually(healed)
    assert len(failures) >= 3
    assert (scorer.heals, scorer.heal_failures) == (1, 0)
    (new_stub,) = own_triton.stub_pids()
    assert new_stub != stub
    scorer.close()


def test_a_hung_triton_is_a_timeout_within_the_deadline_and_comes_back(own_triton: ts.RunningTriton) -> None:
    scorer = scorer_for(own_triton)
    scorer.score(features(10), 5.0)
    os.kill(own_triton.pid, signal.SIGSTOP)
    try:
        for _ in range(4):  # also across the reconnect after the third
            started = time.monotonic()
            with pytest.raises(ScorerTimeout):
                scorer.score(features(10), HANGING_S)
            assert time.monotonic() - started < 2 * HANGING_S, "waited for twice"
    finally:
        os.kill(own_triton.pid, signal.SIGCONT)

    def answers() -> bool:
        try:
            return len(scorer.score(features(10), 5.0).values) == 10
        except ScoringError:
            return False

    ts.eventually(answers)
    assert scorer.heals == scorer.heal_failures == 0, "nothing was wrong with the model"
    scorer.close()


def test_killed_triton_degrades_to_last_good_then_formula_and_recovers_by_itself(tmp_path: Path) -> None:
    ts.put_model(tmp_path / "repository", "trendiness", ts.small_net())
    clock = ManualClock(1_000_000)
    results: list[RefreshResult] = []
    posted = threading.Condition()

    def post(result: RefreshResult) -> None:
        with posted:
            results.append(result)
            posted.notify()

    def tick() -> RefreshResult:
        seen = len(results)
        ts.eventually(lambda: refresher.submit(job(clock)), what="the worker is idle")
        with posted:
            assert posted.wait_for(lambda: len(results) > seen, 10)
        return results[-1]

    with ts.running_triton(tmp_path / "repository", tmp_path / "1.log", "trendiness") as triton:
        port = triton.port
        scorer = scorer_for(triton)
        refresher = Refresher(scorer, SETTINGS, NAMES, clock, post)
        first = tick()
        assert (first.level, first.reasons, first.model_version) == (Level.NONE, (), "trendiness/1")
        good_as_of_ms = first.as_of_ms
        triton.kill()

    clock.advance(1_000)
    kept = tick()
    assert (kept.level, kept.scores, kept.order) == (Level.LAST_GOOD, None, None)
    assert (kept.as_of_ms, kept.model_version) == (good_as_of_ms, "trendiness/1")
    assert kept.reasons[0].startswith("unavailable: ")
    clock.advance(SETTINGS.max_score_age_ms)
    fallen = tick()
    assert (fallen.level, fallen.model_version) == (Level.FORMULA, "")
    assert fallen.scores is not None
    assert np.isfinite(fallen.scores).all()
    tick()
    tick()
    assert refresher.outcomes == {"ok": 1, "unavailable": 3, "skipped": 1}  # the breaker opened

    with ts.running_triton(tmp_path / "repository", tmp_path / "2.log", "trendiness", port=port):

        def recovered() -> RefreshResult | None:
            clock.advance(SETTINGS.breaker_open_ms)
            result = tick()
            return result if result.level is Level.NONE else None

        result = ts.eventually(recovered)
        assert result.as_of_ms == clock.now_ms()
        np.testing.assert_array_equal(result.scores, first.scores)
        assert refresher.close()
        scorer.close()
