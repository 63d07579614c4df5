"""Every search engine keeps the contract of ``server.retrieval.base``."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.backend import visible_gpu
from kernels.topk import masked_topk_reference
from server.errors import ConfigError
from server.retrieval.registry import GPU_ENGINE_NAMES, make_engine
from tests.engines import ALL_ENGINES, build_engine, write

engines = pytest.mark.parametrize("name", ALL_ENGINES)
CAPACITY, DIM = 300, 12


def filled(name: str, seed: int = 0) -> tuple[Any, np.random.Generator]:
    rng = np.random.default_rng(seed)
    engine: Any = build_engine(name, CAPACITY, DIM)
    write(engine, slice(None), rng.standard_normal((CAPACITY, DIM)))
    return engine, rng


def some_queries(rng: np.random.Generator, batch: int) -> Any:
    return rng.standard_normal((batch, DIM)).astype(np.float32)


def assert_keeps_contract(engine: Any, queries: Any, eligible: Any, mask_of: Any, k: int) -> None:
    hits = engine.search(queries, eligible, mask_of, k)
    rows = engine.embeddings[: eligible.shape[1]]
    slots, scores = masked_topk_reference(queries, rows, eligible, mask_of, k)
    np.testing.assert_array_equal(hits.slots, slots)
    np.testing.assert_array_equal(hits.scores, scores)
    assert (hits.slots.dtype, hits.scores.dtype) == (np.int32, np.float32)


def everything(rows: int = CAPACITY) -> Any:
    return np.ones((1, rows), np.bool_)


def of_mask_zero(batch: int) -> Any:
    return np.zeros(batch, np.int32)


searches = given(
    seed=st.integers(0, 2**32),
    batch=st.integers(0, 5),
    rows=st.integers(0, CAPACITY),
    masks=st.integers(1, 4),
    share=st.sampled_from([0.0, 0.05, 0.6, 1.0]),
    k=st.integers(1, 2 * CAPACITY),
    distinct=st.sampled_from([1, 7, CAPACITY]),
)


def assert_ids_and_scores_are_those_of_a_full_sort(
    name: str, seed: int, batch: int, rows: int, masks: int, share: float, k: int, distinct: int
) -> None:
    engine, rng = filled(name, seed)
    written = engine.embeddings[rng.integers(0, distinct, CAPACITY)]
    if distinct == 7:
        written[rng.integers(0, CAPACITY, 20), 0] = np.nan
        written[rng.integers(0, CAPACITY, 20), 1] = np.inf
    write(engine, slice(None), written)
    eligible = rng.random((masks, rows)) < share
    mask_of = rng.integers(0, masks, batch).astype(np.int32)
    assert_keeps_contract(engine, some_queries(rng, batch), eligible, mask_of, k)


@pytest.mark.parametrize("name", sorted(set(ALL_ENGINES) - {"exact_gpu", "exact"}))
@settings(max_examples=60, deadline=None)
@searches
def test_ids_and_scores_are_those_of_a_full_sort_under_any_masks(name: str, **search: Any) -> None:
    assert_ids_and_scores_are_those_of_a_full_sort(name, **search)


@settings(max_examples=12, deadline=None)  # an interpreted kernel takes a millisecond per program
@searches
def test_ids_and_scores_on_the_gpu_are_those_of_a_full_sort_under_any_masks(**search: Any) -> None:
    assert_ids_and_scores_are_those_of_a_full_sort("exact_gpu", **search)


@engines
def test_a_row_written_is_found_by_the_next_search(name: str) -> None:
    engine, rng = filled(name)
    query = some_queries(rng, 1)
    before = engine.search(query, everything(), of_mask_zero(1), 1)
    assert before.slots[0, 0] != 17
    write(engine, 17, 100 * query[0])
    after = engine.search(query, everything(), of_mask_zero(1), 1)
    assert after.slots[0, 0] == 17
    np.testing.assert_array_equal(engine.embeddings[17], 100 * query[0])


@engines
def test_the_mask_acts_inside_the_search(name: str) -> None:
    """Only the k worst rows are eligible: filtering a top-k afterwards would find none of them."""
    engine, rng = filled(name)
    query = some_queries(rng, 1)
    worst = np.argsort(engine.embeddings @ query[0])[:10]
    eligible = np.zeros((1, CAPACITY), np.bool_)
    eligible[0, worst] = True
    hits = engine.search(query, eligible, of_mask_zero(1), 10)
    assert set(hits.slots[0].tolist()) == set(worst.tolist())


@engines
def test_a_row_deleted_by_its_mask_is_not_found(name: str) -> None:
    engine, rng = filled(name)
    query = some_queries(rng, 1)
    eligible = everything()
    first = engine.search(query, eligible, of_mask_zero(1), 5).slots[0]
    eligible[0, first[0]] = False
    assert engine.search(query, eligible, of_mask_zero(1), 4).slots[0].tolist() == first[1:].tolist()


@engines
def test_each_query_uses_its_own_mask(name: str) -> None:
    engine, rng = filled(name)
    queries = np.repeat(some_queries(rng, 1), 3, axis=0)
    even = np.arange(CAPACITY) % 2 == 0
    hits = engine.search(queries, np.stack([even, ~even]), np.array([1, 0, 1], np.int32), 20)
    assert (hits.slots % 2 == np.array([[1], [0], [1]])).all()
    np.testing.assert_array_equal(hits.slots[0], hits.slots[2])


@engines
def test_rows_beyond_the_mask_are_not_searched(name: str) -> None:
    engine, rng = filled(name)
    query = some_queries(rng, 1)
    write(engine, slice(100, None), 100 * query[0])
    hits = engine.search(query, everything(93), of_mask_zero(1), CAPACITY)
    assert hits.slots.max() < 93
    assert (hits.slots[0, :93] >= 0).all()


@engines
def test_places_beyond_the_eligible_rows_are_padded(name: str) -> None:
    engine, rng = filled(name)
    eligible = np.zeros((1, CAPACITY), np.bool_)
    eligible[0, [3, 99]] = True
    hits = engine.search(some_queries(rng, 2), eligible, of_mask_zero(2), 5)
    assert np.sort(hits.slots[:, :2]).tolist() == [[3, 99], [3, 99]]
    assert (hits.slots[:, 2:] == -1).all()
    assert np.isneginf(hits.scores[:, 2:]).all()


@engines
def test_nothing_eligible_no_rows_and_no_queries_give_only_padding(name: str) -> None:
    engine, rng = filled(name)
    for eligible in (~everything(), np.ones((1, 0), np.bool_)):
        hits = engine.search(some_queries(rng, 2), eligible, of_mask_zero(2), 3)
        assert (hits.slots == -1).all()
        assert np.isneginf(hits.scores).all()
    none = engine.search(some_queries(rng, 0), np.ones((0, CAPACITY), np.bool_), of_mask_zero(0), 3)
    assert none.slots.shape == none.scores.shape == (0, 3)


@engines
def test_duplicated_embeddings_tie_by_slot_across_the_last_place(name: str) -> None:
    engine, rng = filled(name)
    query = some_queries(rng, 1)
    copies = [290, 5, 77, 150, *range(200, 260)]
    write(engine, copies, 100 * query[0])
    hits = engine.search(query, everything(), of_mask_zero(1), 4)
    assert hits.slots[0].tolist() == [5, 77, 150, 200]
    assert len(set(hits.scores[0].tolist())) == 1


@engines
def test_rows_that_are_not_finite_are_never_returned_and_take_no_place(name: str) -> None:
    engine, rng = filled(name)
    write(engine, slice(0, 150), np.nan)
    write(engine, slice(150, 200), np.inf)  # a product of +inf, -inf or NaN
    write(engine, slice(200, 250), np.r_[-np.inf, np.ones(DIM - 1)])
    hits = engine.search(some_queries(rng, 4), everything(), of_mask_zero(4), 60)
    assert np.sort(hits.slots[:, :50]).tolist() == [list(range(250, 300))] * 4
    assert (hits.slots[:, 50:] == -1).all()


@pytest.mark.parametrize("k", [5, 150])  # FAISS selects in another way from k = 100 on
def test_engines_agree_bit_for_bit_on_many_rows(k: int) -> None:
    rng = np.random.default_rng(11)
    rows = rng.standard_normal((9_000, 33)).astype(np.float32)[rng.integers(0, 4_000, 9_000)]
    queries = rng.standard_normal((6, 33)).astype(np.float32)
    eligible, mask_of = rng.random((2, 9_000)) < 0.5, np.array([0, 1, 0, 1, 1, 0], np.int32)
    answers = []
    for name in ALL_ENGINES:
        engine = build_engine(name, *rows.shape)
        write(engine, slice(None), rows)
        answers.append(engine.search(queries, eligible, mask_of, k))
    for other in answers[1:]:
        np.testing.assert_array_equal(answers[0].slots, other.slots)
        np.testing.assert_array_equal(answers[0].scores, other.scores)


@engines
@pytest.mark.parametrize(
    ("argument", "bad"),
    [
        ("queries", np.zeros((1, DIM + 1), np.float32)),
        ("queries", np.zeros((1, DIM), np.float64)),
        ("eligible", np.ones((1, CAPACITY + 1), np.bool_)),
        ("eligible", np.ones((1, CAPACITY), np.int8)),
        ("mask_of", np.array([1], np.int32)),
        ("mask_of", np.array([0, 0], np.int32)),
        ("k", 0),
    ],
)
def test_a_bad_search_argument_is_refused_by_name(name: str, argument: str, bad: Any) -> None:
    engine, rng = filled(name)
    good = {"queries": some_queries(rng, 1), "eligible": everything(), "mask_of": of_mask_zero(1), "k": 3}
    with pytest.raises(ValueError, match=f"^{argument}:"):
        engine.search(**{**good, argument: bad})


@engines
def test_a_query_without_direction_finds_the_lowest_eligible_slots(name: str) -> None:
    engine, _ = filled(name)
    hits = engine.search(np.zeros((1, DIM), np.float32), everything(), of_mask_zero(1), 3)
    assert hits.slots.tolist() == [[0, 1, 2]] and not hits.scores.any()


@pytest.mark.skipif(visible_gpu() is not None, reason="a GPU is here")
@pytest.mark.parametrize("name", GPU_ENGINE_NAMES)
def test_a_gpu_engine_without_a_gpu_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    with pytest.raises(ConfigError, match=f"{name} needs a GPU, and this process has none"):
        make_engine(name, 4, 4)


def test_an_unknown_engine_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError, match="exact, faiss_cpu"):
        make_engine("approximate", 1, 1)


def test_faiss_is_imported_only_when_chosen() -> None:
    program = (
        "import sys, server.retrieval, server.retrieval.base, server.retrieval.registry as registry;"
        "registry.make_engine('exact', 2, 2); assert 'faiss' not in sys.modules;"
        "registry.make_engine('faiss_cpu', 2, 2); assert 'faiss' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_an_engine_whose_library_is_missing_names_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "server.retrieval.faiss_cpu", raising=False)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"^retrieval\.engine: faiss_cpu .*liverank\[cpu\]"):
        make_engine("faiss_cpu", CAPACITY, DIM)
