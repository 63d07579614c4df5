"""The reference formulas against numbers computed by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from loadtest.replay.formulas import Formulas
from loadtest.replay.growth import Reports
from loadtest.replay.reader import read_history
from loadtest.replay.sessions import split_sessions
from tests.histories import Row, broadcast, in_time, write_csv


def formulas_of(tmp_path: Path, rows: list[Row], columns: tuple[str, ...] | None = None) -> Formulas:
    rows = in_time(rows)
    path = tmp_path / "h.csv"
    history = read_history(write_csv(path, rows) if columns is None else write_csv(path, rows, columns))
    return Formulas(Reports(history, split_sessions(history, 1_200)), history.has_likes)


def test_every_formula_gives_the_number_computed_by_hand(tmp_path: Path) -> None:
    # Minutes 0 to 60: 100 viewers until minute 29, 160 from minute 30 on; 2 likes a minute.
    formulas = formulas_of(tmp_path, broadcast("a", 0, [100] * 30 + [160] * 31, likes_delta=2))
    for t_s in range(0, 2_400, 300):
        formulas.scores(t_s)
    scores = {name: float(values[0]) for name, values in formulas.scores(2_400).items()}
    likes = 41 * 2  # minutes 0 to 40
    assert scores["viewers_now"] == 160
    assert scores["viewers_change_15m"] == 60  # minute 25 had 100
    assert scores["likes_per_viewer"] == 5 * 2 / 160
    assert scores["hacker_news"] == pytest.approx((likes - 1) ** 0.8 / ((40 + 120) / 60) ** 1.8)
    assert scores["reddit_hot"] == pytest.approx(math.log10(likes))  # it began at 0
    # At minute 0 the surprise of 100 viewers after none was (100 - 1)² / 1; halved every 4 h since.
    assert scores["mastodon"] == pytest.approx(99**2 * 0.5 ** (2_400 / 14_400))
    weights = [0.5 ** (age / 5) for age in range(41)]
    now = sum(w * (160 if 40 - age >= 30 else 100) for age, w in enumerate(weights)) / sum(weights)
    assert scores["ewma_growth"] == pytest.approx(now * (1 + (now - 100) / 100))


def test_reddit_puts_the_younger_of_two_equal_streams_higher_by_a_decade_in_12_and_a_half_hours(tmp_path: Path) -> None:
    rows = broadcast("old", 0, [10] * 800) + broadcast("new", 45_000, [10] * 20)
    old, new = formulas_of(tmp_path, rows).scores(45_600)["reddit_hot"]
    assert new - old == pytest.approx(1.0)


def test_mastodon_is_nothing_below_its_threshold_and_without_growth(tmp_path: Path) -> None:
    rows = broadcast("tiny", 0, [4] * 40) + broadcast("falls", 0, [0] * 20 + [1] * 20)
    assert formulas_of(tmp_path, rows).scores(2_100)["mastodon"].tolist() == [0, 0]


def test_a_new_streams_growth_is_measured_from_the_candidates_floor(tmp_path: Path) -> None:
    score = formulas_of(tmp_path, broadcast("new", 0, [40] * 20)).scores(300)["ewma_growth"][0]
    assert score == pytest.approx(40 * (1 + 40 / 20))


def test_without_likes_the_formulas_that_need_them_are_left_out(tmp_path: Path) -> None:
    columns = ("t_folded_s", "event", "video_id", "viewers")
    names = set(formulas_of(tmp_path, broadcast("a", 0, [5, 6]), columns).scores(60))
    assert names == {"viewers_now", "viewers_change_15m", "mastodon", "ewma_growth"}
