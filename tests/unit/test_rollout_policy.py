"""The pure parts of a rollout: allowed steps, who is in a canary's share, agreement, guardrails, files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.config import RolloutSettings
from server.errors import ConfigError, ModelRefused, Refused
from server.ranking.candidate import viewer_places
from server.rollout.agreement import Agreement, compare
from server.rollout.guard import Trial, Viewers, verdict
from server.rollout.intake import gate_problem
from server.rollout.repository import Repository
from server.rollout.samples import SampleRing
from server.rollout.state import STEPS, Rollout, Stage
from server.rollout.store import RolloutFile

LIMITS = RolloutSettings()
STEP = st.one_of(
    st.tuples(st.just("push"), st.integers(0, 4)),
    st.tuples(st.just("shadow"), st.integers(1, 4), st.sampled_from([0.0, 5.0, 100.0, 101.0])),
    st.tuples(st.just("canary"), st.integers(1, 4), st.sampled_from([*STEPS, 50.0])),
    st.tuples(st.just("promote"), st.integers(1, 4), st.booleans()),
    st.tuples(st.just("rollback")),
)


def step(rollout: Rollout, what: tuple[object, ...], now_ms: int) -> Rollout:
    name, rest = what[0], what[1:]
    if name == "push":
        return rollout.pushed(*rest, now_ms)  # type: ignore[arg-type]
    if name == "shadow":
        return rollout.shadowed(*rest, now_ms)  # type: ignore[arg-type]
    if name == "canary":
        return rollout.canaried(*rest, 0, now_ms)  # type: ignore[arg-type]
    return rollout.promoted(*rest, now_ms) if name == "promote" else rollout.rolled_back(now_ms)  # type: ignore[arg-type]


@given(st.lists(STEP, max_size=30))
def test_whatever_is_asked_one_version_serves_and_every_state_survives_its_file(
    steps: list[tuple[object, ...]],
) -> None:
    rollout, served = Rollout().pinned(1), {1}
    for now_ms, what in enumerate(steps):
        before = rollout
        try:
            rollout = step(rollout, what, now_ms)
        except Refused:
            assert rollout is before
            continue
        assert Rollout.from_dict(json.loads(json.dumps(rollout.to_dict()))) == rollout
        assert rollout.serving and rollout.serving != rollout.candidate and set(rollout.held) >= {rollout.serving}
        if rollout.serving != before.serving:
            assert what[0] in ("promote", "rollback")
            if what[0] == "promote":
                assert rollout.previous == before.serving and before.candidate == rollout.serving
                served.add(rollout.serving)
            else:
                assert rollout.serving == before.previous and not before.candidate
        assert rollout.serving in served, "only what was promoted, or served before, ever serves"
        if rollout.stage is Stage.CANARY and rollout.percent > before.percent and before.stage is Stage.CANARY:
            assert rollout.percent == next(s for s in STEPS if s > before.percent)


def test_a_candidate_is_not_promoted_before_a_whole_canary_unless_forced() -> None:
    rollout = Rollout().pinned(1).pushed(2, 0)
    for percent in STEPS:
        with pytest.raises(Refused, match="canary of 100 %"):
            rollout.promoted(2, False, 0)
        assert rollout.promoted(2, True, 0).serving == 2
        rollout = rollout.canaried(2, percent, 0, 0)
    assert rollout.promoted(2, False, 5) == Rollout(serving=2, previous=1, since_ms=5)


def test_a_push_does_not_pull_the_rug_from_under_a_canary() -> None:
    rollout = Rollout().pinned(1).pushed(2, 0).canaried(2, 1.0, 0, 0)
    with pytest.raises(Refused, match="version 2 is in canary"):
        rollout.pushed(3, 0)


@given(st.lists(st.integers(1, 2**64 - 1), min_size=1, max_size=50), st.integers(0, 2**64 - 1))
def test_a_viewer_in_one_per_cent_stays_in_ten_and_nobody_is_in_by_having_no_id(hashes: list[int], salt: int) -> None:
    places = viewer_places(np.array([*hashes, 0], np.uint64), np.uint64(salt))
    again = viewer_places(np.array([*hashes, 0], np.uint64), np.uint64(salt))
    assert (places == again).all() and (places[:-1] >= 0).all() and (places[:-1] < 1).all() and places[-1] == 1.0
    assert set(np.flatnonzero(places < 0.01)) <= set(np.flatnonzero(places < 0.10))


def test_shares_are_what_they_say_and_differ_between_candidates() -> None:
    hashes = np.arange(1, 100_001, dtype=np.uint64)  # as regular as hashes never are
    one, other = (viewer_places(hashes, np.uint64(salt)) for salt in (7, 8))
    for share in (0.01, 0.1, 0.5):
        assert (one < share).mean() == pytest.approx(share, rel=0.1)
    assert ((one < 0.1) & (other < 0.1)).mean() == pytest.approx(0.01, rel=0.2)


# --- agreement --------------------------------------------------------------------------------

SCORES = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=60)


@given(SCORES)
def test_a_model_agrees_with_itself(values: list[float]) -> None:
    scores = np.array(values, np.float32)
    found = compare(scores, scores)
    assert found.rows == len(scores) and found.top10 == found.top100 == 1.0
    assert found.drift == found.calibration_gap == 0.0
    assert math.isnan(found.rank_correlation) if np.ptp(scores) == 0 else found.rank_correlation == pytest.approx(1.0)


def test_agreement_against_worked_examples() -> None:
    a = np.linspace(0.0, 1.0, 200, dtype=np.float32)
    turned = compare(a, a[::-1].copy())
    assert turned.rank_correlation == pytest.approx(-1.0) and turned.top10 == turned.top100 == 0.0
    assert turned.drift == pytest.approx(0.0, abs=1e-6) and turned.calibration_gap == pytest.approx(0.5, abs=0.01)
    squared = compare(a, a**2)
    assert squared.rank_correlation == pytest.approx(1.0) and squared.top10 == 1.0
    assert squared.drift == pytest.approx(1 / 3, abs=0.01)  # mean of x² is 1/3, of x 1/2
    # Spearman with ties: ranks 1.5, 1.5, 3 against 1, 2, 3 → 0.866
    tied = compare(np.array([0.2, 0.2, 0.9], np.float32), np.array([0.1, 0.5, 0.9], np.float32))
    assert tied.rank_correlation == pytest.approx(math.sqrt(0.75))
    some = compare(np.array([np.nan, 0.5, 0.1], np.float32), np.array([0.5, 0.5, np.inf], np.float32))
    assert some.rows == 1
    assert compare(np.zeros(0, np.float32), np.zeros(0, np.float32)).rows == 0


# --- guardrails -------------------------------------------------------------------------------

NOBODY = Viewers()


def agreement(mean: float, rows: int = 1_000) -> Agreement:
    return Agreement(rows, 0.9, 0.8, 0.8, 0.2, mean, 0.0)


def trial(
    mean: float = 0.2, refreshes: int = 5, ours_s: float = 0.01, theirs_s: float = 0.01, rows: int = 1_000
) -> Trial:
    made = Trial()
    for _ in range(refreshes):
        made.scored(agreement(mean, rows), ours_s, theirs_s)
    return made


@pytest.mark.parametrize(
    ("made", "faults", "serving", "candidate", "wanted"),
    [
        (trial(), 0, NOBODY, NOBODY, None),
        (trial(0.2195), 0, NOBODY, NOBODY, None),
        (trial(0.2205), 0, NOBODY, NOBODY, "drift"),
        (trial(0.1795), 0, NOBODY, NOBODY, "drift"),
        (trial(0.4, refreshes=2), 0, NOBODY, NOBODY, None),  # too little seen
        (trial(0.4, rows=5), 0, NOBODY, NOBODY, None),  # too few streams to have a mean
        (trial(ours_s=0.01, theirs_s=0.099), 0, NOBODY, NOBODY, None),  # slower, and fast enough
        (trial(ours_s=0.05, theirs_s=0.16), 0, NOBODY, NOBODY, "latency"),
        (trial(ours_s=0.06, theirs_s=0.16), 0, NOBODY, NOBODY, None),
        (trial(), 1, NOBODY, NOBODY, "errors"),
        (trial(), 0, NOBODY, Viewers(1, 1, 1), "dead_impressions"),
        (trial(), 0, Viewers(1, 1, 1), Viewers(1, 1, 1), None),  # not the candidate's doing
        (trial(), 0, Viewers(10_000, 10), Viewers(1_000, 30), "dead_impressions"),
        (trial(), 0, Viewers(10_000, 10), Viewers(100, 30), None),  # too few to tell
        (trial(), 0, Viewers(1_000, 20), Viewers(1_000, 24), None),  # chance
    ],
)
def test_guardrails_end_what_harms_and_nothing_else(
    made: Trial, faults: int, serving: Viewers, candidate: Viewers, wanted: str | None
) -> None:
    found = verdict(LIMITS, made, faults, serving, candidate)
    assert (found[0] if found else None) == wanted, found


def test_failures_in_a_row_end_a_canary_and_a_success_in_between_forgives() -> None:
    made = trial()
    for _ in range(2):
        made.failed("ScorerTimeout: late")
    assert verdict(LIMITS, made, 0, NOBODY, NOBODY) is None
    made.scored(agreement(0.2), 0.01, 0.01)
    made.failed("a")
    made.failed("b")
    assert verdict(LIMITS, made, 0, NOBODY, NOBODY) is None
    made.failed("ScorerTimeout: late")
    assert verdict(LIMITS, made, 0, NOBODY, NOBODY) == ("errors", "3 refreshes in a row failed: ScorerTimeout: late")


def test_the_gate_wants_every_metric_on_its_side() -> None:
    limits = RolloutSettings(min_metrics={"auc": 0.7}, max_metrics={"log_loss": 0.5})
    assert gate_problem(limits, {"auc": 0.7, "log_loss": 0.5}) == ""
    assert "auc of at least 0.7 wanted" in gate_problem(limits, {"auc": 0.69, "log_loss": 0.5})
    assert "log_loss of at most 0.5 wanted" in gate_problem(limits, {"auc": 0.9, "log_loss": math.nan})
    assert "neither metrics.json" in gate_problem(limits, {"log_loss": 0.1})


# --- keeping ----------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 300), max_size=20))
def test_the_ring_holds_only_rows_that_were_offered_and_the_newest_of_them(sizes: list[int]) -> None:
    ring, at = SampleRing(2, capacity=100, per_offer=10), 1
    assert ring.rows().tolist() == [[0.0, 0.0]]
    for size in sizes:
        ring.offer(np.repeat(np.arange(at, at + size, dtype=np.float32)[:, None], 2, axis=1))
        at += size
        rows = ring.rows()
        assert len(rows) <= 100
        if at > 1:
            assert rows.min() >= 1 and rows.max() < at and (rows[:, 0] == rows[:, 1]).all()
    if sizes and sizes[-1]:
        assert rows.max() >= at - sizes[-1], "the last offer is in it"


def test_the_rollout_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    file = RolloutFile(tmp_path / "deep" / "rollout.json")
    assert file.load() == {}
    rollout = Rollout(serving=3, previous=1, candidate=4, stage=Stage.CANARY, percent=10.0, hold_ms=5, since_ms=7)
    file.save({"trendiness": rollout})
    assert file.load() == {"trendiness": rollout}
    assert [path.name for path in file.path.parent.iterdir()] == ["rollout.json"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"serving": -1}, "versions of 0 to"),
        ({"serving": True}, "numbers wanted"),
        ({"stage": "soon"}, "'soon' is not a valid Stage"),
        ({"candidate": 0}, "candidate 0 does not fit stage canary"),
        ({"serving": 0}, "serving 0"),
        ({"percent": 200.0}, "percent 200.0"),
        ({"more": 1}, "keys serving, previous"),
    ],
)
def test_a_rollout_file_that_says_nonsense_is_refused_with_its_name(
    tmp_path: Path, change: dict[str, object], told: str
) -> None:
    good = Rollout(serving=3, candidate=4, stage=Stage.CANARY, percent=10.0).to_dict()
    (tmp_path / "r.json").write_text(json.dumps({"format": 1, "models": {"trendiness": {**good, **change}}}))
    with pytest.raises(ConfigError, match=rf"rollout.file: .*r.json cannot be used: .*{told}"):
        RolloutFile(tmp_path / "r.json").load()


@pytest.mark.parametrize(
    "content", ["", "[]", '{"format": 2, "models": {}}', '{"format": 1}', "\0", '{"format": 1, "models": 3}']
)
def test_a_file_that_is_no_rollout_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(ConfigError, match="cannot be used"):
        RolloutFile(tmp_path / "r.json").load()


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    file = RolloutFile(tmp_path / "r.json")
    file.save({"m": Rollout(serving=1)})
    (tmp_path / ".r.json.tmp").mkdir()  # it cannot be written there
    with pytest.raises(Refused, match="cannot be written"):
        file.save({"m": Rollout(serving=2)})
    assert file.load() == {"m": Rollout(serving=1)}


def test_a_version_appears_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "config.pbtxt").write_text("")
    repository = Repository(tmp_path)
    staged = repository.stage(2, {"model.onnx": b"a", "metrics.json": b'{"auc": 0.7, "note": "x", "ok": true}'})
    assert repository.versions() == []
    assert repository.facts(staged).metrics == {"auc": 0.7}
    assert repository.place(staged, 2) is True
    assert repository.versions() == [2] and not staged.exists()
    assert repository.place(repository.stage(2, {"model.onnx": b"a"}), 2) is False
    other = repository.stage(2, {"model.onnx": b"b"})
    with pytest.raises(ModelRefused, match="with other contents"):
        repository.place(other, 2)
    repository.sweep()
    repository.remove(tmp_path / "2")
    assert [path.name for path in tmp_path.iterdir()] == ["config.pbtxt"]


def test_held_versions_are_those_that_somebody_may_need_at_once() -> None:
    rollout = Rollout(serving=2, previous=1, candidate=3, stage=Stage.PUSHED)
    assert rollout.held == (1, 2, 3)
    assert replace(rollout, serving=0).held == ()
