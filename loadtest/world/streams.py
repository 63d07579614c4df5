"""All streams there ever were, as growing columns. A row is one stream id and is never reused."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtest.world.population import Population
from loadtest.world.settings import Category, Market, WorldSettings

RECENT_VIEWERS = 8
NEVER = np.iinfo(np.int64).max


class State(IntEnum):
    """What a stream is doing."""

    OFF = 0  # over, or waiting to come back with a new epoch
    LIVE = 1  # media flows
    GAP = 2  # the encoder dropped out and will be back
    DEAD = 3  # media stopped for good, viewers are still finding out
    HUNG = 4  # as DEAD, but the encoder keeps sending the same frame


class Flaw(IntEnum):
    """What is wrong with a stream."""

    NONE = 0
    VIEW_BOT = 1
    CHAT_SPAM = 2
    LOW_QUALITY = 3


# name: (dtype, length of one row or None for a scalar)
_SPEC: dict[str, tuple[type[np.generic], int | None]] = {
    "creator": (np.int32, None), "category": (np.int16, None), "market": (np.int16, None),
    "region_locked": (np.bool_, None), "flaw": (np.int8, None), "flapping": (np.bool_, None),
    "state": (np.int8, None), "epoch": (np.int64, None), "started_ms": (np.int64, None),
    "epoch_started_ms": (np.int64, None), "end_ms": (np.int64, None), "ended_ms": (np.int64, None),
    "media_until_ms": (np.int64, None), "resume_ms": (np.int64, None), "gone_ms": (np.int64, None),
    "next_heartbeat_ms": (np.int64, None), "next_viewer_count_ms": (np.int64, None),
    "next_flush_ms": (np.int64, None), "peak": (np.float64, None), "engagement": (np.float64, None),
    "stay_s": (np.float64, None), "ramp_s": (np.float64, None), "momentum": (np.float64, None),
    "excitement": (np.float64, None), "log_pull": (np.float64, None), "burst": (np.int8, None),
    "bots": (np.int64, None), "viewers": (np.int64, None), "initial_viewers": (np.int64, None),
    "joins": (np.int64, None), "leaves": (np.int64, None), "unflushed_joins": (np.int64, None),
    "unflushed_leaves": (np.int64, None), "unflushed_viewer_s": (np.float64, None),
    "moderated": (np.bool_, None), "recent_viewers": (np.int64, RECENT_VIEWERS),
    "open_span": (np.int64, None),
}  # fmt: skip


class StreamColumns:
    """Structure of arrays; every column is [n], or [n, width]. Grown, hence replaced, when full.

    Fixed facts first, then what the dynamics change. Times are simulated Unix ms.
    """

    creator: NDArray[np.int32]
    category: NDArray[np.int16]  # into settings.categories
    market: NDArray[np.int16]  # into settings.markets
    region_locked: NDArray[np.bool_]
    flaw: NDArray[np.int8]  # Flaw
    flapping: NDArray[np.bool_]  # its encoder drops out now and then
    peak: NDArray[np.float64]  # viewers it would settle at, undisturbed
    engagement: NDArray[np.float64]  # factor on all action rates
    stay_s: NDArray[np.float64]  # mean stay of a viewer
    ramp_s: NDArray[np.float64]  # time in which it becomes known
    bots: NDArray[np.int64]  # viewers that do not exist and are counted
    state: NDArray[np.int8]  # State
    epoch: NDArray[np.int64]
    started_ms: NDArray[np.int64]  # first start of the stream, or of its comeback
    epoch_started_ms: NDArray[np.int64]
    end_ms: NDArray[np.int64]  # when it is going to end
    ended_ms: NDArray[np.int64]  # when media really stopped for good; NEVER before that
    media_until_ms: NDArray[np.int64]  # next gap or end
    resume_ms: NDArray[np.int64]  # end of the present gap
    gone_ms: NDArray[np.int64]  # DEAD or HUNG until then
    next_heartbeat_ms: NDArray[np.int64]
    next_viewer_count_ms: NDArray[np.int64]
    next_flush_ms: NDArray[np.int64]
    momentum: NDArray[np.float64]  # hidden, standard normal: where interest is heading
    excitement: NDArray[np.float64]  # hidden: jumps at bursts, fades
    log_pull: NDArray[np.float64]  # hidden: log of the factor on peak that both add up to
    burst: NDArray[np.int8]  # kind of the last burst, see audience.BURSTS
    viewers: NDArray[np.int64]  # people watching now
    initial_viewers: NDArray[np.int64]  # already there when the world began
    joins: NDArray[np.int64]  # since then; viewers == initial_viewers + joins − leaves
    leaves: NDArray[np.int64]
    unflushed_joins: NDArray[np.int64]  # happened, not yet told
    unflushed_leaves: NDArray[np.int64]
    unflushed_viewer_s: NDArray[np.float64]
    moderated: NDArray[np.bool_]
    recent_viewers: NDArray[np.int64]  # [n, RECENT_VIEWERS] some who are probably here
    open_span: NDArray[np.int64]  # index of the media span now open in Truth

    def __init__(self, settings: WorldSettings, population: Population) -> None:
        self._settings = settings
        self._population = population
        self._capacity = 0
        self.n = 0
        self.ids: list[str] = []
        self.titles: list[str] = []
        self._row_of: dict[str, int] = {}
        self._embedding = np.empty((0, settings.embedding_dim), np.float32)
        self._columns = {
            name: np.zeros((0,) if width is None else (0, width), dtype) for name, (dtype, width) in _SPEC.items()
        }
        self._publish()

    def __len__(self) -> int:
        return self.n

    @property
    def embedding(self) -> NDArray[np.float32]:
        """float32[n, D], unit norm."""
        return self._embedding[: self.n]

    def add(self, ids: Sequence[str], titles: Sequence[str], embedding: NDArray[np.float32]) -> NDArray[np.int32]:
        """Appends zeroed rows and returns their indices, int32[len(ids)]."""
        first, self.n = self.n, self.n + len(ids)
        if self.n > self._capacity:
            self._capacity = max(1024, 2 * self._capacity, self.n)
            for name, old in self._columns.items():
                self._columns[name] = _enlarged(old, first, self._capacity)
            self._embedding = _enlarged(self._embedding, first, self._capacity)
        self._publish()
        self._embedding[first : self.n] = embedding
        for row, stream_id in enumerate(ids, first):
            self._row_of[stream_id] = row
        self.ids.extend(ids)
        self.titles.extend(titles)
        return np.arange(first, self.n, dtype=np.int32)

    def rows_of(self, streams: Sequence[str] | NDArray[np.integer[Any]] | Sequence[int]) -> NDArray[np.int64]:
        """int64[k] rows of stream ids or of rows; KeyError names an id that never was."""
        if isinstance(streams, np.ndarray):
            return streams.astype(np.int64)
        return np.array([self._row_of[s] if isinstance(s, str) else s for s in streams], np.int64)

    def creator_name(self, row: int) -> str:
        return self._population.creator_id(int(self.creator[row]))

    def category_of(self, row: int) -> Category:
        return self._settings.categories[int(self.category[row])]

    def market_of(self, row: int) -> Market:
        return self._settings.markets[int(self.market[row])]

    def _publish(self) -> None:
        # Views of the used part, so that column lengths always agree with n.
        for name, column in self._columns.items():
            setattr(self, name, column[: self.n])


def _enlarged(old: NDArray[Any], used: int, capacity: int) -> NDArray[Any]:
    new = np.zeros((capacity, *old.shape[1:]), old.dtype)
    new[:used] = old[:used]
    return new
