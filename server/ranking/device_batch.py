"""The buffers of one rank batch on the device: made once per bucket, filled, never allocated again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.backend import Backend
from kernels.topk_gpu import TopkBuffers
from kernels.wire_gpu import ENTRY_BYTES
from server.config import Settings
from server.ranking.device_block import Block, Field
from server.ranking.device_views import MAX_VIEWS
from server.retrieval.query import QueryBatch
from server.retrieval.sources import SOURCES, Proposals

BUCKETS = (1, 8, 32, 64, 128, 256)
"""Batches are padded to the next of these: one captured graph each."""
NOW_MS, ROWS, REQUESTS, EXCLUDE_BITS, FRESH_AGE_MS = range(5)  # places in ``params``


@dataclass(frozen=True)
class Widths:
    """Fixed lengths, from the settings: no batch may need more than it was given.

    personal, followed, excluded, view: proposals per request of each kind. merged: all of them, padded to a
    power of two. picks: slate and reserve. shown: the longest slate.
    """

    personal: int
    followed: int
    excluded: int
    view: int
    merged: int
    picks: int
    shown: int

    @classmethod
    def of(cls, settings: Settings) -> Widths:
        """Widths that fit the settings; long view lists are given what is left of 2,048 candidates."""
        retrieval, rank = settings.retrieval, settings.rank
        personal, followed = max(retrieval.personal, 1), max(retrieval.followed, 1)
        excluded = 256
        wanted = retrieval.trending + retrieval.fresh + 16 * 2 * retrieval.trending_per_group
        merged = 512
        while merged < personal + followed + wanted and merged < 2048:
            merged *= 2
        return cls(
            personal=personal,
            followed=followed,
            excluded=excluded,
            view=merged - personal - followed,
            merged=merged,
            picks=rank.max_limit + rank.reserve,
            shown=rank.max_limit,
        )


class RankBuffers:
    """One bucket of ``batch`` requests.

    inputs, outputs: `Block`s, one copy each way. work: everything between, torch tensors on the device.
    """

    def __init__(self, batch: int, widths: Widths, settings: Settings, backend: Backend) -> None:
        b, w = batch, widths
        dim = settings.table.embedding_dim
        per_request = [(name, np.int32) for name in _INT32]
        self.batch, self.widths = batch, widths
        self.inputs = Block(
            [
                Field("params", np.int64, (8,)), Field("queries", np.float32, (b, dim)),
                *(Field(name, dtype, (b,)) for name, dtype in per_request),
                Field("seeds", np.int64, (b,)), Field("diversity", np.float32, (b,)),
                Field("weights", np.float32, (6, b)), Field("followed", np.int32, (b, w.followed)),
                Field("excluded", np.int32, (b, w.excluded)),
            ],
            backend,
        )  # fmt: skip
        self.outputs = Block(
            [
                Field("wire", np.uint8, (b, w.shown * ENTRY_BYTES)), Field("wire_lengths", np.int32, (b,)),
                Field("slots", np.int32, (b, w.shown)), Field("scores", np.float32, (b, w.shown)),
                Field("sources", np.int32, (b, w.shown)), Field("exploration", np.float32, (b, w.shown)),
                Field("counts", np.int32, (b,)), Field("drops", np.uint8, (b, w.picks)),
                Field("pick_slots", np.int32, (b, w.picks)), Field("pick_scores", np.float32, (b, w.picks)),
                Field("pick_sources", np.int32, (b, w.picks)), Field("pick_exploration", np.float32, (b, w.picks)),
                Field("n_picks", np.int32, (b,)), Field("unproven", np.uint8, (b,)), Field("tally", np.int32, (64,)),
            ],
            backend,
        )  # fmt: skip
        device = torch.device("cuda" if backend.on_gpu else "cpu")
        self.topk = TopkBuffers.allocate(b, w.personal, device)
        self.graph: Any = None

    def fill(
        self, batch: QueryBatch, places: NDArray[np.int32], followed: Proposals, now_ms: int, rows: int,
        exclude_bits: int, fresh_age_ms: int,
    ) -> None:  # fmt: skip
        """Writes a batch into the host side; the rows behind it become requests that want nothing."""
        n, host = len(batch), self.inputs.host
        host["params"][:5] = (now_ms, rows, n, exclude_bits, fresh_age_ms)
        host["queries"][:n], host["queries"][n:] = batch.queries, 0.0
        for name in ("limits", "explore_slots", "creator_caps", "category_caps"):
            host[name][:n], host[name][n:] = getattr(batch, name), int(name.endswith("caps"))
        host["filter_of"][:n], host["filter_of"][n:] = places[batch.filter_of], 0
        host["seeds"][:n] = batch.seeds.view(np.int64)
        host["diversity"][:n], host["diversity"][n:] = batch.diversity, 0.0
        host["weights"][:, :n], host["weights"][:, n:] = np.stack(batch.weights), 0.0
        _fill_ragged(host["followed"], followed.slots, followed.offsets)
        _fill_ragged(host["excluded"], batch.excluded, batch.excluded_offsets)


_INT32 = ("limits", "explore_slots", "creator_caps", "category_caps", "filter_of")


def fits(batch: QueryBatch, widths: Widths) -> bool:
    """Whether a batch's ragged lists fit the fixed widths."""
    return bool(
        len(batch) <= BUCKETS[-1]
        and len(batch.filters) <= MAX_VIEWS
        and np.diff(batch.excluded_offsets).max(initial=0) <= widths.excluded
        and batch.limits.max(initial=0) <= widths.shown
    )


def _fill_ragged(out: NDArray[np.int32], values: NDArray[np.int32], offsets: NDArray[np.int64]) -> None:
    """Rows of ``values`` into ``out`` int32[B, W], padded with -1; one assignment for all rows."""
    out[:] = -1
    lengths = np.diff(offsets)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    out[rows, np.arange(len(values)) - np.repeat(offsets[:-1], lengths)] = values


assert len(SOURCES) <= 31  # source bits are signed on the device
