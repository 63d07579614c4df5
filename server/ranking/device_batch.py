"""The buffers of one rank batch on the device: made once per bucket, filled, never allocated again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.backend import Backend
from kernels.tally_gpu import SIZE as TALLY_SIZE
from kernels.topk_gpu import TopkBuffers
from kernels.wire_gpu import ENTRY_BYTES
from server.config import Settings
from server.ranking.device_block import Block, Field
from server.ranking.device_views import MAX_VIEWS, PARAMS
from server.retrieval.query import QueryBatch
from server.retrieval.sources import Proposals
from server.retrieval.view import Snapshot

BUCKETS = (1, 8, 32, 64, 128, 256)
"""Batches are padded to the next of these: one captured graph each."""
EXCLUDED = 256
"""Streams that one request may exclude on the device."""
MOST_CANDIDATES = 1024
"""What the slate kernel takes without spilling registers (kernels/slate_gpu.py)."""
_PER_REQUEST = ("limits", "explore_slots", "creator_caps", "category_caps", "filter_of", "view_limits")


@dataclass(frozen=True)
class Widths:
    """Fixed lengths, from the settings; a batch that needs more is ranked on the host.

    personal, followed, view: proposals per request of each kind; merged: all of them, a power of two.
    shown: the longest slate; picks: with its reserve.
    """

    personal: int
    followed: int
    view: int
    merged: int
    picks: int
    shown: int

    @classmethod
    def of(cls, settings: Settings) -> Widths:
        """As narrow as the settings allow: views get room for 16 categories and 16 languages, or what is left."""
        retrieval, rank = settings.retrieval, settings.rank
        personal, followed = max(retrieval.personal, 1), max(retrieval.followed, 1)
        wanted = personal + followed + retrieval.trending + retrieval.fresh + 32 * retrieval.trending_per_group
        merged = min(MOST_CANDIDATES, 1 << (wanted - 1).bit_length())
        view = max(1, merged - personal - followed)
        return cls(personal, followed, view, merged, rank.max_limit + rank.reserve, rank.max_limit)


class RankBuffers:
    """One bucket of ``batch`` requests.

    inputs, outputs: `Block`s, one copy each way. work: name → torch tensor, what stays on the device. topk: scratch
    of the search. graph: the captured queue of kernels, once there is one.
    """

    def __init__(self, batch: int, widths: Widths, settings: Settings, backend: Backend) -> None:
        b, w, dim = batch, widths, settings.table.embedding_dim
        self.batch, self.widths = batch, widths
        self.inputs = Block(
            [
                Field("params", np.int64, (PARAMS,)), Field("queries", np.float32, (b, dim)),
                *(Field(name, np.int32, (b,)) for name in _PER_REQUEST),
                Field("seeds", np.int64, (b,)), Field("diversity", np.float32, (b,)),
                Field("weights", np.float32, (6, b)), Field("followed", np.int32, (b, w.followed)),
                Field("excluded", np.int32, (b, EXCLUDED)),
            ],
            backend,
        )  # fmt: skip
        self.outputs = Block(
            [
                Field("wire", np.uint8, (b, w.shown * ENTRY_BYTES)), Field("wire_lengths", np.int32, (b,)),
                Field("slots", np.int32, (b, w.shown)), Field("scores", np.float32, (b, w.shown)),
                Field("sources", np.int32, (b, w.shown)), Field("exploration", np.float32, (b, w.shown)),
                Field("counts", np.int32, (b,)), Field("pick_slots", np.int32, (b, w.picks)),
                Field("drops", np.uint8, (b, w.picks)), Field("unproven", np.uint8, (b,)),
                Field("tally", np.int32, (TALLY_SIZE,)),
            ],
            backend,
        )  # fmt: skip
        shapes: dict[str, tuple[Any, tuple[int, ...]]] = {
            "personal": (np.int32, (b, w.personal)), "personal_scores": (np.float32, (b, w.personal)),
            "slots": (np.int32, (b, w.merged)), "sources": (np.int32, (b, w.merged)),
            "merged": (np.int32, (b,)), "dropped": (np.int32, (b,)),
            "utility": (np.float32, (b, w.merged)), "similarity": (np.float32, (b, w.merged)),
            "order": (np.int64, (b, w.merged)), "picks": (np.int32, (b, w.picks)),
            "exploration": (np.float32, (b, w.picks)), "n_slate": (np.int32, (b,)), "n_reserve": (np.int32, (b,)),
            "outcome": (np.uint8, (b, w.merged)),
        }  # fmt: skip
        self._columns = {name: backend.xp.zeros(shape, dtype) for name, (dtype, shape) in shapes.items()}
        self.work: dict[str, torch.Tensor] = {name: backend.view(column) for name, column in self._columns.items()}
        device = self.work["slots"].device
        self.topk = TopkBuffers.allocate(b, w.personal, settings.table.capacity, dim, MAX_VIEWS, device)
        self.graph: Any = None

    def fill(
        self,
        batch: QueryBatch,
        places: NDArray[np.int32],
        view_limits: NDArray[np.int32],
        personal_limit: int,
        followed: Proposals,
        snapshot: Snapshot,
    ) -> None:
        """Writes a batch into the host side; the rows behind it become requests that want nothing.

        Args:
            places: int32[V], where the batch's filters are among the tick's.
            view_limits: int32[B], personal_limit: how many candidates of each kind are scored.
        """
        self.inputs.settle()
        n, host = len(batch), self.inputs.host
        exclude_bits, fresh_age_ms = snapshot.streams.book.exclude_bits, snapshot.settings.fresh_age_ms
        # The first is the time of the last check: set when the batch starts.
        host["params"][1:] = (
            snapshot.rows, n, exclude_bits, fresh_age_ms, snapshot.now_ms, personal_limit, int(places.max()) + 1,
        )  # fmt: skip
        host["view_limits"][:n], host["view_limits"][n:] = view_limits, 0
        host["queries"][:n], host["queries"][n:] = batch.queries, 0.0
        for name in ("limits", "explore_slots", "creator_caps", "category_caps"):
            host[name][:n], host[name][n:] = getattr(batch, name), int(name.endswith("caps"))
        host["filter_of"][:n], host["filter_of"][n:] = places[batch.filter_of], 0
        host["seeds"][:n], host["seeds"][n:] = batch.seeds.view(np.int64), 0
        host["diversity"][:n], host["diversity"][n:] = batch.diversity, 0.0
        host["weights"][:, :n], host["weights"][:, n:] = np.stack(batch.weights), 0.0
        _fill_ragged(host["followed"], followed.slots, followed.offsets)
        _fill_ragged(host["excluded"], batch.excluded, batch.excluded_offsets)

    def fits(self, batch: QueryBatch) -> bool:
        """Whether a batch's lists fit the fixed widths."""
        return bool(
            np.diff(batch.excluded_offsets).max(initial=0) <= EXCLUDED
            and batch.limits.max(initial=0) <= self.widths.shown
        )


def bucket_of(viewers: int) -> int | None:
    """The bucket of a batch; None when it is larger than all."""
    return next((bucket for bucket in BUCKETS if viewers <= bucket), None)


def _fill_ragged(out: NDArray[np.int32], values: NDArray[np.int32], offsets: NDArray[np.int64]) -> None:
    """Rows of ``values`` into ``out`` int32[B, W], padded with -1; one assignment for all rows."""
    out[:] = -1
    lengths = np.diff(offsets)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    out[rows, np.arange(len(values)) - np.repeat(offsets[:-1], lengths)] = values
