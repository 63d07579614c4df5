"""The GPU's slates against the eager reference: exact where cosines are exact, else valid within the tolerance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import kernels.slate_gpu
from kernels.idmap import id_words
from kernels.slate import Outcome, Slates, _EagerGreedy, select_slates_reference
from kernels.slate_gpu import select_slates
from tests.device import empty, get, put
from tests.parity.test_slate import as_ids, assert_same, plain, problems, slate_of

EXPLORABLE, ANOTHER_BIT = 1 << 5, 1 << 2


def on_device(problem: dict[str, Any]) -> Slates:
    """`select_slates` of a problem of the CPU's tests."""
    p = problem
    batch, width = p["slots"].shape
    places = int(p["limits"].max(initial=0)) + p["reserve"]
    sources = np.where(p["explorable"], EXPLORABLE, 0) | ANOTHER_BIT
    out = {
        "picks": empty((batch, places), torch.int32),
        "exploration": empty((batch, places), torch.float32),
        "n_slate": empty((batch,), torch.int32),
        "n_reserve": empty((batch,), torch.int32),
        "outcome": empty((batch, width), torch.uint8),
    }
    select_slates(
        put(p["slots"]), put(p["utility"]), put(sources.astype(np.int32)), put(p["creators"]), put(p["categories"]),
        put(p["embeddings"]), put(id_words(p["ids"])), put(p["limits"]), put(p["explore_slots"]), put(p["seeds"]),
        put(p["creator_caps"]), put(p["category_caps"]), put(p["diversity"]), p["reserve"],
        explorable_bit=EXPLORABLE, order=empty((batch, width), torch.int64), **out,
    )  # fmt: skip
    return Slates(**{name: get(tensor) for name, tensor in out.items()})


def expected(problem: dict[str, Any]) -> Slates:
    """The reference's slates; nothing for rows with limit 0, which are padding on the device."""
    slates = select_slates_reference(**problem)
    padding = problem["limits"] == 0
    slates.picks[padding], slates.exploration[padding] = -1, 0
    slates.n_slate[padding], slates.n_reserve[padding] = 0, 0
    slates.outcome[padding] = Outcome.PADDING
    return slates


def assert_valid(problem: dict[str, Any], slates: Slates, tolerance: float) -> None:
    """Follows the choices of ``slates``: each greedy one must be within ``tolerance`` of the best value then."""
    p = problem
    for b in range(len(p["limits"])):
        valid = np.flatnonzero(p["slots"][b] >= 0)
        row, at = p["slots"][b, valid], {int(candidate): i for i, candidate in enumerate(valid)}
        worth = np.where(np.isfinite(p["utility"][b, valid]), p["utility"][b, valid], np.float32(-np.inf))
        greedy = _EagerGreedy(
            worth, [p["ids"][slot].tobytes() for slot in row], p["creators"][row], p["categories"][row],
            p["embeddings"][row], int(p["creator_caps"][b]), int(p["category_caps"][b]), p["diversity"][b],
        )  # fmt: skip
        n, m = slates.n_slate[b], slates.n_reserve[b]
        chosen, spare = slates.picks[b, :n], slates.picks[b, n : n + m]
        by_chance = slates.exploration[b, :n] > 0
        places = min(p["explore_slots"][b], p["limits"][b], p["explorable"][b, valid].sum())
        best_first, drawn = chosen[~by_chance], chosen[by_chance]
        before = p["limits"][b] - places
        turns = [(c, 0.0) for c in best_first[:before]]
        turns += [(c, slates.exploration[b, np.flatnonzero(chosen == c)[0]]) for c in drawn]
        turns += [(c, 0.0) for c in (*best_first[before:], *spare)]
        for candidate, chance in turns:
            i = at[int(candidate)]
            allowed = greedy.allowed()
            assert allowed[i]
            if chance:
                pool = allowed & p["explorable"][b, valid]
                assert pool[i] and chance == np.float32(1 / pool.sum())
            else:
                values = worth.astype(np.float64) - float(p["diversity"][b]) * greedy._penalty.astype(np.float64)
                assert values[i] >= values[allowed].max() - tolerance, "not the best, and not for rounding"
            greedy.choose(i)
        assert n + m == min(p["limits"][b] + p["reserve"], n + m + greedy.allowed().sum())


@pytest.fixture(params=["all in the head", "most behind it"])
def _embeddings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both places that embeddings may have during the choice."""
    if request.param == "most behind it":
        monkeypatch.setattr(kernels.slate_gpu, "_HELD_FLOATS", 0)  # then the head is the least, 16 lanes


@settings(max_examples=40, deadline=None)
@given(problems())
def test_slates_on_the_device_equal_the_reference(problem: dict[str, Any]) -> None:
    assert_same(on_device(problem), expected(problem))


@pytest.mark.usefixtures("_embeddings")
@pytest.mark.parametrize("diversity", [0.0, 0.3])
def test_slates_of_real_vectors_equal_the_reference_or_differ_by_rounding(diversity: float) -> None:
    rng = np.random.default_rng(7)
    rows, width, batch, dim = 400, 90, 2, 24
    embeddings = rng.standard_normal((rows, dim)) + 2 * rng.standard_normal((12, dim))[rng.integers(0, 12, rows)]
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    embeddings[rng.random(rows) < 0.1] = 0
    slots = np.stack([rng.permutation(rows)[:width] for _ in range(batch)]).astype(np.int32)
    problem = {
        "slots": np.where(rng.random(slots.shape) < 0.1, -1, slots).astype(np.int32),
        "utility": rng.standard_normal((batch, width)).astype(np.float32),
        "explorable": rng.random((batch, width)) < 0.2,
        "creators": rng.integers(0, 60, rows).astype(np.int32),
        "categories": rng.integers(0, 9, rows).astype(np.int32),
        "embeddings": embeddings.astype(np.float32),
        "ids": as_ids([b"stream-%06d" % row for row in rng.permutation(rows)]),
        "limits": np.array([8, 12], np.int32),
        "explore_slots": np.array([3, 5], np.int32),
        "seeds": np.array([1, 2**64 - 1], np.uint64),
        "creator_caps": np.array([1, 3], np.int32),
        "category_caps": np.array([4, 90], np.int32),
        "diversity": np.full(batch, diversity, np.float32),
        "reserve": 5,
    }
    got = on_device(problem)
    if diversity == 0 or (got.picks == expected(problem).picks).all():
        assert_same(got, expected(problem))
    assert_valid(problem, got, tolerance=diversity * dim / 2 * 2**-23)
    assert_valid(problem, expected(problem), tolerance=1e-9)  # the judge accepts the reference itself


@pytest.mark.usefixtures("_embeddings")
def test_exact_ties_of_duplicates_go_by_id() -> None:
    rng = np.random.default_rng(3)
    rows, width = 40, 40
    vectors = np.array([[1, 0, 0, 0, 0], [0, 0.6, 0.8, 0, 0], [0, 0, 0, 0, 0]], np.float32)
    names = [b"a-common-prefix-longer-than-a-word-%03d" % row for row in rng.permutation(rows)]
    problem = plain(
        [1.0] * width,
        embeddings=vectors[rng.integers(0, 3, rows)],
        ids=as_ids(names),
        diversity=np.array([0.25], np.float32),
        limits=np.array([20], np.int32),
        reserve=6,
    )
    problem["utility"][0, ::3] = 0.75  # equals 1.0 less the penalty of a duplicate
    assert_same(on_device(problem), expected(problem))


@pytest.mark.usefixtures("_embeddings")
def test_non_finite_embeddings_do_not_reach_a_slate_that_others_can_fill() -> None:
    vectors = np.eye(6, dtype=np.float32)
    vectors[1, 0], vectors[2, 0], vectors[3, 0] = np.nan, np.inf, -np.inf
    problem = plain(
        [6.0, 5.0, 4.0, 3.0, 2.0, 1.0],
        embeddings=vectors,
        diversity=np.array([0.5], np.float32),
        limits=np.array([4], np.int32),
        reserve=1,
    )
    with np.errstate(invalid="ignore"):
        assert_same(on_device(problem), expected(problem))


def test_non_finite_utilities_come_last_and_negative_zero_equals_zero() -> None:
    problem = plain([float("inf"), -0.0, float("nan"), 0.0, float("-inf"), -1.0])
    got = on_device(problem)
    assert slate_of(got) == [1, 3, 5, 0, 2, 4]
    assert_same(got, expected(problem))


def test_a_row_with_limit_0_is_padding_and_gets_nothing() -> None:
    problem = plain([1.0, 2.0], limits=np.array([0], np.int32), reserve=2)
    got = on_device(problem)
    assert (got.n_slate[0], got.n_reserve[0]) == (0, 0)
    assert got.picks.tolist() == [[-1, -1]] and got.outcome.tolist() == [[Outcome.PADDING] * 2]


def test_every_block_of_a_wide_row_finds_its_order() -> None:
    rng = np.random.default_rng(5)
    width = 130  # three blocks of the ordering kernel
    problem = plain(rng.integers(0, 9, width).astype(np.float32).tolist(), reserve=3)
    problem["limits"] = np.array([12], np.int32)
    problem["slots"][0, rng.permutation(width)[:20]] = -1
    problem["ids"] = as_ids([b"%04d" % row for row in rng.permutation(width)])
    assert_same(on_device(problem), expected(problem))


@pytest.mark.parametrize(
    ("name", "bad"),
    [("utility", torch.zeros((1, 3))), ("id_words", torch.zeros((2, 8), dtype=torch.int32)), ("reserve", 9)],
)
def test_a_wrong_argument_is_named(name: str, bad: Any) -> None:
    integers, longs = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    good: dict[str, Any] = {
        "slots": torch.zeros((1, 2), dtype=torch.int32), "utility": torch.zeros((1, 2)),
        "sources": torch.zeros((1, 2), dtype=torch.int32), "creators": torch.zeros(2, dtype=torch.int32),
        "categories": torch.zeros(2, dtype=torch.int32), "embeddings": torch.zeros((2, 4)),
        "id_words": torch.zeros((2, 8), dtype=torch.int64), "limits": integers, "explore_slots": integers,
        "seeds": longs, "creator_caps": integers, "category_caps": integers, "diversity": torch.zeros(1),
        "reserve": 0, "explorable_bit": 1, "order": torch.zeros((1, 2), dtype=torch.int64),
        "picks": torch.zeros((1, 4), dtype=torch.int32), "exploration": torch.zeros((1, 4)), "n_slate": integers,
        "n_reserve": integers, "outcome": torch.zeros((1, 2), dtype=torch.uint8),
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"^{name}:"):
        select_slates(**{**good, name: bad})
