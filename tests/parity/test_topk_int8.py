"""The int8 copy rules out only what cannot be found, and the search over it equals the reference, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import topk_int8, vectors
from kernels.int8_rows import Int8Rows, quantise_queries
from kernels.topk import canonical_inner_reference, masked_topk_reference
from kernels.topk_int8 import masked_topk_int8
from tests.parity.test_topk import Search, search, searches


def copied(table: Any, capacity: int | None = None) -> Int8Rows:
    rows = Int8Rows(max(1, capacity or len(table)), table.shape[1])
    rows.write(np.arange(len(table), dtype=np.int32), table)
    return rows


def found(problem: Search) -> topk_int8.Found:
    return masked_topk_int8(rows=copied(problem["table"]), **problem)


def assert_same_as_reference(problem: Search) -> topk_int8.Found:
    result = found(problem)
    slots, scores = masked_topk_reference(**problem)
    np.testing.assert_array_equal(result.slots, slots)
    np.testing.assert_array_equal(result.scores, scores)
    assert (result.slots.dtype, result.scores.dtype) == (np.int32, np.float32)
    return result


def of_unit_length(problem: Search) -> Search:
    for name in ("table", "queries"):
        problem[name] /= np.linalg.norm(problem[name], axis=1, keepdims=True)
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
        (17, 30_000, 64, 2, 1.0, 200),
        (3, 9_001, 37, 1, 1.0, 1),
        (3, 9_000, 16, 2, 0.01, 500),  # k exceeds the eligible rows
        (2, 5_000, 16, 1, 0.9, 4_000),  # k near the number of rows
        (2, 3_000, 16, 1, 0.9, 10_000),  # k exceeds the rows
        (2, 30_000, 8, 1, 0.0, 50),  # nothing eligible
        (9, 3_100, 5, 3, 0.5, 100),
        (1, 1, 64, 1, 1.0, 5),
    ],
)
def test_blocked_searches_equal_the_reference(shape: tuple[Any, ...]) -> None:
    assert_same_as_reference(search(5, *shape))
    assert_same_as_reference(of_unit_length(search(6, *shape)))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**32), st.sampled_from([3, 8, 20, 64]), st.sampled_from([1, 40, 300]),
    st.sampled_from(["normal", "clustered", "equal", "sizes", "sparse", "holes"]),
)  # fmt: skip
def test_searches_that_rule_rows_out_equal_the_reference_whatever_the_rows(
    seed: int, dim: int, k: int, kind: str
) -> None:
    problem = search(seed, 9, 6_000, dim, 2, 0.7, k)
    rng = np.random.default_rng(seed)
    table = problem["table"]
    if kind == "clustered":
        table[:] = table[rng.integers(0, 40, len(table))] + 0.001 * table
    elif kind == "equal":
        table[:] = table[rng.integers(0, 3, len(table))]
    elif kind == "sizes":
        table *= (10.0 ** rng.uniform(-20, 20, (len(table), 1))).astype(np.float32)
        problem["queries"] *= (10.0 ** rng.uniform(-20, 18, (9, 1))).astype(np.float32)
    elif kind == "sparse":
        table[rng.random(table.shape) < 0.9] = 0.0
        problem["queries"][::2] = 0.0
    elif kind == "holes":
        table[rng.random(table.shape) < 0.01] = rng.choice([np.nan, np.inf, -np.inf, 3e38, 1e-40])
    assert_same_as_reference(problem)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 130), st.floats(-25, 25), st.floats(-25, 25))
def test_no_row_is_ruled_out_by_a_floor_that_its_canonical_score_reaches(
    seed: int, dim: int, row_size: float, query_size: float
) -> None:
    """The bound, at the tightest floor there is: each row's own score."""
    rng = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        table = (rng.standard_normal((64, dim)) * 10.0**row_size).astype(np.float32)
        table[rng.random(table.shape) < 0.2] *= np.float32(1000.0)
        query = (rng.standard_normal(dim) * 10.0**query_size).astype(np.float32)
    columns, small = copied(table).columns, quantise_queries(query[None])
    exact = canonical_inner_reference(query, table).astype(np.float64)
    scale, radius, norm = (column.ravel()[:64] for column in (columns.scale, columns.radius, columns.norm))
    with np.errstate(all="ignore"):
        numbers = columns.packed.transpose(0, 2, 1, 3).reshape(64, -1).astype(np.int64)
        words = small.words[0, :, 0].ravel().astype(np.int64)
        dots = (numbers @ words + columns.bias.ravel()).astype(np.float32)
        unit, doubt = small.factors[0, :, 0]
        bound = dots * scale * unit + (norm * doubt + radius)
        floors = (exact / small.lengths[0]).astype(np.float32)
    assert not (np.isfinite(exact) & (bound < floors)).any()
    if small.lengths[0] and np.isfinite(radius).all():  # and it is of use: off by a few hundredths of the lengths
        sizes = np.linalg.norm(table.astype(np.float64), axis=1)
        assert (bound - floors <= 0.04 * (1.0 + dim**0.5) * sizes).all()


def test_the_compiled_bound_is_the_one_that_is_proven() -> None:
    """`reach_floors` marks exactly the rows whose bound, computed with NumPy, reaches the floor."""
    problem = of_unit_length(search(3, 8, 64, 61, 1, 1.0, 1))
    columns, small = copied(problem["table"]).columns, quantise_queries(problem["queries"])
    floors = np.linspace(-0.2, 0.2, 8, dtype=np.float32)
    marked = np.zeros((8, 2), np.uint32)
    _mark(columns, small.words, small.factors, floors, marked)
    numbers = columns.packed.transpose(0, 2, 1, 3).reshape(64, -1).astype(np.int64)
    words = small.words[0].transpose(1, 0, 2).reshape(8, -1).astype(np.int64)
    dots = (words @ numbers.T + columns.bias.ravel()).astype(np.float32)
    unit, doubt = small.factors[0, 0, :, None], small.factors[0, 1, :, None]
    bound = dots * columns.scale.ravel() * unit + (columns.norm.ravel() * doubt + columns.radius.ravel())
    bits = np.unpackbits(marked.view(np.uint8), axis=1, bitorder="little").astype(bool)
    near = np.abs(bound - floors[:, None]) < 1e-6  # a compiler may round differently
    np.testing.assert_array_equal(bits | near, (bound >= floors[:, None]) | near)
    assert 0 < bits.sum() < bits.size


@vectors.numba.njit
def _mark(columns: Any, words: Any, factors: Any, floors: Any, marked: Any) -> None:
    for pair in range(2):
        at = 2 * pair
        vectors.reach_floors(
            columns.packed.ctypes.data + at * columns.packed.shape[1] * 64, columns.packed.shape[1],
            columns.bias.ctypes.data + at * 64, columns.scale.ctypes.data + at * 64,
            columns.radius.ctypes.data + at * 64, columns.norm.ctypes.data + at * 64, words.ctypes.data,
            factors.ctypes.data, floors.ctypes.data, marked.ctypes.data + pair * 4, 8,
        )  # fmt: skip


def test_most_rows_are_ruled_out_without_being_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = of_unit_length(search(4, 8, 20_000, 64, 1, 1.0, 200))
    widths = []
    original = topk_int8.take_best
    monkeypatch.setattr(
        topk_int8, "take_best", lambda keys, used, *out: (widths.append(used), original(keys, used, *out))
    )
    assert found(problem).again == 0
    assert 200 <= widths[0] < 1_000, "of 20,000"


def test_answer_of_a_query_does_not_depend_on_its_batch() -> None:
    problem = of_unit_length(search(4, 11, 20_000, 48, 2, 0.6, 200))
    together = found(problem)
    for b in range(11):
        alone = found({**problem, "queries": problem["queries"][b : b + 1], "mask_of": problem["mask_of"][b : b + 1]})
        np.testing.assert_array_equal(alone.slots[0], together.slots[b])
        np.testing.assert_array_equal(alone.scores[0], together.scores[b])


def test_a_sampled_floor_that_was_too_high_is_found_out_and_searched_again() -> None:
    """The sampled rows are the only good ones, so the sample promises far more than there is."""
    problem = search(6, 3, 24_000, 16, 1, 1.0, 600)
    table = np.abs(problem["table"]) * np.float32(0.01)
    stride = 24_000 // 16 // 187
    for group in range(stride // 2, 1_500, stride):
        table[16 * group : 16 * group + 3] *= 100
    problem["table"], problem["queries"] = table, np.abs(problem["queries"])
    assert assert_same_as_reference(problem).again == 3


def test_rising_scores_cut_the_kept_again_and_again_and_stay_exact() -> None:
    problem = search(8, 2, 24_000, 4, 1, 0.9, 50)
    problem["table"] = np.linspace(-1, 1, 24_000, dtype=np.float32)[:, None].repeat(4, axis=1)
    problem["table"][np.arange(24_000) // 16 % 8 != 0] *= np.float32(0.5)
    problem["queries"] = np.abs(problem["queries"])
    assert_same_as_reference(problem)
    problem["eligible"][:] = True
    problem["table"] = np.sort(np.random.default_rng(1).random((24_000, 1), np.float32), axis=0).repeat(4, axis=1)
    problem["k"] = 6_500  # more than a quarter: no floor
    assert_same_as_reference(problem)


def test_all_equal_scores_return_the_lowest_eligible_slots() -> None:
    problem = search(1, 3, 15_000, 24, 2, 0.5, 300)
    problem["table"][:] = problem["table"][0]
    slots = found(problem).slots
    for b, mask in enumerate(problem["mask_of"]):
        np.testing.assert_array_equal(slots[b], np.flatnonzero(problem["eligible"][mask])[:300])


@pytest.mark.parametrize("batch", [1, 9])
def test_a_query_without_direction_finds_rows_without_direction_too(batch: int) -> None:
    """0·inf, no number, must rule nothing out."""
    problem = search(2, batch, 300, 8, 1, 1.0, 5)
    problem["queries"][:], problem["table"][:40] = 0.0, 0.0
    assert assert_same_as_reference(problem).slots.tolist() == [[0, 1, 2, 3, 4]] * batch


def test_a_row_that_was_written_again_is_found_by_what_it_is_now() -> None:
    problem = of_unit_length(search(2, 2, 20_000, 64, 1, 1.0, 10))
    rows = copied(problem["table"], capacity=25_000)
    changed = np.array([19_999, 3], np.int32)
    problem["table"][changed] = problem["queries"]
    stale = masked_topk_int8(rows=rows, **problem)
    assert not (stale.slots[:, 0] == changed).any(), "else this test proves nothing"
    rows.write(changed, problem["table"])
    result = masked_topk_int8(rows=rows, **problem)
    assert result.slots[:, 0].tolist() == changed.tolist()
    np.testing.assert_array_equal(result.slots, masked_topk_reference(**problem)[0])


@pytest.mark.parametrize("dim", [1, 7, 8, 9, 64, 100])
def test_the_spelled_out_products_are_those_of_the_instruction(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on a CPU without the instruction; compiled anew here, for the other is what this CPU has."""
    problem = of_unit_length(search(7, 8, 64, dim, 1, 1.0, 1))
    columns, small = copied(problem["table"]).columns, quantise_queries(problem["queries"])
    floors = np.zeros(8, np.float32)
    marks = []
    for has in (vectors.has_int8_dots(), False):
        monkeypatch.setattr(vectors, "has_int8_dots", lambda has=has: has)
        marked = np.zeros((8, 2), np.uint32)
        vectors.numba.njit(_mark.py_func)(columns, small.words, small.factors, floors, marked)
        marks.append(marked)
    np.testing.assert_array_equal(*marks)
    assert marks[0].any()


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("queries", np.zeros((2, 4), np.float64)),
        ("table", np.zeros((5, 3), np.float32)),
        ("eligible", np.ones((1, 6), np.bool_)),
        ("mask_of", np.array([0, 1], np.int32)),
        ("k", 0),
        ("rows", Int8Rows(4, 4)),
        ("rows", Int8Rows(5, 3)),
    ],
)
def test_bad_argument_is_refused_by_name(name: str, bad: Any) -> None:
    good = {
        "queries": np.zeros((2, 4), np.float32), "table": np.zeros((5, 4), np.float32), "rows": Int8Rows(5, 4),
        "eligible": np.ones((1, 5), np.bool_), "mask_of": np.zeros(2, np.int32), "k": 3,
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"^{name}:"):
        masked_topk_int8(**{**good, name: bad})


def test_rows_beyond_capacity_or_of_another_length_are_not_taken_over() -> None:
    rows = Int8Rows(10, 4)
    with pytest.raises(ValueError, match=r"^slots: 0 to 9"):
        rows.write(np.array([10], np.int32), np.zeros((12, 4), np.float32))
    with pytest.raises(ValueError, match=r"^slots: 0 to 4"):
        rows.write(np.array([-1], np.int32), np.zeros((5, 4), np.float32))
    with pytest.raises(ValueError, match=r"^table:"):
        rows.write(np.array([1], np.int32), np.zeros((5, 3), np.float32))
    with pytest.raises(ValueError, match="capacity, dim"):
        Int8Rows(0, 4)
