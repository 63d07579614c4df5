"""Merge, slate selection, last check and wire encoding on the GPU against their floors.

A floor is the greater of bytes over copy bandwidth and flops over arithmetic rate, both those of an H100: bytes that
the kernel must read and write once (scattered reads count as the bytes used), flops of the float32 arithmetic that
its result needs. Merge and the ordering of candidates compare integers: bytes alone are their floor.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.idmap import id_words
from kernels.merge_gpu import merge_candidates
from kernels.slate_gpu import select_slates
from kernels.tally_gpu import SIZE, tally
from kernels.verify_gpu import FilterTensors, RowTensors, eligible_rows, verify_picks
from kernels.wire_gpu import ENTRY_BYTES, encode_streams

COPY_BYTES_PER_S = 3.0e12
FLOPS_PER_S = 60e12
NOW_MS = 1_760_000_000_000
PERSONAL, FOLLOWED, FRESH = 1 << 0, 1 << 4, 1 << 5
LANGUAGES, CATEGORIES = 40, 200
_SIGNED = {np.dtype(np.uint32): np.int32, np.dtype(np.uint64): np.int64, np.dtype(np.bool_): np.uint8}


@dataclass(frozen=True)
class SlateSize:
    """One measurement: ``batch`` requests of ``candidates`` each over a table of ``rows``."""

    batch: int
    candidates: int = 512
    dim: int = 64
    rows: int = 100_000
    limit: int = 50
    reserve: int = 20
    filters: int = 16
    runs: int = 50


SIZES = tuple(SlateSize(batch) for batch in (1, 32, 256))
SMOKE_SIZES = (SlateSize(2, candidates=24, dim=8, rows=60, limit=5, reserve=2, filters=2, runs=1),)


@dataclass(frozen=True)
class _Case:
    kernel: str
    run: Callable[[], None]
    bytes: int
    flops: int = 0


def slate_rows(device: torch.device | str, sizes: Sequence[SlateSize] = SIZES) -> list[dict[str, Any]]:
    """A row per kernel and size: median time, floor and their ratio.

    Keys: kernel, b, k, d, n, us, floor_us, bound ("bytes" or "flops"), bytes, flops, ratio, runs. On a CUDA device
    each run is timed by events with the launches in a graph, as they are served; elsewhere by the clock, which says
    that everything runs and nothing about speed.
    """
    device = torch.device(device)
    return [_row(case, size, device) for size in sizes for case in _Batch(size, device).cases()]


def _row(case: _Case, size: SlateSize, device: torch.device) -> dict[str, Any]:
    us = statistics.median(_times_us(case.run, size.runs, device))
    bytes_us, flops_us = case.bytes / COPY_BYTES_PER_S * 1e6, case.flops / FLOPS_PER_S * 1e6
    floor_us = max(bytes_us, flops_us)
    return {
        "kernel": case.kernel, "b": size.batch, "k": size.candidates, "d": size.dim, "n": size.rows,
        "us": round(us, 2), "floor_us": round(floor_us, 4), "bound": "bytes" if bytes_us >= flops_us else "flops",
        "bytes": case.bytes, "flops": case.flops, "ratio": round(us / floor_us, 2), "runs": size.runs,
    }  # fmt: skip


def _times_us(run: Callable[[], None], runs: int, device: torch.device) -> list[float]:
    run()  # compiles
    if device.type != "cuda":
        return [_clocked_us(run) for _ in range(runs)]
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    taken: list[float] = []
    for _ in range(runs):
        begun.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        taken.append(begun.elapsed_time(ended) * 1e3)
    return taken


def _clocked_us(run: Callable[[], None]) -> float:
    begun_s = time.perf_counter()
    run()
    return (time.perf_counter() - begun_s) * 1e6


class _Batch:
    """Columns of a table and of a batch, and buffers for all results; each kernel reads what those before it wrote."""

    def __init__(self, size: SlateSize, device: torch.device) -> None:
        self.size, self.device = size, device
        rng = np.random.default_rng(1)
        b, n, k = size.batch, size.rows, size.candidates
        names = np.char.encode([f"stream-{row:09d}-{'x' * 10}" for row in rng.permutation(n)])
        ids = np.array(names, "S64").view(np.uint8).reshape(n, 64)
        embeddings = (
            rng.standard_normal((n, size.dim)) + 2 * rng.standard_normal((20, size.dim))[rng.integers(0, 20, n)]
        )
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
        self.view_width, self.personal_width = k // 2, k // 4
        self.followed_width = k - self.view_width - self.personal_width
        put = self._put
        self.embeddings, self.id_words = put(embeddings.astype(np.float32)), put(id_words(ids))
        self.id_lengths = put(np.full(n, len(names[0]), np.uint8))
        self.epochs, self.creators = put(np.ones(n, np.int64)), put(rng.integers(0, n, n, dtype=np.int32))
        zeros = np.zeros(n, np.int32)
        self.rows = RowTensors(
            put(np.ones(n, np.uint8)), put(NOW_MS + rng.integers(-1_000, 20_000, n)),
            put(zeros), put(zeros), put(zeros),
            put(rng.integers(0, LANGUAGES, n, dtype=np.int32)), put(rng.integers(0, CATEGORIES, n, dtype=np.int32)),
        )  # fmt: skip
        v = size.filters
        self.filters = FilterTensors(
            put(np.full(v, -1, np.int32)), put(np.full(v, 18, np.int32)),
            put(np.arange(v) % 2 == 0), put(rng.random((v, LANGUAGES)) < 0.5),
            put(np.ones(v, np.bool_)), put(np.zeros((v, CATEGORIES), np.bool_)),
        )  # fmt: skip
        self.params = put(np.array([NOW_MS, n, b, 1, 600_000, NOW_MS, k, 0], np.int64))
        self.views, self.view_sources = self._slots(rng, v, self.view_width), put(self._ints(rng, (v, self.view_width)))
        self.personal, self.followed = (self._slots(rng, b, w) for w in (self.personal_width, self.followed_width))
        self.excluded = self._slots(rng, b, 16)
        self.view_limits = put(np.full(b, k, np.int32))
        self.filter_of = put(np.arange(b, dtype=np.int32) % v)
        self.utility = put(rng.random((b, k)).astype(np.float32))
        self.limits, self.explore = self._column(size.limit), self._column(max(1, size.limit // 12))
        self.creator_caps, self.category_caps = self._column(2), self._column(max(1, size.limit // 2))
        self.seeds, self.diversity = put(np.arange(b, dtype=np.int64)), put(np.full(b, 0.15, np.float32))
        w = size.limit + size.reserve
        self.slots, self.sources = self._empty((b, k), torch.int32), self._empty((b, k), torch.int32)
        self.counts, self.dropped = self._empty((b,), torch.int32), self._empty((b,), torch.int32)
        self.order, self.outcome = self._empty((b, k), torch.int64), self._empty((b, k), torch.uint8)
        self.picks, self.exploration = self._empty((b, w), torch.int32), self._empty((b, w), torch.float32)
        self.n_slate, self.n_reserve = self._empty((b,), torch.int32), self._empty((b,), torch.int32)
        self.pick_slots, self.drops = self._empty((b, w), torch.int32), self._empty((b, w), torch.uint8)
        shape = (b, size.limit)
        self.out_slots, self.out_sources = self._empty(shape, torch.int32), self._empty(shape, torch.int32)
        self.out_scores, self.out_exploration = self._empty(shape, torch.float32), self._empty(shape, torch.float32)
        self.served = self._empty((b,), torch.int32)
        self.buffer, self.lengths = (
            self._empty((b, size.limit * ENTRY_BYTES), torch.uint8),
            self._empty((b,), torch.int32),
        )
        self.tallied, self.eligible = self._empty((SIZE,), torch.int32), self._empty((v, n), torch.uint8)

    def _put(self, array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array.view(_SIGNED.get(array.dtype, array.dtype)).copy()).to(self.device)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _column(self, value: int) -> torch.Tensor:
        return self._put(np.full(self.size.batch, value, np.int32))

    def _ints(self, rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.int32]:
        return rng.integers(1, 64, shape, dtype=np.int32)

    def _slots(self, rng: np.random.Generator, rows: int, width: int) -> torch.Tensor:
        picked = [rng.choice(self.size.rows, width, replace=False) for _ in range(rows)]
        return self._put(np.stack(picked).astype(np.int32))

    def cases(self) -> list[_Case]:
        """In the order of a request's way. Bytes per case: inputs once, outputs once."""
        size = self.size
        b, k, d = size.batch, size.candidates, size.dim
        picks, served = b * (size.limit + size.reserve), b * size.limit
        entry = 37 + int(self.id_lengths[0])
        choices = size.limit + size.reserve
        return [
            _Case("eligible_rows", self._eligible, size.rows * (29 + size.filters)),
            _Case("merge_candidates", self._merge, b * (16 * k + 4 * 16)),
            _Case("select_slates", self._select, b * k * (12 + 8 + 4 * d + 1) + picks * 8, 2 * b * k * d * choices),
            _Case("verify_picks", self._verify, picks * (8 + 29 + 12 + 5) + served * 16),
            _Case("encode_streams", self._encode, served * (16 + 17 + 64 + entry)),
            _Case("tally", self._tally, b * k * 9 + picks * 5 + served * 12),
        ]

    def _eligible(self) -> None:
        eligible_rows(self.rows, self.filters, self.params, eligible=self.eligible)

    def _merge(self) -> None:
        merge_candidates(
            self.views, self.view_sources, self.filter_of, self.personal, PERSONAL, self.followed, FOLLOWED,
            self.excluded, self.view_limits, self.params,
            slots=self.slots, sources=self.sources, counts=self.counts, dropped=self.dropped,
        )  # fmt: skip

    def _select(self) -> None:
        select_slates(
            self.slots, self.utility, self.sources, self.creators, self.rows.category, self.embeddings, self.id_words,
            self.limits, self.explore, self.seeds, self.creator_caps, self.category_caps, self.diversity,
            self.size.reserve, explorable_bit=FRESH, order=self.order, picks=self.picks, exploration=self.exploration,
            n_slate=self.n_slate, n_reserve=self.n_reserve, outcome=self.outcome,
        )  # fmt: skip

    def _verify(self) -> None:
        verify_picks(
            self.picks, self.n_slate, self.n_reserve, self.exploration, self.slots, self.utility, self.sources,
            self.limits, self.filter_of, self.rows, self.filters, self.params,
            out_slots=self.out_slots, out_scores=self.out_scores, out_sources=self.out_sources,
            out_exploration=self.out_exploration, counts=self.served, pick_slots=self.pick_slots, drops=self.drops,
        )  # fmt: skip

    def _encode(self) -> None:
        encode_streams(
            self.out_slots, self.served, self.out_scores, self.epochs, self.rows.lease_expires_ms, self.out_sources,
            self.out_exploration, self.id_words, self.id_lengths, buffer=self.buffer, lengths=self.lengths,
        )  # fmt: skip

    def _tally(self) -> None:
        tally(
            self.slots, self.sources, self.outcome, self.dropped, self.limits, self.pick_slots, self.drops,
            self.out_slots, self.out_sources, self.out_exploration, counts=self.tallied,
        )  # fmt: skip
