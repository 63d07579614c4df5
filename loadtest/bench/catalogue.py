"""N synthetic streams and the viewers who ask for them: the same for every server that a bench compares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from liverank.v1 import ingest_pb2, ranking_pb2
from numpy.typing import NDArray

DIM, CREATORS = 64, 5_000
LANGUAGES, CATEGORIES = ("en", "de", "fr", "ja", "id"), tuple(f"category-{i}" for i in range(20))
LIMIT = 50
_BATCH_STREAMS = 2_000


@dataclass(frozen=True)
class Catalogue:
    """N streams as columns; stream i is ``stream_id(i)``.

    creator, language, category int32[N] (indices), embedding float32[N, 64] (not of unit length),
    viewers int32[N], age_ms int64[N] (since the stream started).
    """

    creator: NDArray[np.int32]
    language: NDArray[np.int32]
    category: NDArray[np.int32]
    embedding: NDArray[np.float32]
    viewers: NDArray[np.int32]
    age_ms: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.creator)


def make_catalogue(streams: int, oldest_ms: int = 0, seed: int = 0) -> Catalogue:
    """Streams with Pareto-distributed viewers. Their starts are spread evenly over ``oldest_ms``; 0: all just began."""
    rng = np.random.default_rng(seed)
    numbers = np.arange(streams, dtype=np.int32)
    return Catalogue(
        creator=numbers % CREATORS,
        language=numbers % len(LANGUAGES),
        category=numbers % len(CATEGORIES),
        embedding=rng.standard_normal((streams, DIM)).astype(np.float32),
        viewers=(rng.pareto(1.2, streams) * 20).clip(max=1e6).astype(np.int32),
        age_ms=(rng.random(streams) * oldest_ms).astype(np.int64),
    )


def stream_id(number: int) -> str:
    """14 bytes."""
    return f"stream-{number:07}"


def event_batches(catalogue: Catalogue, now_ms: int) -> Iterator[ingest_pb2.EventBatch]:
    """A start and a viewer count per stream. ``now_ms``: Unix epoch."""
    for first in range(0, len(catalogue), _BATCH_STREAMS):
        events = []
        for i in range(first, min(first + _BATCH_STREAMS, len(catalogue))):
            started_ms = now_ms - int(catalogue.age_ms[i])
            start = ingest_pb2.Event(sequence=2 * i + 1, stream_id=stream_id(i), epoch=1, event_time_ms=started_ms)
            start.started.creator_id = f"creator-{catalogue.creator[i]}"
            start.started.title = f"Stream number {i}"
            start.started.language = LANGUAGES[catalogue.language[i]]
            start.started.category = CATEGORIES[catalogue.category[i]]
            start.started.embedding.extend(catalogue.embedding[i])
            count = ingest_pb2.Event(sequence=2 * i + 2, stream_id=stream_id(i), event_time_ms=now_ms)
            count.viewer_count.count = int(catalogue.viewers[i])
            events += [start, count]
        yield ingest_pb2.EventBatch(producer_id="bench", events=events)


def rank_requests(count: int, seed: int = 0) -> list[ranking_pb2.RankRequest]:
    """Viewers with an embedding who want 50 streams; one in three wants them in one language."""
    rng = np.random.default_rng(seed)
    return [
        ranking_pb2.RankRequest(
            request_id=f"r{i}",
            viewer_id=f"v{i}",
            viewer_embedding=rng.standard_normal(DIM).astype(np.float32),
            limit=LIMIT,
            languages=[LANGUAGES[i % len(LANGUAGES)]] if i % 3 == 0 else [],
        )
        for i in range(count)
    ]


def as_bytes(requests: list[ranking_pb2.RankRequest]) -> list[bytes]:
    """Serialised once, so that sending costs the load generator little."""
    return [request.SerializeToString() for request in requests]


def as_batches(requests: list[ranking_pb2.RankRequest], viewers: int) -> list[bytes]:
    """Serialised RankBatchRequests of ``viewers`` each, starting at different requests."""
    starts = range(0, len(requests), max(1, len(requests) // 4))
    return [
        ranking_pb2.RankBatchRequest(
            requests=[requests[(start + j) % len(requests)] for j in range(viewers)]
        ).SerializeToString()
        for start in starts
    ]
