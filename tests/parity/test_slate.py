"""Slate selection: the lazy kernel equals the eager reference, and the promises of both."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.slate import Outcome, Slates, select_slates, select_slates_reference

DIM = 3
UTILITIES = st.one_of(
    st.integers(-4, 4).map(lambda n: n / 4),  # many ties
    st.floats(-2, 2, width=32),
    st.sampled_from([float("nan"), float("inf"), float("-inf"), -0.0]),
)


def as_ids(names: list[bytes]) -> Any:
    ids = np.zeros((len(names), 64), np.uint8)
    for row, name in enumerate(names):
        ids[row, : len(name)] = np.frombuffer(name, np.uint8)
    return ids


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    rows = draw(st.integers(1, 14))
    batch, width = draw(st.integers(0, 3)), draw(st.integers(0, 14))
    names = draw(st.lists(st.binary(min_size=1, max_size=3), min_size=rows, max_size=rows, unique=True))
    names = [name.replace(b"\0", b"\1") + bytes([row + 1]) for row, name in enumerate(names)]

    def ints(low: int, high: int, size: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=size, max_size=size))

    slots = np.full((batch, width), -1, np.int32)
    for b in range(batch):
        found = draw(st.lists(st.integers(0, rows - 1), unique=True, max_size=width))
        found += [-1] * (width - len(found))
        slots[b] = draw(st.permutations(found))
    cells = batch * width
    # Whole-number vectors: their products tie exactly and are exact in every order of summation.
    return {
        "slots": slots,
        "utility": np.array(draw(st.lists(UTILITIES, min_size=cells, max_size=cells)), np.float32).reshape(slots.shape),
        "explorable": np.array(ints(0, 1, cells), np.bool_).reshape(slots.shape),
        "creators": np.array(ints(0, 4, rows), np.int32),
        "categories": np.array(ints(0, 2, rows), np.int32),
        "embeddings": np.array(ints(-1, 1, rows * DIM), np.float32).reshape(rows, DIM),
        "ids": as_ids(names),
        "limits": np.array(ints(0, 8, batch), np.int32),
        "explore_slots": np.array(ints(0, 4, batch), np.int32),
        "seeds": np.array(ints(0, 2**64 - 1, batch), np.uint64),
        "creator_caps": np.array(ints(1, 4, batch), np.int32),
        "category_caps": np.array(ints(1, 6, batch), np.int32),
        "diversity": np.array(ints(0, 4, batch), np.float32) / np.float32(4),
        "reserve": draw(st.integers(0, 4)),
    }


def assert_same(one: Slates, other: Slates) -> None:
    for name in ("picks", "exploration", "n_slate", "n_reserve", "outcome"):
        got, wanted = getattr(one, name), getattr(other, name)
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted, err_msg=name)


def plain(utility: list[float], **changed: Any) -> dict[str, Any]:
    """One row whose candidate i is slot i, each of its own creator, unknown category, no embedding."""
    rows = len(utility)
    problem: dict[str, Any] = {
        "slots": np.arange(rows, dtype=np.int32)[None],
        "utility": np.array([utility], np.float32),
        "explorable": np.zeros((1, rows), np.bool_),
        "creators": np.arange(rows, dtype=np.int32),
        "categories": np.zeros(rows, np.int32),
        "embeddings": np.zeros((rows, DIM), np.float32),
        "ids": as_ids([b"%04d" % row for row in range(rows)]),
        "limits": np.array([rows], np.int32),
        "explore_slots": np.array([0], np.int32),
        "seeds": np.array([1], np.uint64),
        "creator_caps": np.array([rows], np.int32),
        "category_caps": np.array([rows], np.int32),
        "diversity": np.array([0], np.float32),
        "reserve": 0,
    }
    return {**problem, **changed}


def slate_of(slates: Slates, b: int = 0) -> list[int]:
    return slates.picks[b, : slates.n_slate[b]].tolist()


@settings(max_examples=300, deadline=None)
@given(problems())
def test_lazy_kernel_equals_eager_reference(problem: dict[str, Any]) -> None:
    assert_same(select_slates(**problem), select_slates_reference(**problem))


@pytest.mark.parametrize(
    ("diversity", "dim", "levels", "noise"),
    [
        (0.0, 32, 0, 1.0), (0.2, 32, 0, 1.0), (0.2, 64, 0, 1.0), (1.0, 64, 0, 1.0), (0.2, 64, 3, 1.0),
        (0.0, 64, 1, 1.0), (0.3, 50, 0, 1.0), (0.9, 64, 2, 1e-5), (0.3, 64, 1, 1e-5), (0.9, 50, 2, 1e-7),
        (0.9, 64, 1, 0.0),
    ],
)  # fmt: skip
def test_lazy_kernel_equals_eager_reference_at_full_size(diversity: float, dim: int, levels: int, noise: float) -> None:
    """``levels``: how many different utilities there are; 0: all are. A little ``noise`` makes embeddings that float32
    sums cannot tell apart."""
    rng = np.random.default_rng(7)
    rows, width, batch = 3000, 400, 3
    embeddings = (
        noise * rng.standard_normal((rows, dim)) + 2 * rng.standard_normal((12, dim))[rng.integers(0, 12, rows)]
    )
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    embeddings[rng.random(rows) < 0.1] = 0
    problem = {
        "slots": np.stack([rng.permutation(rows)[:width] for _ in range(batch)]).astype(np.int32),
        "utility": (rng.integers(0, levels, (batch, width)) if levels else rng.standard_normal((batch, width))).astype(
            np.float32
        ),
        "explorable": rng.random((batch, width)) < 0.2,
        "creators": rng.integers(0, 200, rows).astype(np.int32),
        "categories": rng.integers(0, 9, rows).astype(np.int32),
        "embeddings": embeddings.astype(np.float32),
        "ids": as_ids([b"stream-%06d" % row for row in rng.permutation(rows)]),
        "limits": np.array([50, 30, 70], np.int32),
        "explore_slots": np.array([3, 0, 5], np.int32),
        "seeds": np.array([1, 2, 3], np.uint64),
        "creator_caps": np.array([1, 2, 3], np.int32),
        "category_caps": np.array([8, 6, 90], np.int32),
        "diversity": np.full(batch, diversity, np.float32),
        "reserve": 20,
    }
    assert_same(select_slates(**problem), select_slates_reference(**problem))


@settings(max_examples=200, deadline=None)
@given(problems())
def test_every_candidate_has_one_outcome_and_none_is_lost(problem: dict[str, Any]) -> None:
    slates = select_slates(**problem)
    for b in range(len(problem["limits"])):
        offered = set(np.flatnonzero(problem["slots"][b] >= 0).tolist())
        outcome = slates.outcome[b]
        assert set(np.flatnonzero(outcome != Outcome.PADDING).tolist()) == offered
        n_slate, n_reserve = slates.n_slate[b], slates.n_reserve[b]
        kept = slates.picks[b, : n_slate + n_reserve].tolist()
        assert len(set(kept)) == len(kept)
        assert (slates.picks[b, n_slate + n_reserve :] == -1).all()
        by_chance = slates.exploration[b, :n_slate] > 0
        assert (outcome[kept[:n_slate]] == np.where(by_chance, Outcome.EXPLORATION, Outcome.SLATE)).all()
        assert (outcome[kept[n_slate:]] == Outcome.RESERVE).all()
        removed = np.isin(outcome, [Outcome.CREATOR_CAP, Outcome.CATEGORY_CAP, Outcome.BELOW_LIMIT]).sum()
        assert len(kept) + removed == len(offered)


@settings(max_examples=200, deadline=None)
@given(problems())
def test_slate_and_reserve_together_stay_within_the_caps(problem: dict[str, Any]) -> None:
    slates = select_slates(**problem)
    for b in range(len(problem["limits"])):
        kept = slates.picks[b][slates.picks[b] >= 0]
        chosen = problem["slots"][b, kept]
        creators = Counter(problem["creators"][chosen].tolist())
        categories = Counter(problem["categories"][chosen].tolist())
        del categories[0]
        assert max(creators.values(), default=0) <= problem["creator_caps"][b]
        assert max(categories.values(), default=0) <= problem["category_caps"][b]


@settings(max_examples=100, deadline=None)
@given(problems(), st.randoms(use_true_random=False))
def test_the_order_of_candidates_does_not_matter(problem: dict[str, Any], random: Any) -> None:
    before = select_slates(**problem)
    order = list(range(problem["slots"].shape[1]))
    random.shuffle(order)
    shuffled = {name: np.ascontiguousarray(problem[name][:, order]) for name in ("slots", "utility", "explorable")}
    after = select_slates(**{**problem, **shuffled})
    for b in range(len(problem["limits"])):
        n = before.n_slate[b] + before.n_reserve[b]
        chosen_before = problem["slots"][b, before.picks[b, :n]]
        chosen_after = shuffled["slots"][b, after.picks[b, :n]]
        np.testing.assert_array_equal(chosen_before, chosen_after)
        np.testing.assert_array_equal(before.exploration[b], after.exploration[b])


def test_non_finite_utilities_come_after_every_finite_one_in_order_of_id() -> None:
    problem = plain([float("inf"), -3.0, float("nan"), 1.0, float("-inf")])
    assert slate_of(select_slates(**problem)) == [3, 1, 0, 2, 4]


def test_equal_values_go_by_id() -> None:
    problem = plain([1.0, 1.0, 1.0], ids=as_ids([b"b", b"ab", b"a"]))
    assert slate_of(select_slates(**problem)) == [2, 1, 0]


def test_values_that_tie_only_after_the_penalty_go_by_id() -> None:
    same = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0]], np.float32)
    problem = plain(
        [2.0, 1.5, 1.0],
        embeddings=same,
        diversity=np.array([0.5], np.float32),
        ids=as_ids([b"a", b"c", b"b"]),
    )
    assert slate_of(select_slates(**problem)) == [0, 2, 1]


def test_diversity_moves_a_near_duplicate_back() -> None:
    vectors = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0]], np.float32)
    problem = plain([1.0, 0.9, 0.8], embeddings=vectors)
    assert slate_of(select_slates(**problem)) == [0, 1, 2]
    assert slate_of(select_slates(**{**problem, "diversity": np.array([0.5], np.float32)})) == [0, 2, 1]


def test_caps_are_named_as_the_reason_and_unknown_category_is_never_capped() -> None:
    problem = plain(
        [6.0, 5.0, 4.0, 3.0, 2.0, 1.0],
        creators=np.array([1, 1, 2, 3, 4, 5], np.int32),
        categories=np.array([7, 0, 7, 0, 0, 8], np.int32),
        creator_caps=np.array([1], np.int32),
        category_caps=np.array([1], np.int32),
        limits=np.array([3], np.int32),
    )
    slates = select_slates(**problem)
    assert slate_of(slates) == [0, 3, 4]
    assert slates.outcome[0].tolist() == [
        Outcome.SLATE, Outcome.CREATOR_CAP, Outcome.CATEGORY_CAP, Outcome.SLATE, Outcome.SLATE,
        Outcome.BELOW_LIMIT,
    ]  # fmt: skip


def test_exploration_stands_at_even_places_with_its_propensity() -> None:
    problem = plain(
        [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0],
        explorable=np.arange(10)[None] >= 6,
        explore_slots=np.array([2], np.int32),
        limits=np.array([6], np.int32),
        reserve=2,
    )
    slates = select_slates(**problem)
    np.testing.assert_allclose(slates.exploration[0], [0, 0, 1 / 4, 0, 1 / 3, 0, 0, 0])
    assert [p for i, p in enumerate(slate_of(slates)) if i not in (2, 4)] == [0, 1, 2, 3]
    assert {slates.picks[0, 2], slates.picks[0, 4]} < {6, 7, 8, 9}
    assert slates.picks[0, 6:].tolist() == [4, 5]


def test_draws_are_uniform_over_seeds() -> None:
    draws = 4000
    problem = plain([5.0, 4.0, 3.0, 2.0, 1.0])
    problem["explorable"] = np.arange(5)[None] >= 1
    for name in ("slots", "utility", "explorable"):
        problem[name] = np.repeat(problem[name], draws, axis=0)
    for name in ("creator_caps", "category_caps", "diversity"):
        problem[name] = np.repeat(problem[name], draws)
    problem["limits"], problem["explore_slots"] = np.full(draws, 2, np.int32), np.full(draws, 1, np.int32)
    problem["seeds"] = np.arange(draws, dtype=np.uint64)
    slates = select_slates(**problem)
    drawn = slates.picks[slates.exploration > 0]
    assert drawn.size == draws
    share = np.bincount(drawn, minlength=5)[1:] / draws
    np.testing.assert_allclose(share, 0.25, atol=0.03)  # over four standard deviations


def test_a_place_nobody_can_explore_goes_back_to_greedy() -> None:
    problem = plain(
        [4.0, 3.0, 2.0, 1.0],
        creators=np.array([1, 2, 1, 3], np.int32),
        creator_caps=np.array([1], np.int32),
        explorable=np.array([[False, False, True, False]]),  # of a creator that greedy takes first
        explore_slots=np.array([1], np.int32),
        limits=np.array([3], np.int32),
    )
    slates = select_slates(**problem)
    assert slate_of(slates) == [0, 1, 3]
    assert (slates.exploration == 0).all()


def test_slates_are_short_when_candidates_run_out_and_empty_when_there_are_none() -> None:
    short = select_slates(**plain([1.0, 2.0], limits=np.array([5], np.int32), reserve=3))
    assert (slate_of(short), short.n_reserve[0], short.picks.shape) == ([1, 0], 0, (1, 8))
    none = select_slates(**plain([1.0], slots=np.array([[-1]], np.int32)))
    assert (none.n_slate[0], none.outcome[0, 0]) == (0, Outcome.PADDING)


@pytest.mark.parametrize("select", [select_slates, select_slates_reference])
@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("slots", np.array([[0, 2]], np.int32)),
        ("slots", np.array([[0, -2]], np.int32)),
        ("utility", np.zeros((1, 2), np.float64)),
        ("explorable", np.zeros((1, 3), np.bool_)),
        ("categories", np.zeros(3, np.int32)),
        ("embeddings", np.zeros((3, DIM), np.float32)),
        ("ids", np.zeros((2, 63), np.uint8)),
        ("limits", np.array([-1], np.int32)),
        ("explore_slots", np.array([-1], np.int32)),
        ("seeds", np.array([1], np.int64)),
        ("creator_caps", np.array([0], np.int32)),
        ("category_caps", np.array([0], np.int32)),
        ("diversity", np.array([-0.1], np.float32)),
        ("diversity", np.array([np.nan], np.float32)),
        ("reserve", -1),
    ],
)
def test_bad_argument_is_refused_by_name(select: Any, name: str, bad: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}:"):
        select(**{**plain([1.0, 2.0]), name: bad})


def test_the_reference_refuses_a_slot_twice() -> None:
    with pytest.raises(ValueError, match=r"^slots: row 0"):
        select_slates_reference(**plain([1.0, 2.0], slots=np.array([[1, 1]], np.int32)))
