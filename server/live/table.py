"""The live table: applies events, expires leases, knows what is live. One thread owns it.

Everything here is a function of the log's records and their stamps (invariant 6):
`expire(t1); expire(t2)` leaves the same columns as `expire(t2)`, and a row is chosen as the
lowest free one, so the result does not depend on how often ticks ran in between.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kernels import fence
from kernels.counters import COUNTERS, next_landmark
from kernels.dedup import WORDS
from kernels.idmap import IdMap
from kernels.settled import Settled, next_change_ms, settle
from server.config import TableSettings
from server.live.accumulators import FIRST_COUNTER, SECOND_COUNTER, Accumulators, Counted, HostAccumulators
from server.live.columns import Columns
from server.live.event_checks import StartedRow
from server.live.events import EventColumns
from server.live.interner import Interner


@dataclass(frozen=True)
class End:
    """A session that ended: what WatchEnded tells."""

    stream_id: str
    epoch: int
    ended_ms: int
    reason: str


@dataclass(frozen=True)
class Applied:
    """What a batch did.

    codes uint8[n] (0 applied), renewed bool[n], slots int32[n] (of a row where applied): in the batch's order.
    touched int32[m]: rows of applied events, each once. by_kind int64[32]: applied events. by_code int64[32].
    """

    codes: NDArray[np.uint8]
    renewed: NDArray[np.bool_]
    slots: NDArray[np.int32]
    ends: list[End]
    touched: NDArray[np.int32]
    by_kind: NDArray[np.int64]
    by_code: NDArray[np.int64]


@dataclass(frozen=True)
class Expired:
    """What the passing of time did."""

    suspects: int
    ends: list[End]


class Follower(Protocol):
    """Other state that follows from the same events; applied with them, kept in snapshots with them."""

    def applied(
        self, table: LiveTable, events: EventColumns, slots: NDArray[np.int32], current: NDArray[np.bool_]
    ) -> None:
        """A batch of n events was applied to ``table``.

        slots int32[n]: rows of the events' streams. current bool[n]: applied, and of the row's session as it is now.
        """
        ...

    def columns(self) -> dict[str, dict[str, NDArray[Any]]]:
        """Its state: used rows of columns, by table and name; views."""
        ...

    def restore(self, columns: dict[str, dict[str, NDArray[Any]]]) -> None:
        """Takes over what `columns` gave. Raises ValueError when it does not fit; nothing is then taken over."""
        ...


RowWriter = Callable[[NDArray[np.int32], NDArray[np.float32]], None]


class LiveTable:
    """Rows of live, suspect and remembered streams.

    Args:
        embedding: float32[capacity, D], the search engine's own matrix, only read here.
        write_rows: the engine's way to write it, (slots int32[n], rows float32[n, D]): a written row is visible to
            the next search. None: no engine has a say, rows are written into ``embedding``.
        accumulators: makes what keeps the session columns, given the table's; None: the table's own columns do.
        follower: what else is kept of the events, such as `server.viewers.table.ViewerTable`; None: nothing.
    """

    def __init__(
        self,
        settings: TableSettings,
        embedding: NDArray[np.float32],
        write_rows: RowWriter | None = None,
        accumulators: Callable[[Columns], Accumulators] | None = None,
        follower: Follower | None = None,
    ) -> None:
        if embedding.shape != (settings.capacity, settings.embedding_dim):
            raise ValueError(
                f"embedding: [{settings.capacity}, {settings.embedding_dim}] wanted, got {list(embedding.shape)}"
            )
        self.settings, self.follower = settings, follower
        self.columns = Columns.allocate(settings.capacity, embedding, with_sessions=accumulators is None)
        self.accumulators = (accumulators or HostAccumulators)(self.columns)
        self.write_embeddings: RowWriter = write_rows or embedding.__setitem__
        self._no_embedding = np.zeros(settings.embedding_dim, np.float32)
        self.titles: list[str] = [""] * settings.capacity
        self.tags: list[tuple[str, ...]] = [()] * settings.capacity
        self.creators, self.languages = Interner(), Interner()
        self.categories, self.regions = Interner(), Interner()
        self.rows = 0
        """High-water mark: rows at and beyond it were never used."""
        self.landmark_ms = 0
        self.counters_seen = np.zeros(len(COUNTERS), np.bool_)
        """Which counters anybody has ever reported, for any stream: tells "none" from "nobody tells us"."""
        self.map = IdMap(self.columns.ids, self.columns.id_lengths)
        self._mark = np.zeros(settings.capacity, np.bool_)
        self._next_change_ms = 0
        """Before this the passing of time changes no row. May be too early, never too late."""
        self._free: list[int] = []
        self._producers: dict[str, int] = {}
        self._producer_used_ms: list[int] = []
        self._highest = np.zeros(0, np.uint64)
        self._window_bits = np.zeros((0, WORDS), np.uint64)

    # --- events -------------------------------------------------------------------------------

    def apply(self, events: EventColumns, applied_ms: int) -> Applied:
        """Applies one batch as of ``applied_ms``; stamps never decrease.

        A batch is the unit of the log, hence of determinism. Expires leases first, so that what a
        heartbeat may renew does not depend on when the last tick ran.
        """
        expired = self.expire(applied_ms)
        self._move_landmark(applied_ms)
        slots = self.map.lookup(events.ids, events.id_lengths)
        owner = owner_of(events.producer_id)
        provisional, without_room = self._reserve_rows(events, slots, self._room(events, owner))
        producer = self._producer_row(events.producer_id, applied_ms)
        n = len(events)
        fenced = fence.fence_events(
            self.columns.liveness(), slots, events.kind, events.epoch, events.time_ms, events.value,
            events.media_sequence, np.full(n, producer, np.int32), events.sequence,
            np.full(n, applied_ms, np.int64), self._highest, self._window_bits,
            lease_ms=self.settings.lease_ms,
            max_lateness_ms=self.settings.max_lateness_ms,
            max_future_ms=self.settings.max_future_ms,
            owner=owner,
            own_only=events.own_streams_only,
        )  # fmt: skip
        if len(without_room):
            refused = without_room[fenced.codes[without_room] == fence.CAPACITY]
            fenced.codes[refused] = fence.TOO_MANY_STREAMS
        if events.started:
            self.accumulators.clear_sessions(np.unique(slots[fenced.new_session]))
        settled = settle(
            fenced.codes, slots, events.kind, events.epoch, self.columns.epoch, self._mark
        )  # fmt: skip
        self.accumulators.liveness_changed(settled.touched)
        if settled.by_kind[_LIVENESS_KINDS].any():
            self._next_change_ms = min(self._next_change_ms, self._change_ms(settled.touched))
        if events.started:
            ok = fenced.codes == fence.APPLIED
            self.accumulators.identity_changed(slots[ok & (events.kind == fence.STARTED)])
            self._write_attributes(events, slots, ok)
        self._count(events, slots, settled)
        for slot in provisional:
            if self.columns.state[slot] == fence.FREE:
                self._release(slot)
        ends = expired.ends + self._ends_of(events, slots, fenced)
        return Applied(
            fenced.codes, fenced.renewed, slots, ends, settled.touched, settled.by_kind, settled.by_code
        )  # fmt: skip

    def _change_ms(self, slots: NDArray[np.int32] | int) -> int:
        settings = self.settings
        return next_change_ms(
            self.columns.liveness(), slots, grace_ms=settings.grace_ms, tombstone_ms=settings.tombstone_ms
        )

    def _room(self, events: EventColumns, owner: int) -> int:
        """How many new rows the batch may take."""
        if not events.max_streams:
            return len(events)
        taken = np.count_nonzero(self.columns.owner[: self.rows] == owner)
        return max(0, events.max_streams - int(taken))

    def _reserve_rows(
        self, events: EventColumns, slots: NDArray[np.int32], room: int
    ) -> tuple[list[int], NDArray[np.int64]]:
        """Gives up to ``room`` unknown streams that start in this batch a row (in place in ``slots``), if one is left.

        Returns the rows given, and the places int64[m] of starts for which there was no room.
        """
        provisional: list[int] = []
        without_room: list[int] = []
        if not events.started:
            return provisional, np.zeros(0, np.int64)
        starting = np.flatnonzero((slots < 0) & (events.kind == fence.STARTED))
        for i in starting:
            known = self.map.lookup(events.ids[i : i + 1], events.id_lengths[i : i + 1])[0]
            if known >= 0:
                continue
            if len(provisional) >= room:
                without_room.append(int(i))
                continue
            if (slot := self._take_row()) < 0:
                continue
            self.columns.ids[slot] = events.ids[i]
            self.columns.id_lengths[slot] = events.id_lengths[i]
            self.map.insert(slot)
            provisional.append(slot)
        unknown = slots < 0  # later events of a starting stream find its row too
        slots[unknown] = self.map.lookup(events.ids[unknown], events.id_lengths[unknown])
        return provisional, np.array(without_room, np.int64)

    def _take_row(self) -> int:
        if self._free:
            return heapq.heappop(self._free)
        if self.rows < self.settings.capacity:
            self.rows += 1
            return self.rows - 1
        return -1

    def _release(self, slot: int) -> None:
        self.map.delete(slot)
        for column, interner in self.interned():
            interner.drop(int(column[slot]))
        self.columns.clear_row(slot)
        at = np.array([slot], np.int32)
        self.accumulators.clear_sessions(at)
        self.accumulators.liveness_changed(at)
        self.accumulators.identity_changed(at)
        self._write_embedding(slot, self._no_embedding)
        self.titles[slot] = ""
        self.tags[slot] = ()
        heapq.heappush(self._free, slot)

    def _producer_row(self, producer_id: str, applied_ms: int) -> int:
        """Row of the producer's sequence window; the longest silent one gives way when all are taken."""
        row = self._producers.get(producer_id)
        if row is None:
            if len(self._producers) < self.settings.max_producers:
                row = len(self._producers)
                if row >= self._highest.shape[0]:
                    more = min(max(16, 2 * row), self.settings.max_producers)
                    self._highest = np.concatenate([self._highest, np.zeros(more - row, np.uint64)])
                    self._window_bits = np.concatenate([self._window_bits, np.zeros((more - row, WORDS), np.uint64)])
                self._producer_used_ms.append(applied_ms)
            else:
                gone = min(self._producers, key=lambda name: (self._producer_used_ms[self._producers[name]], name))
                row = self._producers.pop(gone)
                self._highest[row] = 0
                self._window_bits[row] = 0
            self._producers[producer_id] = row
        self._producer_used_ms[row] = applied_ms
        return row

    def _write_attributes(self, events: EventColumns, slots: NDArray[np.int32], ok: NDArray[np.bool_]) -> None:
        for i, started in events.started.items():
            if ok[i] and events.epoch[i] == self.columns.epoch[slots[i]]:
                self._write_started(int(slots[i]), started)

    def _write_started(self, slot: int, started: StartedRow) -> None:
        columns = self.columns
        columns.creator[slot] = self.creators.replace(int(columns.creator[slot]), started.creator_id)
        columns.language[slot] = self.languages.replace(int(columns.language[slot]), started.language)
        columns.category[slot] = self.categories.replace(int(columns.category[slot]), started.category)
        columns.region[slot] = self.regions.replace(int(columns.region[slot]), started.region)
        columns.age_rating[slot] = started.age_rating
        self._write_embedding(slot, self._no_embedding if started.embedding is None else unit(started.embedding))
        self.titles[slot] = started.title
        self.tags[slot] = started.tags

    def _write_embedding(self, slot: int, embedding: NDArray[np.float32]) -> None:
        self.write_embeddings(np.array([slot], np.int32), embedding[None])

    def _count(self, events: EventColumns, slots: NDArray[np.int32], settled: Settled) -> None:
        """Counters, gauges and sketches of the applied events that belong to the current session."""
        if self.follower is not None:
            self.follower.applied(self, events, slots, settled.current)
        kinds = np.flatnonzero(settled.current_by_kind)
        for counters in (FIRST_COUNTER[kinds], SECOND_COUNTER[kinds]):
            self.counters_seen[counters[counters >= 0]] = True
        counted = Counted(slots, events.kind, events.value, events.time_ms, events.viewer_hash, settled.current)
        self.accumulators.count(counted, self.landmark_ms)

    def _ends_of(self, events: EventColumns, slots: NDArray[np.int32], fenced: fence.Fenced) -> list[End]:
        ends: list[End] = []
        if not (events.started or events.ended_reason):
            return ends
        for i in np.flatnonzero(fenced.ended_epoch >= 0):
            reason = events.ended_reason.get(int(i), "") if events.kind[i] == fence.END else "superseded"
            ends.append(End(self.stream_id(int(slots[i])), int(fenced.ended_epoch[i]), int(events.time_ms[i]), reason))
        return ends

    # --- time ---------------------------------------------------------------------------------

    def expire(self, now_ms: int) -> Expired:
        """LIVE past its lease → SUSPECT; SUSPECT past its grace → ENDED; old tombstones → free rows.

        Cost: nothing before the next row is due; then a few passes over the state and two time columns.
        """
        if now_ms < self._next_change_ms:
            return Expired(0, [])
        columns, rows, settings = self.columns, self.rows, self.settings
        state = columns.state[:rows]
        lapsed = np.flatnonzero((state == fence.LIVE) & (columns.lease_expires_ms[:rows] <= now_ms))
        state[lapsed] = fence.SUSPECT
        self.accumulators.liveness_changed(lapsed.astype(np.int32))
        over_ms = columns.lease_expires_ms[:rows] + settings.grace_ms
        ended = np.flatnonzero((state == fence.SUSPECT) & (over_ms <= now_ms))
        ends: list[End] = []
        if len(ended):
            state[ended] = fence.ENDED
            columns.ended_ms[ended] = over_ms[ended]
            self.accumulators.liveness_changed(ended.astype(np.int32))
            # In the order of time, so that subscribers hear the same sequence whatever the tick.
            in_time = ended[np.lexsort((ended, over_ms[ended]))]
            ends = [
                End(self.stream_id(slot), int(columns.epoch[slot]), int(over_ms[slot]), "lease_expired")
                for slot in in_time
            ]
        forgotten = np.flatnonzero(
            (state == fence.ENDED)
            & (columns.ended_ms[:rows] + settings.tombstone_ms <= now_ms)
            & ((columns.moderation[:rows] & fence.MODERATED_BLOCKED) == 0)  # a block outlives sessions
        )
        for slot in forgotten:
            self._release(int(slot))
        columns.generation[forgotten] += 1
        self._next_change_ms = self._change_ms(self.rows)
        return Expired(len(lapsed), ends)

    def _move_landmark(self, applied_ms: int) -> None:
        if self.landmark_ms == 0:
            self.landmark_ms = applied_ms
        moved = next_landmark(applied_ms, self.landmark_ms)
        if moved != self.landmark_ms:
            self.accumulators.move_landmark(self.landmark_ms, moved, self.rows)
            self.landmark_ms = moved

    # --- reading ------------------------------------------------------------------------------

    def interned(self) -> tuple[tuple[NDArray[np.int32], Interner], ...]:
        """Each column of interned strings with its names."""
        c = self.columns
        return (
            (c.creator, self.creators), (c.language, self.languages),
            (c.category, self.categories), (c.region, self.regions),
        )  # fmt: skip

    def stream_id(self, slot: int) -> str:
        """The id of a used row."""
        return self.columns.ids[slot, : self.columns.id_lengths[slot]].tobytes().decode()

    def live_mask(self, now_ms: int) -> NDArray[np.bool_]:
        """bool[rows]: LIVE and inside its lease at ``now_ms``."""
        return (self.columns.state[: self.rows] == fence.LIVE) & (self.columns.lease_expires_ms[: self.rows] > now_ms)

    def count_states(self) -> tuple[int, int, int]:
        """Rows that are (live, suspect, ended)."""
        state = self.columns.state[: self.rows]
        live, suspect, ended = (int(np.count_nonzero(state == s)) for s in (fence.LIVE, fence.SUSPECT, fence.ENDED))
        return live, suspect, ended


_LIVENESS_KINDS = np.array([fence.STARTED, fence.HEARTBEAT, fence.END, fence.MODERATED])


@functools.lru_cache(1024)
def owner_of(producer_id: str) -> int:
    """The number, below 2**64, that stands for a producer in ``Columns.owner``; nobody can make two ids meet."""
    return int.from_bytes(hashlib.sha256(producer_id.encode()).digest()[:8], "big")


def unit(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    """The vector at length 1, so that inner product is cosine; zero stays zero. float32[D]."""
    wide = vector.astype(np.float64)
    peak = float(np.abs(wide).max(initial=0.0))
    if peak == 0.0:
        return np.zeros_like(vector)
    wide /= peak  # 1e38 squared is still finite in float64, but 1e-38 squared would vanish
    return (wide / np.linalg.norm(wide)).astype(np.float32)
