"""Candidate sources. To add one, write one function here and decorate it; nothing else changes.

A view source depends only on the filter and is run once per tick and filter. A query source depends on
the request and is run once per batch. Both see only eligible rows: filters apply inside, never after.
The place of a source in `SOURCES` is its bit in RankedStream.sources; replies carry the names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernels.groups import eligible_members, first_eligible, first_of_groups
from server.retrieval.base import SearchEngine
from server.retrieval.query import QueryBatch
from server.retrieval.view import Snapshot

Slots = NDArray[np.int32]
ViewSource = Callable[[Snapshot, NDArray[np.bool_]], Slots]
"""(snapshot, eligible bool[rows]) → slots int32[m], best first."""


@dataclass(frozen=True)
class Proposals:
    """What a query source found: slots int32[T], query b's are offsets[b] to offsets[b + 1]."""

    slots: Slots
    offsets: NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """What query sources work on. eligible bool[V, rows]; query b uses eligible[filter_of[b]], filter_of int32[B].

    quality: share of its candidates that a source is asked for, in (0, 1]. least: never fewer than this many.
    """

    queries: QueryBatch
    snapshot: Snapshot
    eligible: NDArray[np.bool_]
    filter_of: NDArray[np.int32]
    search: SearchEngine
    quality: float = 1.0
    least: int = 0

    def share(self, most: int) -> int:
        """How many of ``most`` candidates to propose."""
        return most if self.quality >= 1.0 else min(most, max(self.least, math.ceil(self.quality * most)))


QuerySource = Callable[[Batch], Proposals]


@dataclass(frozen=True)
class Source:
    """A registered source; exactly one of the two functions is set."""

    name: str
    view: ViewSource | None = None
    query: QuerySource | None = None


SOURCES: list[Source] = []


def view_source(name: str) -> Callable[[ViewSource], ViewSource]:
    """Registers a source that depends only on the filter."""

    def register(function: ViewSource) -> ViewSource:
        SOURCES.append(Source(name, view=function))
        return function

    return register


def query_source(name: str) -> Callable[[QuerySource], QuerySource]:
    """Registers a source that depends on the request."""

    def register(function: QuerySource) -> QuerySource:
        SOURCES.append(Source(name, query=function))
        return function

    return register


def bit_of(name: str) -> int:
    """The bit of a registered source."""
    return 1 << next(i for i, source in enumerate(SOURCES) if source.name == name)


@query_source("personal")
def personal(batch: Batch) -> Proposals:
    """Streams closest to the viewer's embedding."""
    queries, k = batch.queries, batch.share(batch.snapshot.settings.personal)
    counts = np.zeros(len(queries), np.int64)
    asked = np.flatnonzero(queries.has_embedding)
    if not len(asked) or k == 0:
        return Proposals(np.zeros(0, np.int32), _offsets(counts))
    # Whole columns where everybody asks: picking from them copies.
    some = slice(None) if len(asked) == len(queries) else asked
    slots = batch.search.search(queries.queries[some], batch.eligible, batch.filter_of[some], k).slots
    if (slots[:, -1] >= 0).all():  # padding is at the end
        counts[some] = k
        return Proposals(slots.ravel(), _offsets(counts))
    found = slots >= 0
    counts[some] = found.sum(axis=1)
    return Proposals(slots[found], _offsets(counts))


@view_source("trending")
def trending(snapshot: Snapshot, eligible: NDArray[np.bool_]) -> Slots:
    """Highest trend scores overall."""
    return first_eligible(snapshot.trend_order, eligible, snapshot.settings.trending)


@view_source("trending_in_category")
def trending_in_category(snapshot: Snapshot, eligible: NDArray[np.bool_]) -> Slots:
    """Highest trend scores of each category."""
    return first_of_groups(snapshot.trending_by("category"), eligible, snapshot.settings.trending_per_group)


@view_source("trending_in_language")
def trending_in_language(snapshot: Snapshot, eligible: NDArray[np.bool_]) -> Slots:
    """Highest trend scores of each language."""
    return first_of_groups(snapshot.trending_by("language"), eligible, snapshot.settings.trending_per_group)


@query_source("followed")
def followed(batch: Batch) -> Proposals:
    """Live streams of creators the viewer follows."""
    queries, snapshot = batch.queries, batch.snapshot
    if not len(queries.followed):
        return Proposals(np.zeros(0, np.int32), np.zeros(len(queries) + 1, np.int64))
    return Proposals(
        *eligible_members(
            snapshot.by_creator, queries.followed, queries.followed_offsets, batch.eligible, batch.filter_of,
            snapshot.settings.followed,
        )
    )  # fmt: skip


@view_source("fresh")
def fresh(snapshot: Snapshot, eligible: NDArray[np.bool_]) -> Slots:
    """Young streams that few have seen."""
    return first_eligible(snapshot.fresh_order, eligible, snapshot.settings.fresh)


def _offsets(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets
