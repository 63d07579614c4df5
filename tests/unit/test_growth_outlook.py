"""From what may become of each stream to the order of a moment, and what the nets make small."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from loadtest.replay.growth import MIN_VIEWERS, TARGETS, TOP
from models.growth.features import SOFTENER
from models.growth.labels import place_of
from models.growth.outlook import PARTS, Outlook, marks, scores, swing

SEEDS = st.integers(0, 10_000)


def random_answer(rng: np.random.Generator, n: int, m: int = 4) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """What nets could say about n streams, and their viewers."""
    weight = rng.dirichlet(np.ones(m), n)
    centre, log_spread = rng.normal(0, 1.5, (n, m)), rng.uniform(-3, 1, (n, m))
    now = np.floor(MIN_VIEWERS * np.exp(rng.exponential(1.5, n)))
    return np.stack([weight, centre, log_spread], axis=1).astype(np.float32), now


def outlook_of(answer: NDArray[np.float32], now: NDArray[np.float64]) -> Outlook:
    return Outlook(*np.moveaxis(answer.astype(np.float64), 1, 0), now)


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_the_chances_of_a_moment_add_up_to_its_top_ten(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 60, 4)
    moment = np.repeat([9, 4, 7, 5], sizes)
    found = scores(*random_answer(rng, len(moment)), moment).astype(np.float64)
    for at in range(len(TARGETS)):
        for t, size in zip((9, 4, 7, 5), sizes):
            chances = 1 / (1 + np.exp(-found[moment == t, at]))
            assert chances.sum() == pytest.approx(min(TOP, size / 2), abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_scores_of_a_moment_do_not_depend_on_other_moments(seed: int) -> None:
    rng = np.random.default_rng(seed)
    answer, now = random_answer(rng, 70)
    moment = rng.integers(0, 3, 70)
    alone = moment == moment[0]
    np.testing.assert_array_equal(scores(answer, now, moment)[alone], scores(answer[alone], now[alone], moment[alone]))


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_where_all_is_sure_the_top_ten_is_the_one_that_comes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 40
    _, now = random_answer(rng, n)
    then = np.floor(now * rng.uniform(0.2, 3.0, n)) + rng.permutation(n) / n
    sure = np.stack([np.ones(n), swing(then - now, now), np.full(n, -20.0)], axis=1)[:, :, None]
    found = scores(sure, now, np.zeros(n, np.int64))
    for at, truth in enumerate((then, then - now, then / now - 1)):
        top = place_of(truth, np.zeros(n, np.int64)) < TOP
        assert found[top, at].min() > found[~top, at].max()


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_of_two_streams_of_one_size_the_one_that_may_grow_more_is_first_for_every_target(seed: int) -> None:
    rng = np.random.default_rng(seed)
    answer, now = random_answer(rng, 30)
    answer[1], now[1] = answer[0], now[0]
    answer[1, 1] += 0.1
    found = scores(answer, now, np.zeros(30, np.int64))
    assert (found[1] > found[0]).all()


def test_the_same_growth_is_more_for_a_small_stream_in_relative_terms_alone() -> None:
    now = np.array([50.0, 5_000.0] * 20)
    growth = np.full(40, 30.0)
    answer = np.stack([np.ones(40), swing(growth, now), np.full(40, -1.0)], axis=1)[:, :, None]
    viewers, absolute, relative = scores(answer, now, np.zeros(40, np.int64)).T
    assert relative[0] > relative[1] and viewers[1] > viewers[0]
    assert absolute[0] < 0.5  # the mark is near what all are expected to gain, ten of forty more than that


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_the_chance_is_how_often_a_stream_so_described_passes_the_mark(seed: int) -> None:
    rng = np.random.default_rng(seed)
    answer, now = random_answer(rng, 25)
    outlook = outlook_of(answer, now)
    mark = marks(outlook, "absolute_growth", np.zeros(25, np.int64))[0]
    draws = 20_000
    part = (rng.random((draws, 1, 1)) > np.cumsum(outlook.weight, axis=1)).sum(axis=2)
    part = np.minimum(part, 3)
    centre, log_spread = (np.take_along_axis(of, part.T, axis=1) for of in (outlook.centre, outlook.log_spread))
    drawn = np.sinh(centre + np.exp(log_spread) * rng.logistic(size=centre.shape)) * np.sqrt(now + SOFTENER)[:, None]
    np.testing.assert_allclose((drawn > mark).mean(axis=1), outlook.chance(now + mark), atol=0.02)


def test_what_is_nearly_sure_keeps_its_order() -> None:
    answer = np.stack([np.ones(3), np.zeros(3), np.full(3, -3.0)], axis=1)[:, :, None]
    outlook = outlook_of(answer, np.array([1e6, 2e6, 4e6]))
    assert (outlook.chance(np.full(3, 1e3)) == 1.0).all()
    odds = outlook.log_odds(np.full(3, 1e3))
    assert np.isfinite(odds).all() and (np.diff(odds) > 0).all()


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_what_is_made_small_is_the_density_that_the_chances_are_of(seed: int) -> None:
    torch = pytest.importorskip("torch")
    from models.growth.outlook_net import MIXED, Outlooks, surprise

    class Said(torch.nn.Module):
        def forward(self, own: object) -> object:
            return answer

    rng = np.random.default_rng(seed)
    answer = torch.from_numpy(rng.normal(0, 1, (1, PARTS * MIXED)).astype(np.float32))
    said = Outlooks([Said(), Said()])(None).numpy()
    assert said.shape == (1, PARTS, 2 * MIXED)
    swings = np.linspace(-4, 4, 101)
    density = [float(torch.exp(-surprise(answer, torch.tensor([u])))) for u in swings.tolist()]
    now = np.full(101, 100.0)
    outlook, root, step = outlook_of(np.repeat(said, 101, axis=0), now), np.sqrt(now + SOFTENER), 1e-4
    below, above = (outlook.chance(now + np.sinh(swings + to) * root) for to in (-step, step))
    np.testing.assert_allclose(density, (below - above) / (2 * step), rtol=1e-3, atol=1e-5)
