"""The filters of a tick on the device: which rows each may see, and its request-independent candidates."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.backend import Backend
from kernels.verify import FilterColumns
from kernels.verify_gpu import eligible_rows
from server.live.device import DeviceTable
from server.ranking.device_block import Block, Field
from server.retrieval.query import FilterKey
from server.retrieval.view import Snapshot, View

MAX_VIEWS = 64
"""Distinct filters of one tick that fit; 1 byte per row each."""
MAX_NAMES = 1024
"""Interned languages and categories that a filter on the device can name."""


class DeviceViews:
    """Up to MAX_VIEWS filters, built on first use in a tick. Owned by the engine thread.

    block.device: view_slots, view_sources int32[V, Wv]; f_region, f_max_age int32[V]; f_any_language,
    f_any_category uint8[V]; f_languages, f_categories uint8[V, MAX_NAMES].
    eligible: uint8[V, C].
    """

    def __init__(self, backend: Backend, table: DeviceTable, width: int) -> None:
        self._table, self._width = table, width
        names, v = (MAX_VIEWS, MAX_NAMES), (MAX_VIEWS,)
        self.block = Block(
            [
                Field("view_slots", np.int32, (MAX_VIEWS, width)), Field("view_sources", np.int32, (MAX_VIEWS, width)),
                Field("f_region", np.int32, v), Field("f_max_age", np.int32, v),
                Field("f_any_language", np.uint8, v), Field("f_any_category", np.uint8, v),
                Field("f_languages", np.uint8, names), Field("f_categories", np.uint8, names),
            ],
            backend,
        )  # fmt: skip
        self._column = backend.xp.zeros((MAX_VIEWS, table.capacity), np.uint8)
        self.eligible: Any = backend.view(self._column)
        self._places: dict[FilterKey, int] = {}
        self._tick: Snapshot | None = None

    def prepare(
        self, snapshot: Snapshot, keys: list[FilterKey], views: list[View], filters: FilterColumns, params: Any
    ) -> NDArray[np.int32] | None:
        """Places int32[V] of the batch's filters, uploading those that this tick has not seen yet.

        None when they do not fit: too many distinct filters, names or candidates for the device's buffers.
        """
        if self._tick is not snapshot or self._stale(snapshot):
            self._tick, self._places = snapshot, {}
        fresh = [v for v, key in enumerate(keys) if key not in self._places]
        if not self._fits(fresh, views, filters):
            return None
        for v in fresh:
            self._fill(len(self._places), views[v], filters, v)
            self._places[keys[v]] = len(self._places)
        if fresh:
            self.block.upload()
            on_device = self.block.device
            eligible_rows(
                self._table.columns, on_device["f_region"], on_device["f_max_age"], on_device["f_any_language"],
                on_device["f_languages"], on_device["f_any_category"], on_device["f_categories"], params,
                eligible=self.eligible,
            )  # fmt: skip
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
        host, n = self.block.host, len(view.slots)
        host["view_slots"][place, :n], host["view_slots"][place, n:] = view.slots, -1
        host["view_sources"][place, :n] = view.sources.view(np.int32)
        host["f_region"][place], host["f_max_age"][place] = filters.region[v], filters.max_age_rating[v]
        host["f_any_language"][place], host["f_any_category"][place] = filters.any_language[v], filters.any_category[v]
        for name, allowed in (("f_languages", filters.languages[v]), ("f_categories", filters.categories[v])):
            host[name][place] = 0
            host[name][place, : len(allowed)] = allowed
