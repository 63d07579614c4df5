"""Search engines by name. An engine's module is imported when it is chosen, not before."""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

from kernels.backend import CPU, Backend
from server.errors import ConfigError
from server.retrieval.base import SearchEngine

_ENGINES = {
    "exact": ("server.retrieval.exact", "ExactSearch"),
    "faiss_cpu": ("server.retrieval.faiss_cpu", "FaissCpuSearch"),
    "exact_gpu": ("server.retrieval.exact_gpu", "ExactGpuSearch"),
    "faiss_gpu": ("server.retrieval.faiss_gpu", "FaissGpuSearch"),
}

ENGINE_NAMES: tuple[str, ...] = tuple(_ENGINES)
GPU_ENGINE_NAMES = ("exact_gpu", "faiss_gpu")


def make_engine(name: str, capacity: int, dim: int, backend: Backend = CPU) -> SearchEngine:
    """The search engine ``name`` for ``capacity`` rows of ``dim`` float32, on the process's device.

    Raises:
        ConfigError: no engine has that name (the message lists those there are), or it needs a GPU and the backend
            has none.
        ImportError: the engine's library is not installed.
    """
    if name not in _ENGINES:
        raise ConfigError(f"retrieval engine: {name!r} is not one of {', '.join(ENGINE_NAMES)}")
    module, cls = _ENGINES[name]
    where: dict[str, Any] = {"backend": backend} if name in GPU_ENGINE_NAMES else {}
    return cast(SearchEngine, getattr(import_module(module), cls)(capacity, dim, **where))
