"""Search engines as tests build and fill them: on a GPU where one is had, else its stand-ins on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels.backend import CPU, Backend, choose, visible_gpu
from server.retrieval.base import SearchEngine
from server.retrieval.registry import ENGINE_NAMES, GPU_ENGINE_NAMES, make_engine

ALL_ENGINES = (*ENGINE_NAMES, "exact/float32", "exact/int8")
"""Every engine by name, and what of the exact one this CPU may not choose by itself."""


def backend() -> Backend:
    return choose("auto") if visible_gpu() is not None else CPU


def knn_on_cpu(queries: Any, rows: Any, k: int) -> tuple[Any, Any]:
    """FAISS's brute force over torch tensors of the CPU."""
    import faiss

    found: tuple[Any, Any] = faiss.knn(queries.numpy(), rows.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    return found


def build_engine(name: str, capacity: int, dim: int) -> SearchEngine:
    """Any of `ALL_ENGINES`; without a GPU, kernels are interpreted and FAISS searches on the CPU."""
    if "/" in name:
        engine, scan = name.split("/")
        return make_engine(engine, capacity, dim, scan=scan)
    if name not in GPU_ENGINE_NAMES:
        return make_engine(name, capacity, dim)
    where = backend()
    if name == "faiss_gpu" and not where.on_gpu:
        from server.retrieval.faiss_gpu import FaissGpuSearch

        return FaissGpuSearch(capacity, dim, knn=knn_on_cpu)
    return make_engine(name, capacity, dim, where)


def write(engine: SearchEngine, where: Any, values: Any) -> None:
    """Writes ``values``, broadcast, into the rows that ``where`` selects."""
    slots = np.atleast_1d(np.arange(engine.embeddings.shape[0], dtype=np.int32)[where])
    rows = np.broadcast_to(np.asarray(values, np.float32), (slots.size, engine.embeddings.shape[1]))
    engine.write_rows(slots, rows.copy())
