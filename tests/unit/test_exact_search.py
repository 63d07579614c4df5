"""The exact engine keeps its int8 copy in step with the embeddings, and says when it searched twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kernels.topk import masked_topk_reference
from server.retrieval import exact
from server.retrieval.exact import ExactSearch

ROWS, DIM = 12_000, 16


def unit_rows(rng: np.random.Generator, n: int) -> Any:
    rows = rng.standard_normal((n, DIM)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def engine() -> ExactSearch:
    """Large enough that rows are ruled out by what the copy says of them."""
    engine = ExactSearch(ROWS, DIM, "int8")
    engine.write_rows(np.arange(ROWS, dtype=np.int32), unit_rows(np.random.default_rng(0), ROWS))
    return engine


def search(engine: ExactSearch, queries: Any, k: int = 20) -> Any:
    eligible, mask_of = np.ones((1, ROWS), np.bool_), np.zeros(len(queries), np.int32)
    hits = engine.search(queries, eligible, mask_of, k)
    slots, scores = masked_topk_reference(queries, engine.embeddings, eligible, mask_of, k)
    np.testing.assert_array_equal(hits.slots, slots)
    np.testing.assert_array_equal(hits.scores, scores)
    return hits


def test_a_changed_embedding_is_seen_by_the_next_search(engine: ExactSearch) -> None:
    queries = unit_rows(np.random.default_rng(1), 3)
    before = search(engine, queries)
    for slot in (0, 5_001, ROWS - 1):
        assert slot not in before.slots[0]
        engine.write_rows(np.array([slot], np.int32), queries[:1])
        assert slot in search(engine, queries).slots[0]
    engine.write_rows(before.slots[1, :1], -queries[1:2])
    assert before.slots[1, 0] not in search(engine, queries).slots[1]


def test_the_last_of_several_writes_of_a_row_counts(engine: ExactSearch) -> None:
    queries = unit_rows(np.random.default_rng(1), 1)
    search(engine, queries)
    for row in (queries, -queries, queries, -queries):
        engine.write_rows(np.array([77], np.int32), row)
    assert 77 not in search(engine, queries).slots[0]


def test_many_writes_are_copied_while_they_come(engine: ExactSearch, monkeypatch: pytest.MonkeyPatch) -> None:
    search(engine, unit_rows(np.random.default_rng(1), 1))
    monkeypatch.setattr(exact, "_MOST_UNCOPIED", 10)
    for slot in range(25):
        engine.write_rows(np.array([slot], np.int32), np.ones((1, DIM), np.float32))
        assert engine._n_uncopied < 10
    search(engine, np.ones((1, DIM), np.float32))


def test_the_caller_may_reuse_the_slots_it_wrote(engine: ExactSearch) -> None:
    queries = unit_rows(np.random.default_rng(1), 1)
    slots = np.array([9], np.int32)
    engine.write_rows(slots, queries)
    slots[0] = 10
    assert 9 in search(engine, queries).slots[0]


def test_queries_that_are_searched_again_are_counted(engine: ExactSearch) -> None:
    query = np.ones((1, DIM), np.float32)
    search(engine, query)
    assert engine.fallback_queries == 0
    rows = -np.abs(engine.embeddings)
    stride = 12_000 // 16 // 93
    sampled = np.arange(stride // 2, 750, stride)
    rows[16 * sampled] *= -1  # only what is sampled is good
    engine.write_rows(np.arange(ROWS, dtype=np.int32), rows)
    search(engine, query, 200)
    assert engine.fallback_queries == 1


def test_float32_keeps_no_copy_and_finds_the_same() -> None:
    rng = np.random.default_rng(3)
    rows, queries = unit_rows(rng, ROWS), unit_rows(rng, 4)
    plain = ExactSearch(ROWS, DIM, "float32")
    assert plain._copy is None
    plain.write_rows(np.arange(ROWS, dtype=np.int32), rows)
    search(plain, queries)


@pytest.mark.parametrize("has", [True, False])
def test_auto_takes_the_copy_where_the_cpu_is_made_for_it(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "has_int8_dots", lambda: has)
    assert (ExactSearch(4, 4)._copy is not None) == has
