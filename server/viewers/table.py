"""What each viewer did lately: a bounded table beside the live table, of the same events and on the same thread.

It is part of what the log determines (invariant 6): same events, same columns bit for bit, also after a restart from a
snapshot. Requests read it and change nothing, not even who was used last, for they are in no log.

A visit keeps the hash of its stream, not the stream's row, which may be another's by the time of ranking. The embedding
is copied, as float16, but once per session and not once per visit: a million viewers with twenty visits each would
otherwise hold 2.6 GB of copies of the same few embeddings. A session that nobody visited for long gives way; its
visits then count, without embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.lru import ROWS, Lru, allocate_lru, restore_lru
from kernels.visits import Visits, apply_visits, fold_epoch, read_visits
from server.config import ViewerSettings
from server.live.events import EventColumns
from server.live.table import LiveTable
from server.scoring.ranker_schema import (
    BOUNCE_MS,
    CODE_BUCKETS,
    OUTCOME_VALUES,
    SEQUENCE,
    SEQUENCE_META,
    WATCHED_MS,
    Outcome,
    bucket_of,
)

_OUTCOME_VALUE = np.array(
    [sum(value for bit, value in OUTCOME_VALUES.items() if bits & bit) for bits in range(256)], np.float32
)


@dataclass(frozen=True)
class Histories:
    """Visits of B viewers, newest first, padded with zeros: embedding float32[B, S, D], meta float32[B, S, 4].

    They are the inputs ``sequence_embedding`` and ``sequence_meta`` of `server.scoring.ranker_schema`.
    """

    embedding: NDArray[np.float32]
    meta: NDArray[np.float32]


def empty_histories(viewers: int, dim: int) -> Histories:
    """Of viewers about whom nothing is known."""
    meta = np.zeros((viewers, SEQUENCE, len(SEQUENCE_META)), np.float32)
    return Histories(np.zeros((viewers, SEQUENCE, dim), np.float32), meta)


class ViewerTable:
    """The table. Owned by the engine thread, like the live table that feeds it (`server.live.table.Followers`).

    Args:
        dim: D, length of an embedding.

    Attributes:
        forgotten: viewers that gave way to others since the start.
    """

    def __init__(self, settings: ViewerSettings, dim: int) -> None:
        capacity, sessions = settings.capacity, settings.sessions
        self.settings, self.dim = settings, dim
        self.viewers: Lru = allocate_lru(capacity)
        self.sessions: Lru = allocate_lru(sessions)
        self.visits = Visits(
            stream=np.zeros((capacity, SEQUENCE), np.uint64),
            epoch=np.zeros((capacity, SEQUENCE), np.uint32),
            seen_s=np.zeros((capacity, SEQUENCE), np.uint32),
            watch_ms=np.zeros((capacity, SEQUENCE), np.uint32),
            outcome=np.zeros((capacity, SEQUENCE), np.uint8),
        )
        self.embedding = np.zeros((sessions, dim), np.float16)
        self.codes = np.zeros((sessions, len(CODE_BUCKETS)), np.int32)
        self.forgotten = 0

    def __len__(self) -> int:
        """Viewers that are known."""
        return int(self.viewers.ends[ROWS])

    # --- events -------------------------------------------------------------------------------

    def applied(
        self, table: LiveTable, events: EventColumns, slots: NDArray[np.int32], current: NDArray[np.bool_]
    ) -> None:
        """See Follower."""
        done = apply_visits(
            self.viewers, self.visits, self.sessions,
            counted=current, viewer_hash=events.viewer_hash, ids=events.ids, id_lengths=events.id_lengths,
            kind=events.kind, time_ms=events.time_ms, value=events.value, slots=slots,
            row_epochs=table.columns.epoch, watched_ms=WATCHED_MS, bounce_ms=BOUNCE_MS,
        )  # fmt: skip
        self.forgotten += done.forgotten
        if len(done.rows):
            self._describe(table, done.rows, done.slots)

    def _describe(self, table: LiveTable, rows: NDArray[np.int32], slots: NDArray[np.int32]) -> None:
        """Copies what the model needs of sessions that are visited for the first time."""
        rows, last = np.unique(rows[::-1], return_index=True)  # a row may have been taken twice: the last one stays
        slots = slots[::-1][last]
        columns = table.columns
        self.embedding[rows] = columns.embedding[slots]
        self.codes[rows] = codes_of(table, slots)

    # --- reading ------------------------------------------------------------------------------

    def histories(self, viewer_hash: NDArray[np.uint64], now_ms: int) -> Histories:
        """Of viewers uint64[B] (`kernels.idmap.hash_ids` of their ids; 0: nobody), as of ``now_ms``."""
        rows, places, at = read_visits(self.viewers, self.visits, self.sessions, viewer_hash)
        valid, known = places >= 0, at >= 0
        where = (np.maximum(rows, 0)[:, None], np.maximum(places, 0))
        age_s = np.maximum(now_ms // 1000 - self.visits.seen_s[where].astype(np.int64), 0)
        meta = np.zeros((*places.shape, len(SEQUENCE_META)), np.float32)
        meta[..., 0] = np.log1p(age_s / np.float64(60))
        meta[..., 1] = np.log1p(self.visits.watch_ms[where] / np.float64(1000))
        meta[..., 2] = _OUTCOME_VALUE[self.visits.outcome[where]]
        meta[..., 3] = 1.0
        meta[~valid] = 0.0
        embedding = self.embedding[np.maximum(at, 0)].astype(np.float32)
        embedding[~known] = 0.0
        return Histories(embedding, meta)

    def languages(self, viewer_hash: NDArray[np.uint64]) -> NDArray[np.int64]:
        """int64[B]: bucket of the language that viewers uint64[B] watched longest (a visit counts as one second at
        least), among the sessions still remembered; 0 not known. The lowest bucket wins a tie."""
        rows, places, at = read_visits(self.viewers, self.visits, self.sessions, viewer_hash)
        who, column = np.nonzero(at >= 0)
        watch_s = self.visits.watch_ms[rows[who], places[who, column]] / 1000 + 1.0
        seconds = np.zeros((len(viewer_hash), CODE_BUCKETS[0]))
        np.add.at(seconds, (who, self.codes[at[who, column], 0]), watch_s)
        seconds[:, 0] = 0.0
        return np.argmax(seconds, axis=1).astype(np.int64)

    def seen(
        self, table: LiveTable, viewer_hash: NDArray[np.uint64], now_ms: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Slots of streams that viewers uint64[B] must not be shown again, as the settings have it.

        Returns:
            slots int32[X], ragged by int64[B + 1] offsets. Reported streams in any session, streams watched long
            enough in the session they were watched in.
        """
        settings = self.settings
        nothing = np.zeros(0, np.int32), np.zeros(len(viewer_hash) + 1, np.int64)
        if not (settings.exclude_reported or settings.exclude_watched_ms) or not viewer_hash.any():
            return nothing
        rows, places, _ = read_visits(self.viewers, self.visits, self.sessions, viewer_hash)
        who, column = np.nonzero(places >= 0)
        where = (rows[who], places[who, column])
        reported = np.zeros(len(who), np.bool_)
        if settings.exclude_reported:
            reported = (self.visits.outcome[where] & Outcome.REPORTED) != 0
        watched = np.zeros(len(who), np.bool_)
        if settings.exclude_watched_ms:
            recent = self.visits.seen_s[where].astype(np.int64) * 1000 > now_ms - settings.exclude_within_ms
            watched = recent & (self.visits.watch_ms[where] >= settings.exclude_watched_ms)
        chosen = np.flatnonzero(reported | watched)
        if not len(chosen):
            return nothing
        where = (where[0][chosen], where[1][chosen])
        slots = table.map.lookup_hashes(self.visits.stream[where])
        same = fold_epoch(table.columns.epoch[np.maximum(slots, 0)]) == self.visits.epoch[where]
        keep = (slots >= 0) & (reported[chosen] | same)
        counts = np.bincount(who[chosen][keep], minlength=len(viewer_hash))
        return slots[keep], np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])

    # --- state --------------------------------------------------------------------------------

    def columns(self) -> dict[str, dict[str, NDArray[Any]]]:
        """The used rows of both tables by name, views: what a snapshot keeps. Which rows are the newest and the
        oldest, and the buckets, follow from these."""
        used = (self.viewers.ends[ROWS], self.sessions.ends[ROWS])
        return {
            table: {name: column[:rows] for name, column in part.items()}
            for table, part, rows in zip(("viewers", "sessions"), self._parts(), used, strict=True)
        }

    def _parts(self) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """All columns of viewers and of visited sessions, by name."""
        viewers = {**_links(self.viewers), **self.visits._asdict()}
        return viewers, {**_links(self.sessions), "embedding": self.embedding, "codes": self.codes}

    def nbytes_per_row(self) -> tuple[int, int]:
        """Memory of a viewer and of a visited session, with their share of the buckets."""
        viewers, sessions = (sum(column[:1].nbytes for column in part.values()) for part in self._parts())
        return viewers + 16, sessions + 16  # int32 buckets, a power of two of at least twice the rows

    def restore(self, columns: dict[str, dict[str, NDArray[Any]]]) -> None:
        """Takes over what `columns` gave, in a table that nothing was applied to.

        Raises:
            ValueError: it does not fit, or cannot be such a table; this one is then still empty.
        """
        empty = self.columns()
        for table, wanted in empty.items():
            found = columns.get(table, {})
            if set(found) != set(wanted):
                raise ValueError(f"{table}: columns {sorted(wanted)} wanted, got {sorted(found)}")
            rows = len(found["key"])
            for name, column in wanted.items():
                width = int(np.prod(column.shape[1:], dtype=np.int64))
                if found[name].dtype != column.dtype or found[name].size != rows * width:
                    raise ValueError(
                        f"{table}.{name}: {column.dtype}[{rows} x {width}] wanted, got "
                        f"{found[name].dtype}{list(found[name].shape)}"
                    )
        sessions, viewers = columns["sessions"], columns["viewers"]
        if not np.isfinite(sessions["embedding"]).all():
            raise ValueError("sessions.embedding: finite numbers wanted")
        restore_lru(self.viewers, viewers["key"], viewers["newer"], viewers["older"])
        try:
            restore_lru(self.sessions, sessions["key"], sessions["newer"], sessions["older"])
        except ValueError:
            self.viewers = allocate_lru(self.settings.capacity)
            raise
        for name, column in self.visits._asdict().items():
            column[: len(self)] = viewers[name].reshape(-1, SEQUENCE)
        rows = int(self.sessions.ends[ROWS])
        self.embedding[:rows] = sessions["embedding"].reshape(rows, self.dim)
        self.codes[:rows] = sessions["codes"].reshape(rows, len(CODE_BUCKETS))


def codes_of(table: LiveTable, slots: NDArray[np.int32]) -> NDArray[np.int64]:
    """int64[n, 3]: buckets of language, category and creator of streams int32[n], as `ranker_schema.CODES` has them."""
    columns = table.columns
    parts = (
        (columns.language, table.languages), (columns.category, table.categories), (columns.creator, table.creators),
    )  # fmt: skip
    codes = np.empty((len(slots), len(parts)), np.int64)
    for c, ((column, interner), buckets) in enumerate(zip(parts, CODE_BUCKETS, strict=True)):
        numbers, inverse = np.unique(column[slots], return_inverse=True)
        codes[:, c] = bucket_of([interner.names[number] for number in numbers], buckets)[inverse]
    return codes


def _links(lru: Lru) -> dict[str, NDArray[Any]]:
    return {"key": lru.key, "newer": lru.newer, "older": lru.older}
