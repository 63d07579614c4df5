"""A synthetic table that `bench kernels` measures on: every row live, every column filled."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kernels import fence
from kernels.idmap import pack_ids
from server.config import RankSettings, TableSettings
from server.live.columns import Columns
from server.live.features import FeatureSet
from server.rules.rulebook import RuleBook

DIM = 64
LANGUAGES, CATEGORIES, CREATORS = 8, 20, 5_000
NOW_MS = 1_750_000_000_000
LEASE_MS = 15_000


class Bench:
    """A table of ``n`` live rows with everything the kernels read; deterministic."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.rng = rng = np.random.default_rng(n)
        embedding = rng.standard_normal((n, DIM)).astype(np.float32)
        embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
        self.columns = c = Columns.allocate(n, embedding)
        c.ids[:], c.id_lengths[:] = pack_ids([b"stream-%07d" % i for i in range(n)])
        c.creator[:] = rng.integers(1, CREATORS, n)
        c.language[:] = rng.integers(1, LANGUAGES, n)
        c.category[:] = rng.integers(1, CATEGORIES, n)
        c.state[:] = fence.LIVE
        c.epoch[:] = 1
        c.lease_expires_ms[:] = NOW_MS + LEASE_MS
        c.started_ms[:] = NOW_MS - rng.integers(0, 7_200_000, n)
        c.last_event_ms[:] = c.viewers_ms[:] = NOW_MS - rng.integers(0, 60_000, n)
        c.viewers[:] = rng.pareto(1.2, n) * 20
        c.counters[:] = rng.random(c.counters.shape)
        for registers in (c.viewer_registers, c.chatter_registers):
            registers[:] = rng.geometric(0.5, registers.shape)
        self.features = FeatureSet.load(TableSettings().features_file)
        self.book = RuleBook.load(RankSettings().rules_file, self.features.names)
        self.slots = np.arange(n, dtype=np.int32)

    def queries(self, batch: int) -> NDArray[np.float32]:
        """Unit vectors float32[batch, DIM]."""
        wanted = self.rng.standard_normal((batch, DIM)).astype(np.float32)
        unit: NDArray[np.float32] = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
        return unit

    def distinct(self, batch: int, width: int) -> NDArray[np.int32]:
        """int32[batch, width] slots, none twice in a row."""
        return np.stack([self.rng.permutation(self.n)[:width] for _ in range(batch)]).astype(np.int32)
