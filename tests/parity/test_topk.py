"""Masked top-k: the blocked search equals scoring and sorting every row, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import topk
from kernels.topk import (
    masked_topk,
    masked_topk_reference,
    rescore_topk,
    rescore_topk_reference,
    rounding_errors,
)

Search = dict[str, Any]


def search(seed: int, batch: int, rows: int, dim: int, masks: int, share: float, k: int) -> Search:
    rng = np.random.default_rng(seed)
    return {
        "queries": rng.standard_normal((batch, dim)).astype(np.float32),
        "table": rng.standard_normal((rows, dim)).astype(np.float32),
        "eligible": rng.random((masks, rows)) < share,
        "mask_of": rng.integers(0, masks, batch).astype(np.int32),
        "k": k,
    }


def assert_same_as_reference(problem: Search) -> None:
    slots, scores = masked_topk(**problem)
    wanted_slots, wanted_scores = masked_topk_reference(**problem)
    np.testing.assert_array_equal(slots, wanted_slots)
    np.testing.assert_array_equal(scores, wanted_scores)
    assert (slots.dtype, scores.dtype) == (np.int32, np.float32)


@st.composite
def searches(draw: st.DrawFn) -> Search:
    batch, rows, dim = draw(st.integers(0, 4)), draw(st.integers(0, 40)), draw(st.integers(1, 11))
    problem = search(
        draw(st.integers(0, 2**32)), batch, rows, dim, draw(st.integers(1, 3)),
        draw(st.sampled_from([0.0, 0.3, 1.0])), draw(st.integers(1, 50)),
    )  # fmt: skip
    if draw(st.booleans()):  # heavy ties
        problem["table"] = np.sign(problem["table"])
        problem["queries"] = np.round(problem["queries"])
    if rows and draw(st.booleans()):
        spoilt = draw(st.lists(st.integers(0, rows - 1), max_size=8, unique=True))
        for row in spoilt:
            value = draw(st.sampled_from([np.nan, np.inf, -np.inf, 3e38]))
            problem["table"][row, draw(st.integers(0, dim - 1))] = value
    return problem


@settings(max_examples=200, deadline=None)
@given(searches())
def test_small_searches_equal_the_reference(problem: Search) -> None:
    assert_same_as_reference(problem)


@pytest.mark.parametrize(
    "shape",  # batch, rows, dim, masks, share eligible, k
    [
        (1, 20_000, 64, 1, 0.6, 500),
        (9, 20_000, 64, 3, 0.6, 100),
        (3, 9_000, 37, 1, 1.0, 1),
        (3, 9_000, 16, 2, 0.01, 500),  # k exceeds the eligible rows
        (2, 5_000, 16, 1, 0.9, 4_000),  # k near the number of rows
        (2, 3_000, 16, 1, 0.9, 10_000),  # k exceeds the rows
        (2, 30_000, 8, 1, 0.0, 50),  # nothing eligible
    ],
)
def test_blocked_searches_equal_the_reference(shape: tuple[Any, ...]) -> None:
    assert_same_as_reference(search(5, *shape))


def test_all_equal_scores_return_the_lowest_eligible_slots() -> None:
    problem = search(1, 3, 15_000, 24, 2, 0.5, 300)
    problem["table"][:] = problem["table"][0]
    slots, _ = masked_topk(**problem)
    for b, mask in enumerate(problem["mask_of"]):
        np.testing.assert_array_equal(slots[b], np.flatnonzero(problem["eligible"][mask])[:300])


def test_duplicates_of_few_rows_tie_by_slot_wherever_they_stand() -> None:
    problem = search(2, 4, 20_001, 29, 1, 0.7, 400)
    problem["table"] = problem["table"][np.random.default_rng(3).integers(0, 30, 20_001)]
    assert_same_as_reference(problem)


def test_answer_of_a_query_does_not_depend_on_its_batch() -> None:
    problem = search(4, 8, 20_000, 48, 2, 0.6, 200)
    slots, scores = masked_topk(**problem)
    for b in range(8):
        alone = {
            **problem,
            "queries": problem["queries"][b : b + 1],
            "mask_of": problem["mask_of"][b : b + 1],
        }
        alone_slots, alone_scores = masked_topk(**alone)
        np.testing.assert_array_equal(alone_slots[0], slots[b])
        np.testing.assert_array_equal(alone_scores[0], scores[b])


def test_a_sampled_floor_that_was_too_high_is_found_out_and_searched_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The sampled rows are the only good ones, so the sample promises far more than there is."""
    problem = search(6, 3, 24_000, 16, 1, 1.0, 600)
    stride = topk._stride(24_000)
    problem["table"] = (0.01 * problem["table"]).astype(np.float32)
    problem["table"][::stride] *= 1000
    problem["queries"] = np.abs(problem["queries"])
    problem["table"][::stride] = np.abs(problem["table"][::stride])
    problem["eligible"][0, ::stride][350:] = False
    problem["k"] = 600
    runs = []
    original = topk._search

    def counted(*args: Any) -> Any:
        runs.append(args[0].shape[0])
        return original(*args)

    monkeypatch.setattr(topk, "_search", counted)
    assert_same_as_reference(problem)
    assert len(runs) == 2


def test_a_sample_that_sees_nothing_good_still_gives_the_exact_answer() -> None:
    """Good rows everywhere but in the sample: the floor is low, the buffer fills and is cut."""
    problem = search(7, 2, 24_000, 16, 1, 1.0, 500)
    problem["queries"] = np.abs(problem["queries"])
    problem["table"] = np.abs(problem["table"])
    problem["table"][:: topk._stride(24_000)] *= -1
    assert_same_as_reference(problem)


def test_rising_scores_cut_the_buffer_again_and_again_and_stay_exact() -> None:
    problem = search(8, 2, 24_000, 4, 1, 0.9, 50)
    problem["table"] = np.linspace(-1, 1, 24_000, dtype=np.float32)[:, None].repeat(4, axis=1)
    problem["table"][:: topk._stride(24_000)] = -2
    problem["queries"] = np.abs(problem["queries"])
    assert_same_as_reference(problem)


def test_rows_whose_product_is_not_finite_are_never_returned() -> None:
    problem = search(9, 2, 3_000, 8, 1, 1.0, 3_000)
    problem["table"][5, 2] = np.nan
    problem["table"][6, 3] = np.inf
    problem["table"][7, :] = 3e38
    problem["queries"] = np.abs(problem["queries"]) + np.float32(0.5)
    slots, scores = masked_topk(**problem)
    assert not np.isin([5, 6, 7], slots).any()
    assert (slots[:, 2_997:] == -1).all()
    assert np.isneginf(scores[:, 2_997:]).all()
    assert_same_as_reference(problem)


def test_canonical_scores_are_within_the_stated_rounding_error_of_any_float32_product() -> None:
    problem = search(10, 4, 6_000, 64, 1, 1.0, 6_000)
    slots, scores = masked_topk(**problem)
    other = problem["queries"] @ problem["table"].T
    off = np.abs(np.take_along_axis(other, slots, axis=1).astype(np.float64) - scores)
    assert (off <= rounding_errors(problem["queries"], problem["table"])[:, None]).all()


@settings(max_examples=60, deadline=None)
@given(searches(), st.randoms(use_true_random=False))
def test_rescoring_ranks_the_given_rows_as_the_search_would(problem: Search, random: Any) -> None:
    rows = problem["table"].shape[0]
    width = min(rows, 12)
    candidates = np.full((len(problem["queries"]), width), -1, np.int32)
    for row in candidates:
        row[:] = [slot if random.random() < 0.8 else -1 for slot in random.sample(range(rows), width)]
    arguments = (problem["queries"], problem["table"], candidates, problem["k"])
    for got, wanted in zip(rescore_topk(*arguments), rescore_topk_reference(*arguments), strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("function", [masked_topk, masked_topk_reference])
@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("queries", np.zeros((2, 4), np.float64)),
        ("queries", np.zeros(4, np.float32)),
        ("table", np.zeros((5, 3), np.float32)),
        ("eligible", np.ones((1, 6), np.bool_)),
        ("eligible", np.ones((1, 5), np.uint8)),
        ("mask_of", np.zeros(3, np.int32)),
        ("mask_of", np.array([0, 1], np.int32)),
        ("mask_of", np.array([0, -1], np.int32)),
        ("k", 0),
    ],
)
def test_bad_argument_is_refused_by_name(function: Any, name: str, bad: Any) -> None:
    good = {
        "queries": np.zeros((2, 4), np.float32),
        "table": np.zeros((5, 4), np.float32),
        "eligible": np.ones((1, 5), np.bool_),
        "mask_of": np.zeros(2, np.int32),
        "k": 3,
    }
    with pytest.raises(ValueError, match=f"^{name}:"):
        function(**{**good, name: bad})
