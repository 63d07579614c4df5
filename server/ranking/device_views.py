"""The filters of a tick on the device: which rows each may see, and its request-independent candidates."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.backend import Backend
from kernels.eligibility import FilterColumns
from kernels.verify_gpu import FilterTensors, RowTensors, eligible_rows
from server.live.device import DeviceTable
from server.ranking.device_block import Block, Field
from server.retrieval.query import FilterKey
from server.retrieval.view import Snapshot, View

MAX_VIEWS = 64
"""Distinct filters of one tick that fit; a byte per row of the table each."""
MAX_NAMES = 1024
"""Interned languages and categories that a filter on the device can name."""
PARAMS = 8


class DeviceViews:
    """Up to MAX_VIEWS filters, built on first use in a tick. Owned by the engine thread.

    Args:
        width: Wv, candidates that a view may have.

    Attributes:
        view_slots, view_sources: int32[V, Wv]. filters: V filters. rows: the columns that decide who may be shown.
        eligible: uint8[V, C].
    """

    def __init__(self, backend: Backend, table: DeviceTable, width: int) -> None:
        self._width = width
        names, v = (MAX_VIEWS, MAX_NAMES), (MAX_VIEWS,)
        self._block = Block(
            [
                Field("params", np.int64, (PARAMS,)),
                Field("slots", np.int32, (MAX_VIEWS, width)), Field("sources", np.int32, (MAX_VIEWS, width)),
                Field("region", np.int32, v), Field("max_age_rating", np.int32, v),
                Field("any_language", np.uint8, v), Field("languages", np.uint8, names),
                Field("any_category", np.uint8, v), Field("categories", np.uint8, names),
            ],
            backend,
        )  # fmt: skip
        on_device = self._block.device
        self.view_slots, self.view_sources = on_device["slots"], on_device["sources"]
        self.filters = FilterTensors(*(on_device[name] for name in FilterTensors._fields))
        self.rows = RowTensors(*(table.tensors[name] for name in RowTensors._fields))
        self._column = backend.xp.zeros((MAX_VIEWS, table.capacity), np.uint8)
        self.eligible: Any = backend.view(self._column)
        self._places: dict[FilterKey, int] = {}
        self._tick: Snapshot | None = None

    def prepare(
        self, snapshot: Snapshot, keys: list[FilterKey], views: list[View], filters: FilterColumns
    ) -> NDArray[np.int32] | None:
        """Places int32[V] of the batch's filters, uploading those that this tick has not seen yet.

        None when they do not fit: too many distinct filters, names or candidates for the device's buffers.
        """
        if self._tick is not snapshot or self._stale(snapshot):
            self._tick, self._places = snapshot, {}
        fresh = [v for v, key in enumerate(keys) if key not in self._places]
        if not self._fits(fresh, views, filters):
            return None
        if fresh:
            self._block.settle()
        for v in fresh:
            self._fill(len(self._places), views[v], filters, v)
            self._places[keys[v]] = len(self._places)
        if fresh:
            exclude_bits = snapshot.streams.book.exclude_bits
            self._block.host["params"][:4] = (snapshot.now_ms, snapshot.rows, len(self._places), exclude_bits)
            self._block.upload()
            eligible_rows(self.rows, self.filters, self._block.device["params"], eligible=self.eligible)
        return np.array([self._places[key] for key in keys], np.int32)

    def _stale(self, snapshot: Snapshot) -> bool:
        """New trend scores cleared the snapshot's views: what was uploaded holds the old candidates."""
        return any(key not in snapshot.views for key in self._places)

    def _fits(self, fresh: list[int], views: list[View], filters: FilterColumns) -> bool:
        return (
            len(self._places) + len(fresh) <= MAX_VIEWS
            and max(filters.languages.shape[1], filters.categories.shape[1]) <= MAX_NAMES
            and all(len(views[v].slots) <= self._width for v in fresh)
        )

    def _fill(self, place: int, view: View, filters: FilterColumns, v: int) -> None:
        host, n = self._block.host, len(view.slots)
        host["slots"][place, :n], host["slots"][place, n:] = view.slots, -1
        host["sources"][place, :n] = view.sources.view(np.int32)
        for name in ("region", "max_age_rating", "any_language", "any_category"):
            host[name][place] = getattr(filters, name)[v]
        for name, allowed in (("languages", filters.languages[v]), ("categories", filters.categories[v])):
            host[name][place] = 0
            host[name][place, : len(allowed)] = allowed
