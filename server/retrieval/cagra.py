"""CAGRA, cuVS's graph index, through faiss-gpu-cuvs: an approximate index for the recall gate.

**Not run on a GPU.** Written from the interface of FAISS's GpuIndexCagra and never executed; the gate around it is
tested with other indexes. A first run should watch `liverank_index_builds_total` and the recall bound.

Every index has GPU resources of its own: the builder's thread uses them until the index is handed over, the engine
thread from then on, never both.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.errors import ConfigError

_GRAPH_DEGREE, _INTERMEDIATE_DEGREE = 64, 128
_MAX_LIST = 512  # candidates that a search keeps per query, hence finds


class CagraIndex:
    """A graph over rows float32[N, D], N >= 1.

    Raises:
        ConfigError: FAISS is not installed, or was built without CAGRA.
    """

    def __init__(self, rows: NDArray[np.float32]) -> None:
        self._faiss: Any = _faiss_with_cagra()
        self._rows = len(rows)
        config = self._faiss.GpuIndexCagraConfig()
        config.graph_degree = min(_GRAPH_DEGREE, max(1, self._rows - 1))
        config.intermediate_graph_degree = min(_INTERMEDIATE_DEGREE, max(1, self._rows - 1))
        self._resources = self._faiss.StandardGpuResources()
        self._index = self._faiss.GpuIndexCagra(
            self._resources, rows.shape[1], self._faiss.METRIC_INNER_PRODUCT, config
        )
        # The graph is made from a copy: what changes while it is made is not the library's concern.
        copy = np.nan_to_num(rows, copy=True, nan=0.0, posinf=0.0, neginf=0.0)
        self._index.train(copy)

    def search(self, queries: NDArray[np.float32], k: int) -> NDArray[np.int32]:
        """int32[B, min(k, 512, N)]: see :class:`server.retrieval.gate.ApproximateIndex`."""
        asked = min(k, _MAX_LIST, self._rows)
        parameters = self._faiss.SearchParametersCagra()
        parameters.itopk_size = _MAX_LIST
        _, found = self._index.search(queries, asked, params=parameters)
        inside = (found >= 0) & (found < self._rows)
        return np.where(inside, found, -1).astype(np.int32)


def require_cagra() -> None:
    """Raises ConfigError unless FAISS can build the index: asked at start-up, not at the first build."""
    _faiss_with_cagra()


def _faiss_with_cagra() -> Any:
    try:
        faiss: Any = import_module("faiss")
    except ImportError as error:
        raise ConfigError(
            f"retrieval.approximate.index: cagra needs FAISS ({error}); install faiss-gpu-cuvs"
        ) from error
    if not hasattr(faiss, "GpuIndexCagra"):
        raise ConfigError("retrieval.approximate.index: this FAISS was built without CAGRA; install faiss-gpu-cuvs")
    return faiss
