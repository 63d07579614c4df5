"""The table and what ranks it, put together for one device. The server, its warm-up and the benches share this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kernels.backend import Backend
from server.clock import Clock
from server.config import Settings
from server.live.features import FeatureSet
from server.live.table import LiveTable
from server.ranking.pipeline import Pipeline
from server.retrieval.base import SearchEngine
from server.retrieval.streams import StreamState
from server.rules.rulebook import RuleBook
from server.viewers.table import ViewerTable


@dataclass(frozen=True)
class World:
    """Owned by one thread."""

    table: LiveTable
    streams: StreamState
    search: SearchEngine
    pipeline: Pipeline


def build_world(
    settings: Settings,
    clock: Clock,
    features: FeatureSet,
    book: RuleBook,
    backend: Backend,
    search: SearchEngine,
    on_host: Callable[[str, int], None] = lambda reason, viewers: None,
) -> World:
    """Columns on the host, or with everything that is counted and derived on the GPU.

    Args:
        search: for the table's capacity and dimensions; exact search on the GPU brings all else there too.
        on_host: told why, and for how many requests, the GPU's pipeline ranked on the host.
    """
    if search.name != "exact_gpu":
        table = LiveTable(settings.table, search.embeddings, search.write_rows, follower=make_viewers(settings))
        streams = StreamState(table, features, book)
        return World(table, streams, search, Pipeline(settings, clock, table, streams, search))
    return _on_device(settings, clock, features, book, backend, search, on_host)


def make_viewers(settings: Settings) -> ViewerTable | None:
    """The table of viewers for these settings; None when none are remembered."""
    return ViewerTable(settings.viewers, settings.table.embedding_dim) if settings.viewers.capacity else None


def _on_device(
    settings: Settings,
    clock: Clock,
    features: FeatureSet,
    book: RuleBook,
    backend: Backend,
    search: SearchEngine,
    on_host: Callable[[str, int], None],
) -> World:
    # Imported here: on a CPU nothing of this is loaded.
    from server.live.device import DeviceTable
    from server.live.queue import DeviceQueue
    from server.ranking.pipeline_gpu import GpuPipeline
    from server.retrieval.exact_gpu import ExactGpuSearch
    from server.retrieval.streams_gpu import DeviceStreamState

    assert isinstance(search, ExactGpuSearch)
    device = DeviceTable(backend, settings.table.capacity)
    table = LiveTable(
        settings.table, search.embeddings, search.write_rows, lambda columns: DeviceQueue(device, columns),
        make_viewers(settings),
    )  # fmt: skip
    queue = table.accumulators
    assert isinstance(queue, DeviceQueue)
    streams = DeviceStreamState(table, features, book, queue)
    pipeline = GpuPipeline(settings, clock, table, streams, search, queue, backend, on_host)
    return World(table, streams, search, pipeline)
