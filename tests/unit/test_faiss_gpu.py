"""The FAISS engine for the GPU, with FAISS on the CPU in its place: proofs, limits, fallbacks, ownership."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from kernels.topk import masked_topk_reference
from server.errors import ConfigError
from server.retrieval.faiss_gpu import MAX_ASKED, FaissGpuSearch
from tests.engines import knn_on_cpu, write

ROWS, DIM = 400, 8


def filled(knn: Any = knn_on_cpu, rows: int = ROWS) -> FaissGpuSearch:
    engine = FaissGpuSearch(rows, DIM, knn=knn)
    write(engine, slice(None), np.random.default_rng(2).standard_normal((rows, DIM)))
    return engine


def assert_exact(engine: FaissGpuSearch, queries: Any, eligible: Any, mask_of: Any, k: int) -> None:
    hits = engine.search(queries, eligible, mask_of, k)
    slots, scores = masked_topk_reference(queries, engine.embeddings, eligible, mask_of, k)
    np.testing.assert_array_equal(hits.slots, slots)
    np.testing.assert_array_equal(hits.scores, scores)


def some(batch: int) -> Any:
    return np.random.default_rng(3).standard_normal((batch, DIM)).astype(np.float32)


def test_more_masks_than_columns_take_more_calls() -> None:
    calls: list[int] = []

    def counted(queries: Any, rows: Any, k: int) -> Any:
        calls.append(len(queries))
        return knn_on_cpu(queries, rows, k)

    engine = filled(counted)
    calls.clear()
    eligible = np.random.default_rng(4).random((20, ROWS)) < 0.5
    assert_exact(engine, some(40), eligible, np.arange(40, dtype=np.int32) % 20, 7)
    assert calls == [32, 8] and engine.fallback_queries == 0


def test_ties_beyond_the_spare_places_are_asked_again_and_beyond_the_limit_fall_back() -> None:
    engine = filled(rows=3 * MAX_ASKED)
    everything, mask_of = np.ones((1, 3 * MAX_ASKED), np.bool_), np.zeros(1, np.int32)
    write(engine, slice(100, 160), np.full(DIM, 10.0))
    query = np.full((1, DIM), 50.0, np.float32)
    assert_exact(engine, query, everything, mask_of, 5)
    assert engine.fallback_queries == 1  # asked again
    write(engine, slice(None), np.ones(DIM))
    assert_exact(engine, query, everything, mask_of, 5)
    assert engine.fallback_queries > 3


def test_rows_and_queries_too_long_for_the_mask_columns_are_searched_on_the_host() -> None:
    engine = filled()
    everything, mask_of = np.ones((1, ROWS), np.bool_), np.zeros(1, np.int32)
    assert_exact(engine, some(1) * np.float32(1e9), everything, mask_of, 5)
    assert engine.fallback_queries == 1
    write(engine, 7, np.full(DIM, 1e31))
    assert_exact(engine, some(1), everything, mask_of, 5)
    assert engine.fallback_queries == 2
    write(engine, 7, np.zeros(DIM))
    assert_exact(engine, some(1), everything, mask_of, 5)
    assert engine.fallback_queries == 2


def test_more_than_faiss_finds_on_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^k: FAISS finds at most 2048 neighbours on a GPU, got 2049"):
        filled().search(some(1), np.ones((1, ROWS), np.bool_), np.zeros(1, np.int32), 2049)


def test_a_search_from_another_thread_is_refused() -> None:
    engine = filled()
    arguments = (some(1), np.ones((1, ROWS), np.bool_), np.zeros(1, np.int32), 3)
    engine.search(*arguments)
    raised: list[Exception] = []

    def elsewhere() -> None:
        try:
            engine.search(*arguments)
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(10)
    assert len(raised) == 1 and "owned by the thread that searched first" in str(raised[0])


def ignores_masks(queries: Any, rows: Any, k: int) -> Any:
    rows = rows.clone()
    rows[:, DIM:] = 0
    return knn_on_cpu(queries, rows, k)


def rounds_operands(queries: Any, rows: Any, k: int) -> Any:
    """As TF32 would: ten bits of mantissa."""
    import torch

    short = [(part.view(torch.int32) & -(1 << 13)).view(torch.float32) for part in (queries, rows)]
    return knn_on_cpu(*short, k)


@pytest.mark.parametrize("wrong", [ignores_masks, rounds_operands])
def test_a_faiss_that_answers_wrongly_is_refused_at_the_start(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="answered a small masked search wrongly"):
        FaissGpuSearch(ROWS, DIM, knn=wrong)


def test_faiss_without_gpu_support_is_refused_with_its_mend() -> None:
    from server.retrieval.faiss_gpu import knn_on_gpu

    faiss = pytest.importorskip("faiss")
    if hasattr(faiss, "StandardGpuResources"):
        pytest.skip("this FAISS has GPU support")
    with pytest.raises(ConfigError, match="install faiss-gpu-cuvs"):
        knn_on_gpu()
