"""A filled table and its pipeline in this process: what a rank batch costs without transport."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kernels.backend import CPU, Backend
from loadtest.bench.catalogue import Catalogue, event_batches, rank_requests
from server.clock import ManualClock
from server.config import Settings, parse_settings
from server.live.events import decode_batch
from server.live.features import FeatureSet
from server.live.table import LiveTable
from server.ranking.pipeline import Pipeline
from server.retrieval.query import QueryBatch, build_batch
from server.retrieval.registry import make_engine
from server.retrieval.streams import StreamState
from server.retrieval.view import Snapshot
from server.rpc.decode import decode_rank
from server.rules.rulebook import RuleBook
from server.world import build_world

NOW_MS = 1_760_000_000_000


@dataclass
class InProcess:
    """Everything a rank batch needs; nothing of it is shared with a server."""

    settings: Settings
    clock: ManualClock
    table: LiveTable
    streams: StreamState
    pipeline: Pipeline

    def batch(self, viewers: int, seed: int = 0) -> QueryBatch:
        """A batch of different viewers, one in three with a language filter."""
        book = self.streams.book
        requests = rank_requests(viewers, seed)
        queries = [decode_rank(request, self.settings, book.surfaces, float("inf")) for request in requests]
        return build_batch(queries, self.table, book)

    def tick(self) -> None:
        """Begins a new tick: views are built again on first use."""
        before = self.pipeline.snapshot
        self.pipeline.snapshot = Snapshot(
            self.table, self.streams, self.settings.retrieval, self.clock.now_ms(), before.trend_order
        )


def fill_in_process(
    catalogue: Catalogue,
    engine: str = "exact",
    backend: Backend = CPU,
    on_host: Callable[[str, int], None] = lambda reason, viewers: None,
    **settings_of: dict[str, object],
) -> InProcess:
    """A table that holds the catalogue, assessed, with trend scores by viewers; ``settings_of``: sections to change."""
    n = len(catalogue)
    sections: dict[str, dict[str, object]] = {
        "table": {"capacity": n + 64, "lease_ms": 3_600_000, "max_events_per_batch": 10_000},
        "retrieval": {"engine": engine},
        "serve": {"max_batch_rows": 256},
    }
    for name, changes in settings_of.items():
        sections[name] = {**sections.get(name, {}), **changes}
    settings = parse_settings(sections)  # type: ignore[arg-type]
    clock = ManualClock(NOW_MS)
    features = FeatureSet.load(settings.table.features_file)
    book = RuleBook.load(settings.rank.rules_file, features.names)
    search = make_engine(engine, settings.table.capacity, settings.table.embedding_dim, backend)
    world = build_world(settings, clock, features, book, backend, search, on_host)
    table, streams, pipeline = world.table, world.streams, world.pipeline
    for batch in event_batches(catalogue, NOW_MS):
        applied = table.apply(decode_batch(batch.SerializeToString(), settings.table).events, NOW_MS)
        streams.forget_changed_sessions(applied.touched)
    for first in range(0, table.rows, 16_384):
        streams.assess(np.arange(first, min(first + 16_384, table.rows), dtype=np.int32), NOW_MS)
    rows = np.arange(table.rows, dtype=np.int32)
    viewers = table.accumulators.viewers(table.rows)
    streams.set_trend(rows, viewers / np.float32(max(1.0, float(viewers.max(initial=0.0)))))
    order = np.argsort(-viewers, kind="stable").astype(np.int32)
    pipeline.snapshot = Snapshot(table, streams, settings.retrieval, NOW_MS, order)
    return InProcess(settings, clock, table, streams, pipeline)
