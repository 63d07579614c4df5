"""Search engines by name. An engine's module is imported when it is chosen, not before."""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

from kernels.backend import CPU, Backend
from server.config import RetrievalSettings
from server.errors import ConfigError
from server.retrieval.base import SearchEngine
from server.telemetry.metrics import Metrics

_ENGINES = {
    "exact": ("server.retrieval.exact", "ExactSearch"),
    "faiss_cpu": ("server.retrieval.faiss_cpu", "FaissCpuSearch"),
    "exact_gpu": ("server.retrieval.exact_gpu", "ExactGpuSearch"),
    "faiss_gpu": ("server.retrieval.faiss_gpu", "FaissGpuSearch"),
}

ENGINE_NAMES: tuple[str, ...] = tuple(_ENGINES)
GPU_ENGINE_NAMES = ("exact_gpu", "faiss_gpu")
_EXTRA = {"exact": "cpu", "faiss_cpu": "cpu", "exact_gpu": "gpu", "faiss_gpu": "gpu"}


def make_engine(name: str, capacity: int, dim: int, backend: Backend = CPU, scan: str = "auto") -> SearchEngine:
    """The search engine ``name`` for ``capacity`` rows of ``dim`` float32, on the process's device.

    scan: what "exact" scans, see `ExactSearch`; nothing to the others.

    Raises:
        ConfigError: no engine has that name (the message lists those there are), it needs a GPU and the backend has
            none, or its library is not installed.
    """
    if name not in _ENGINES:
        raise ConfigError(f"retrieval engine: {name!r} is not one of {', '.join(ENGINE_NAMES)}")
    module, cls = _ENGINES[name]
    further: dict[str, Any] = {"backend": backend} if name in GPU_ENGINE_NAMES else {}
    if name == "exact":
        further["scan"] = scan
    try:
        engine = getattr(import_module(module), cls)
    except ImportError as error:
        raise ConfigError(
            f"retrieval.engine: {name} needs a library: pip install 'liverank[{_EXTRA[name]}]' ({error})"
        ) from error
    return cast(SearchEngine, engine(capacity, dim, **further))


def resolve_engine(name: str, backend: Backend) -> str:
    """The engine meant by a configured name: "exact" is exact search on the process's device."""
    return "exact_gpu" if name == "exact" and backend.on_gpu else name


def make_search(
    settings: RetrievalSettings, capacity: int, dim: int, metrics: Metrics, backend: Backend = CPU
) -> SearchEngine:
    """The configured engine, behind a recall gate with the approximate index if one is configured.

    Raises:
        ConfigError: as :func:`make_engine`, or the index's library does not have it.
    """
    engine = make_engine(resolve_engine(settings.engine, backend), capacity, dim, backend, settings.scan)
    metrics.fallback_queries.set_function(lambda: engine.fallback_queries)
    approximate = settings.approximate
    if approximate.index == "none":
        return engine
    from server.retrieval.cagra import CagraIndex, require_cagra
    from server.retrieval.gate import GatedSearch, GatePolicy
    from server.retrieval.recall import RecallGate

    require_cagra()
    gate = RecallGate(approximate.recall, approximate.window, approximate.measured_share)
    policy = GatePolicy(approximate.overfetch, approximate.rebuild_ms, approximate.max_changed_rows)
    gated = GatedSearch(engine, CagraIndex, gate, policy, metrics)
    metrics.fallback_queries.set_function(lambda: gated.fallback_queries)
    return gated
