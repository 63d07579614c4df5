"""Orders, intervals and off-policy estimates, on cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from models.evaluation_ranking import best_of, bootstrap, bootstrap_mean, ndcg, recall, snips


def test_ndcg_on_examples_computed_by_hand() -> None:
    scores = np.array([3.0, 2.0, 1.0, 9.0, 5.0, 1.0])
    gains = np.array([0.0, 1.0, 2.0, 5.0, 0.0, 0.0])
    groups = np.array([7, 7, 7, 2, 2, 9])
    by_group = ndcg(scores, gains, groups)  # groups 2, 7, 9
    assert by_group[0] == 1.0
    assert by_group[1] == pytest.approx((1 / np.log2(3) + 2 / 2) / (2 + 1 / np.log2(3)))
    assert np.isnan(by_group[2])  # nothing to be gained there
    assert ndcg(scores, gains, groups, k=1)[1] == 0.0


def test_ndcg_does_not_depend_on_the_order_of_rows_and_a_better_order_is_not_worse() -> None:
    rng = np.random.default_rng(0)
    groups, gains = rng.integers(0, 40, 600), rng.integers(0, 4, 600).astype(float)
    scores, shuffled = rng.permutation(600).astype(float), rng.permutation(600)
    found = ndcg(scores, gains, groups)
    np.testing.assert_allclose(found, ndcg(scores[shuffled], gains[shuffled], groups[shuffled]))
    assert (found <= 1.0 + 1e-12).all() and (ndcg(gains, gains, groups) == pytest.approx(1.0))


def test_the_best_of_each_group_are_chosen() -> None:
    scores, groups = np.array([1.0, 3, 2, 5, 5, 5]), np.array([4, 4, 4, 0, 0, 0])
    assert best_of(scores, groups, 2).tolist() == [False, True, True, True, True, False]


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        interval = bootstrap_mean(rng.normal(0.3, 1.0, 100), 200, seed=trial)
        hits += interval.low <= 0.3 <= interval.high
    assert 175 <= hits <= 200


def test_rows_of_one_group_are_no_independent_witnesses() -> None:
    rng = np.random.default_rng(2)
    by_group = rng.normal(size=50)
    groups = np.repeat(np.arange(50), 100)
    values = by_group[groups]
    whole = bootstrap(lambda rows: float(values[rows].mean()), groups)
    careless = bootstrap(lambda rows: float(values[rows].mean()), np.arange(5_000))
    assert whole.high - whole.low > 5 * (careless.high - careless.low)
    assert whole.value == careless.value == pytest.approx(by_group.mean())
    again = bootstrap(lambda rows: float(values[rows].mean()), groups)
    assert again == whole  # seeded


def test_off_policy_estimate_finds_what_another_policy_would_have_earned() -> None:
    rng = np.random.default_rng(3)
    n, worth = 60_000, np.array([0.1, 0.5, 0.9])
    logging, other = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.1, 0.8])
    shown = rng.choice(3, n, p=logging)
    rewards = (rng.random(n) < worth[shown]).astype(float)
    logged = logging[shown].copy()
    logged[: n // 4] = 0.0  # shown on their score: they say nothing
    found = snips(rewards, logged, 5.0 * other[shown], np.arange(n))
    true = float(other @ worth)
    assert found.reward.low < true < found.reward.high
    assert abs(rewards.mean() - true) > 0.3  # which the plain mean misses
    assert 1_000 < found.effective_rows < n
    nothing = snips(rewards, np.zeros(n), other[shown], np.arange(n))
    assert np.isnan(nothing.reward.value) and nothing.effective_rows == 0.0


def test_recall_counts_wanted_streams_among_the_nearest_that_were_live() -> None:
    streams = np.eye(4)
    viewers = np.array([[4.0, 3, 2, 1], [4.0, 3, 2, 1]])
    wanted = np.array([0, 2])
    assert recall(viewers, streams, wanted, k=1).tolist() == [1.0, 0.0]
    assert recall(viewers, streams, wanted, k=3).tolist() == [1.0, 1.0]
    live = np.array([[True] * 4, [False, False, True, True]])
    assert recall(viewers, streams, wanted, live, k=1).tolist() == [1.0, 1.0]
