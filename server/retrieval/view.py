"""What does not depend on the single request, computed once per tick: the snapshot, and per filter a view."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kernels.eligibility import FilterColumns, eligible_rows
from kernels.groups import Grouped, by_group
from kernels.merge import Views
from server.config import RetrievalSettings
from server.live.table import LiveTable
from server.retrieval.query import FilterKey
from server.retrieval.streams import StreamState


@dataclass(frozen=True)
class View:
    """Candidates for one filter: eligible bool[rows], and the request-independent sources' proposals.

    slots int32[m], sources uint32[m], by their place in the list of the source that ranks them highest, as a
    share of its length: any prefix holds the best of every source.
    """

    eligible: NDArray[np.bool_]
    slots: NDArray[np.int32]
    sources: NDArray[np.uint32]


MOST_JOINED = 64
"""Filters that are kept joined; with more in a tick they are joined anew now and then."""


@dataclass(frozen=True)
class JoinedViews:
    """The views of several filters as columns: row v of everything belongs to filter v.

    places: v of each filter. lists: the views' candidates. eligible: bool[V, rows], read-only. filters: their names
    looked up, when the interners had ``numbering``.
    """

    places: dict[FilterKey, int]
    lists: Views
    eligible: NDArray[np.bool_]
    filters: FilterColumns
    numbering: int

    def rows_of(self, keys: list[FilterKey], filter_of: NDArray[np.int32]) -> NDArray[np.int32]:
        """int32[B], the row of each request's filter; ``filter_of`` is the index of it in ``keys``."""
        return np.array([self.places[key] for key in keys], np.int32)[filter_of]


@dataclass
class Snapshot:
    """The table as of one tick. Views are built on first use and kept until the next tick."""

    table: LiveTable
    streams: StreamState
    settings: RetrievalSettings
    now_ms: int
    trend_order: NDArray[np.int32]
    """Rows by trend score, best first, as of the last refresh; newer rows are not in it."""
    views: dict[FilterKey, View] = field(default_factory=dict)

    _joined: JoinedViews | None = None
    _trending_by: dict[str, Grouped] = field(default_factory=dict)

    rows: int = field(init=False)
    """Rows of the table at that moment: events of this tick may add more, and views must fit together."""

    def __post_init__(self) -> None:
        self.rows = self.table.rows

    @cached_property
    def showable(self) -> NDArray[np.bool_]:
        """bool[rows]: passes everything that does not depend on the viewer."""
        bits = self.streams.rule_bits[: self.rows] & np.uint32(self.streams.book.exclude_bits)
        return self.table.live_mask(self.now_ms)[: self.rows] & (bits == 0)

    @cached_property
    def viewers(self) -> NDArray[np.float32]:
        """float32[rows, at least 1]: viewers last reported; an empty table is answered, too."""
        return self.table.accumulators.viewers(max(1, self.rows))

    @cached_property
    def popular(self) -> NDArray[np.int32]:
        """Slots by viewers, most first, at most 1,000: the list for when there is no time to rank."""
        slots = np.flatnonzero(self.showable).astype(np.int32)
        return slots[np.argsort(-self.viewers[slots], kind="stable")][:1000]

    @cached_property
    def fresh_order(self) -> NDArray[np.int32]:
        """Young rows, least exposed first, then newest."""
        started_ms = self.table.columns.started_ms[: self.rows]
        slots = np.flatnonzero(self.showable & (started_ms > self.now_ms - self.settings.fresh_age_ms))
        by = np.lexsort((slots, -started_ms[slots], self.streams.exposures[slots]))
        return slots[by].astype(np.int32)

    @cached_property
    def by_creator(self) -> Grouped:
        """Showable rows by creator, lower slots first."""
        slots = np.flatnonzero(self.showable).astype(np.int32)
        return by_group(slots, self.table.columns.creator, len(self.table.creators))

    def trending_by(self, attribute: Literal["category", "language"]) -> Grouped:
        """The order by trend score, by category or language."""
        grouped = self._trending_by.get(attribute)
        if grouped is None or grouped.order is not self.trend_order:  # new scores came within the tick
            names = self.table.categories if attribute == "category" else self.table.languages
            grouped = by_group(self.trend_order, getattr(self.table.columns, attribute), len(names))
            self._trending_by[attribute] = grouped
        return grouped

    def rescored(self, trend_order: NDArray[np.int32]) -> None:
        """Other scores came within the tick: another order, and other views."""
        self.trend_order, self.views, self._joined = trend_order, {}, None

    def joined(self, keys: list[FilterKey], build: Callable[[FilterColumns, int], View]) -> JoinedViews:
        """The views of at least ``keys``, joined at most once for each new filter of a tick.

        Args:
            build: makes the view of a filter that has none yet, row v of these columns.
        """
        joined = self._joined
        if joined is None or any(key not in joined.places for key in keys):
            every = list(dict.fromkeys((*joined.places, *keys))) if joined is not None else keys
            self._joined = joined = self._join(every if len(every) <= MOST_JOINED else keys, build)
        elif joined.numbering != self._numbering():
            filters = self.filter_columns(list(joined.places))
            self._joined = joined = replace(joined, filters=filters, numbering=self._numbering())
        return joined

    def _join(self, keys: list[FilterKey], build: Callable[[FilterColumns, int], View]) -> JoinedViews:
        filters = self.filter_columns(keys)
        for v, key in enumerate(keys):
            if key not in self.views:
                self.views[key] = build(filters, v)
        views = [self.views[key] for key in keys]
        starts = np.cumsum([0, *(len(view.slots) for view in views)], dtype=np.int64)
        lists = Views(np.concatenate([v.slots for v in views]), np.concatenate([v.sources for v in views]), starts)
        eligible = np.stack([view.eligible for view in views])
        eligible.flags.writeable = False
        places = {key: v for v, key in enumerate(keys)}
        return JoinedViews(places, lists, eligible, filters, self._numbering())

    def _numbering(self) -> int:
        """Another one as soon as a name has another number: counts of changes only grow."""
        table = self.table
        return table.languages.changes + table.categories.changes + table.regions.changes

    def filter_columns(self, keys: list[FilterKey]) -> FilterColumns:
        """The filters with their names looked up; names nobody has used match nothing."""
        table = self.table
        languages = np.zeros((len(keys), len(table.languages)), np.bool_)
        categories = np.zeros((len(keys), len(table.categories)), np.bool_)
        region = np.full(len(keys), -1, np.int32)
        for v, key in enumerate(keys):
            languages[v, table.languages.find(key.languages)] = True
            categories[v, table.categories.find(key.categories)] = True
            for number in table.regions.find([key.region] if key.region else []):
                region[v] = number
        return FilterColumns(
            region=region,
            max_age_rating=np.array([k.max_age_rating for k in keys], np.int32),
            any_language=np.array([not k.languages for k in keys], np.bool_),
            languages=languages,
            any_category=np.array([not k.categories for k in keys], np.bool_),
            categories=categories,
        )

    def eligible(self, filters: FilterColumns, v: int) -> NDArray[np.bool_]:
        """bool[rows] for row ``v`` of ``filters``: the predicate of the last check, as of this tick."""
        return eligible_rows(self.streams.row_columns(), self.showable, filters, v)
