"""Search engines by name. An engine's module is imported when it is chosen, not before."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from server.errors import ConfigError
from server.retrieval.base import SearchEngine

_ENGINES = {
    "exact": ("server.retrieval.exact", "ExactSearch"),
    "faiss_cpu": ("server.retrieval.faiss_cpu", "FaissCpuSearch"),
}

ENGINE_NAMES: tuple[str, ...] = tuple(_ENGINES)


def make_engine(name: str, capacity: int, dim: int) -> SearchEngine:
    """The search engine ``name`` for ``capacity`` rows of ``dim`` float32.

    Raises:
        ConfigError: no engine has that name (the message lists those there are), or its library is not installed.
    """
    if name not in _ENGINES:
        raise ConfigError(f"retrieval engine: {name!r} is not one of {', '.join(ENGINE_NAMES)}")
    module, cls = _ENGINES[name]
    try:
        engine = getattr(import_module(module), cls)
    except ImportError as error:
        raise ConfigError(f"retrieval.engine: {name} needs a library: pip install 'liverank[cpu]' ({error})") from error
    return cast(SearchEngine, engine(capacity, dim))
