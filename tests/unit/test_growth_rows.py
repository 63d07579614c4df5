"""What the growth model may know, how orders are judged, and how sure a difference is."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from loadtest.replay.growth import Reports, bins, truth_at
from loadtest.replay.reader import History, Kind, read_history
from loadtest.replay.sessions import split_sessions
from models.growth.evaluate import compare, split
from models.growth.features import NAMES, OWN, with_places
from models.growth.labels import MIN_SET, SET_SIZE, deal, lessons, place_of
from models.growth.metrics import interval95, quality
from models.growth.rows import SILENCE_S, Rows, cut_s, rows_of
from server.errors import ConfigError
from tests.histories import Row, broadcast, in_time, row, write_csv

MINUTES = 50


def random_history(seed: int, streams: int = 5) -> History:
    """Reports of a few streams with gaps, begins, ends and silences, in order of time."""
    rng = np.random.default_rng(seed)
    rows: list[tuple[int, int, int, int, int]] = []
    for stream in range(streams):
        begin = int(rng.integers(0, 20)) * 60
        rows.append((begin, Kind.START, stream, 100, 0))
        for minute in np.flatnonzero(rng.random(MINUTES) < 0.6).tolist():
            viewers, likes = int(rng.integers(15, 400)), int(rng.integers(0, 9))
            rows.append((begin + 60 * minute, Kind.SNAPSHOT, stream, viewers, likes))
        if rng.random() < 0.5:
            rows.append((begin + 60 * int(rng.integers(30, 50)), Kind.END, stream, 0, 0))
    rows.append((100 * 60, Kind.START, streams, 1, 0))  # so that every history is as long
    t_s, kind, stream_of, viewers_of, likes_of = (np.array(c) for c in zip(*sorted(rows, key=lambda r: r[0])))
    names = tuple(f"s{i}" for i in range(streams + 1))
    return History(t_s, kind.astype(np.uint8), stream_of.astype(np.int32), viewers_of, likes_of, np.zeros_like(t_s),
                   names, names, ("",) * len(names), True)  # fmt: skip


def with_another_future(history: History, after_s: int, seed: int) -> History:
    """The same up to ``after_s``, included; later rows are lost or tell other numbers. The last one stays."""
    rng = np.random.default_rng(seed)
    later = history.t_s > after_s
    kept = ~later | (rng.random(len(history)) < 0.7)
    kept[-1] = True
    viewers = np.where(later, rng.integers(0, 5_000, len(history)), history.viewers)
    likes = np.where(later, rng.integers(0, 500, len(history)), history.likes)
    columns = {"t_s": history.t_s, "kind": history.kind, "stream": history.stream, "chats": history.chats}
    changed = {**columns, "viewers": viewers, "likes": likes}
    return replace(history, **{name: column[kept] for name, column in changed.items()})


def known_until(rows: Rows, t_s: int) -> list[NDArray[np.generic]]:
    early = rows.take(rows.t_s <= t_s)
    places = with_places(early.own, early.t_s)
    return [early.t_s, early.session, early.now, places, *early.formulas.values()]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), minute=st.integers(1, 80))
def test_what_comes_later_changes_no_feature_and_no_formula_of_a_moment(seed: int, minute: int) -> None:
    history = random_history(seed)
    before = known_until(rows_of(history), 60 * minute)
    after = known_until(rows_of(with_another_future(history, 60 * minute, seed + 1)), 60 * minute)
    assert len(before) == len(after)
    for one, other in zip(before, after):
        np.testing.assert_array_equal(one, other)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), streams=st.integers(1, 8))
def test_features_are_finite_and_named(seed: int, streams: int) -> None:
    rows = rows_of(random_history(seed, streams))
    assert rows.own.shape == (len(rows), len(OWN)) and rows.own.dtype == np.float32
    features = with_places(rows.own, rows.t_s)
    assert features.shape == (len(rows), len(NAMES)) and features.dtype == np.float32
    assert np.isfinite(features).all()


def history_of(tmp_path: Path, rows: list[Row]) -> History:
    return read_history(write_csv(tmp_path / "h.csv", in_time(rows)))


def test_features_are_the_numbers_computed_by_hand(tmp_path: Path) -> None:
    # Minutes 0 to 30: 95 viewers until minute 19, 195 from minute 20 on; 2 likes a minute.
    rows = rows_of(history_of(tmp_path, broadcast("a", 0, [95] * 20 + [195] * 21, likes_delta=2)))
    at = dict(zip(OWN, rows.own[rows.t_s == 24 * 60][0].tolist()))
    assert at["viewers"] == pytest.approx(math.log(200))
    assert at["age_min"] == pytest.approx(math.log(25))
    assert at["staleness_min"] == at["below_peak"] == at["change_3m"] == at["gain_3m"] == at["spread_3m"] == 0.0
    assert at["since_peak_min"] == pytest.approx(math.log(5))  # first reached at minute 20
    assert at["change_5m"] == at["change_60m"] == pytest.approx(math.log(2))
    assert at["gain_5m"] == pytest.approx(math.log(101))
    assert at["above_mean_10m"] == pytest.approx(math.log(2) / 2)  # minutes 15 to 24, half of them lower
    assert at["spread_10m"] == pytest.approx(math.log(2) / math.sqrt(10))
    assert at["likes_5m"] == pytest.approx(math.log(11)) and at["likes"] == pytest.approx(math.log(51))
    assert at["likes_per_viewer_5m"] == pytest.approx(math.log(10.5 / 200))


def test_places_are_among_the_rows_of_the_same_moment_and_equal_ones_share() -> None:
    own = np.zeros((5, len(OWN)), np.float32)
    own[:, 0] = [1.0, 3.0, 3.0, 5.0, 9.0]
    features = with_places(own, np.array([7, 7, 7, 7, 8]))
    at = {name: features[:, NAMES.index(name)].tolist() for name in ("rank_viewers", "place_viewers", "mean_viewers")}
    assert at["rank_viewers"] == pytest.approx([0.0, 0.5, 0.5, 1.0, 0.5])
    assert at["place_viewers"] == pytest.approx(np.log1p([3.0, 1.5, 1.5, 0.0, 0.0]))
    assert at["mean_viewers"] == pytest.approx([3.0] * 4 + [9.0])
    assert features[:, -1] == pytest.approx(np.log([4, 4, 4, 4, 1]))


def crowd(n: int = 33, minutes: int = 60) -> list[Row]:
    rng = np.random.default_rng(5)
    rows = [row(0, "start", "first", 1)]
    for i in range(n):
        viewers = np.maximum(rng.normal(80, 25, minutes), 1).astype(int).tolist()
        rows += broadcast(f"s{i:02d}", 60 * int(rng.integers(0, 9)), viewers, likes_delta=i % 3)
    return rows


def test_at_full_five_minutes_candidates_and_truth_are_those_of_the_replay(tmp_path: Path) -> None:
    history = history_of(tmp_path, crowd())
    rows = rows_of(history)
    reports = Reports(history, split_sessions(history, SILENCE_S))
    counted = 0
    for t_s in bins(0, int(history.t_s[-1])):
        truth = truth_at(reports, t_s, int(history.t_s[-1]))
        if truth is None:
            continue
        counted += 1
        moment = rows.take((rows.t_s == t_s) & np.isfinite(rows.then))
        assert moment.session.tolist() == truth.candidates.tolist()
        for target, values in moment.targets().items():
            top = reports.sessions.stream[moment.session[place_of(values, moment.t_s) < 10]]
            assert set(top.tolist()) == truth.tops[target]
    assert counted > 3


def test_training_knows_nothing_beyond_the_cut_and_the_test_begins_after_it(tmp_path: Path) -> None:
    history = history_of(tmp_path, crowd())
    cut = cut_s(history)
    assert cut == int(0.7 * history.t_s[-1])
    train, test = split(rows_of(history), cut)
    assert train.t_s.max() + 900 <= cut < test.t_s.min()
    assert test.t_s.min() - cut <= 60


def rows_at(moments: list[int]) -> Rows:
    """So many candidates at minute 0, 1, … with random growth."""
    rng = np.random.default_rng(3)
    n = sum(moments)
    t_s = np.repeat(np.arange(len(moments)) * 60, moments)
    session = np.concatenate([np.arange(m) for m in moments]).astype(np.int32)
    now = rng.uniform(20, 500, n)
    return Rows(t_s, session, rng.random((n, len(OWN))).astype(np.float32), now, now * rng.uniform(0.5, 2, n),
                {"viewers_now": now})  # fmt: skip


def test_sets_hold_about_forty_of_one_moment_and_a_session_stays_with_its_set() -> None:
    rows = rows_at([35, 120, 118])
    live = deal(rows, 1, SET_SIZE)
    for chosen in np.unique(live):
        assert len(np.unique(rows.t_s[live == chosen])) == 1
    assert [len(np.unique(live[rows.t_s == t])) for t in (0, 60, 120)] == [1, 3, 3]
    second, third = (live[rows.t_s == t][:118] for t in (60, 120))
    assert (second - second.min() == third - third.min()).all()


def test_every_moment_is_a_lesson_whole_and_large_ones_dealt_too() -> None:
    assert len(lessons(rows_at([35]), 1).labels) == 35
    assert len(lessons(rows_at([35, 120]), 1).labels) == 35 + 2 * 120
    assert len(lessons(rows_at([MIN_SET - 1]), 1).labels) == 0


def test_labels_fall_around_the_tenth_place_of_the_set() -> None:
    rows = rows_at([35])
    label = lessons(rows, 1).labels[:, 0]
    place = place_of(rows.then, rows.t_s)
    assert (label[place < 10] > 0.5).all() and (label[place >= 10] <= 0.5).all()


def test_rows_without_a_truth_are_among_the_live_but_teach_nothing() -> None:
    rows = rows_at([35])
    unknown = replace(rows, then=np.where(np.arange(35) < 5, np.nan, rows.then))
    learned = lessons(unknown, 1)
    assert len(learned.labels) == 30
    assert learned.features[:, NAMES.index("live")] == pytest.approx(math.log(35))


def test_the_true_order_has_quality_one_and_its_reverse_none() -> None:
    truth, moment = np.arange(30.0), np.zeros(30, np.int64)
    best, worst = quality(truth, truth, moment), quality(-truth, truth, moment)
    assert best.overlap10.tolist() == best.ndcg10.tolist() == [1.0]
    assert worst.overlap10.tolist() == worst.ndcg10.tolist() == [0.0]


def test_quality_is_what_one_computes_by_hand() -> None:
    truth = np.array([5.0, 4.0, 3.0, *([-1.0] * 27)])
    score = np.zeros(30)
    score[[20, 1]] = 2.0, 1.0  # the truly second is second; after it places go by row: 0, 2, 3 … 9
    of = quality(score, truth, np.zeros(30, np.int64))
    # Equal truths go by row too: truly the ten are rows 0 to 9. Shown: 20, 1, 0, 2, 3 … 8.
    shown = [20, 1, 0, 2, 3, 4, 5, 6, 7, 8]
    gain = {i: (10 - i) / 10 for i in range(10)}
    reached = sum(gain.get(i, 0.0) / math.log2(place + 2) for place, i in enumerate(shown))
    ideal = sum(gain[i] / math.log2(i + 2) for i in range(10))
    assert of.overlap10.tolist() == [0.9]
    assert of.ndcg10.tolist() == pytest.approx([reached / ideal])


def test_the_interval_of_independent_differences_is_that_of_the_normal_law() -> None:
    x = np.random.default_rng(1).normal(0.1, 1.0, 400)
    half = 1.96 * x.std() / 400**0.5
    assert interval95(x, block=1) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.006)


def test_blocks_widen_the_interval_of_neighbours_that_tell_the_same() -> None:
    x = np.repeat(np.random.default_rng(1).normal(0.0, 1.0, 60), 20)
    (one_low, one_high), (low, high) = interval95(x, block=1), interval95(x, block=30)
    assert high - low > 3 * (one_high - one_low)
    # Twenty copies of sixty numbers tell as much as sixty numbers.
    assert high - low == pytest.approx(2 * 1.96 * x.std() / 60**0.5, rel=0.25)


def test_an_interval_needs_two_blocks_and_constant_differences_have_none_to_speak_of() -> None:
    assert all(math.isnan(end) for end in interval95(np.ones(59)))
    assert interval95(np.full(75, 0.25)) == pytest.approx((0.25, 0.25))


def test_a_moment_counts_with_thirty_candidates_only() -> None:
    rows = rows_at([29, 30, 45])
    assert compare(rows, np.zeros((len(rows), 3), np.float32)).moments == 2
    few = rows_at([29])
    with pytest.raises(ConfigError, match="no minute with 30 candidates, at most 29"):
        compare(few, np.zeros((len(few), 3), np.float32))


def test_the_rival_is_the_best_formula_and_equal_orders_differ_by_nothing() -> None:
    rows = rows_at([40] * 60)
    rows = replace(rows, formulas={"good": rows.then, "bad": -rows.then})
    scores = np.repeat(rows.then[:, None], 3, axis=1).astype(np.float32)
    outcome = compare(rows, scores)
    assert outcome.best("viewers", "overlap10") == outcome.best("viewers", "ndcg10") == "good"
    assert outcome.differences["viewers"]["good"].overlap10_ci95 == (0.0, 0.0)
    assert outcome.differences["viewers"]["bad"].overlap10 == 1.0
