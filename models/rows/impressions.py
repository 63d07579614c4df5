"""Rows at impressions: the state that the slate was ranked in, and what the viewer did afterwards.

**Which state.** An impression says which reply showed the stream: the offset that reply was ranked at, and when. Its
features are read right after that record was applied, as of that time: what a ranker saw then, bit for bit. Without an
offset it is the state of all records stamped before the reply. Never is it a state that holds the impression's own
record, whatever a client claims.

Impressions are told later than they were served, so the log is read ahead of the table by ``look_ahead_ms``; where a
client took longer to tell, the state has passed, and the impression is counted and left out.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kernels import fence
from models import labels
from models.rows.attribution import Attribution
from models.rows.base import Emit, LeakError, Shard, stream_keys
from models.rows.cursor import Cursor, Reading
from models.rows.details import read_details
from models.schema import arrow_schema, history_columns, vectors
from server.log.commit import Committed
from server.viewers.table import Histories, empty_histories

LOOK_AHEAD_MS = 60_000
_EMIT_ROWS = 1_024


@dataclass(frozen=True)
class Moment:
    """What was read at one moment for rows int64[m] of a block: of their streams, and of their viewers.

    viewer int64[m]: into histories, one entry per viewer; None where viewers are not remembered.
    """

    rows: NDArray[np.int64]
    reading: Reading
    viewer: NDArray[np.int64]
    histories: Histories | None


class Block:
    """The impressions of one record that this shard emits, n rows. Filled when their moments come.

    close_ms int64[n]: their labels are final once a record has a later stamp. alive bool[n]: neither refused nor
    without a state. Labels are those of `models.schema`.

    Args:
        mine: bool[m], which of the record's m impressions.
    """

    def __init__(self, committed: Committed, mine: NDArray[np.bool_]) -> None:
        assert committed.batch is not None
        events = committed.batch.events
        # Copied, so that the other events of the record need not be kept as long.
        self.rows = events.impressions[mine]  # places in the decoded batch
        self.offset, n = committed.record.offset, len(self.rows)
        self.ids, self.id_lengths, self.epoch = (c[self.rows] for c in (events.ids, events.id_lengths, events.epoch))
        self.index, self.viewer_hash = events.index[self.rows], events.viewer_hash[self.rows]
        self.said = read_details(committed.record.payload, self.index)
        self.impression_ms = events.time_ms[self.rows]
        self.keys = stream_keys(self.ids, self.id_lengths)
        self.close_ms = self.impression_ms + labels.WINDOW_MS + labels.LATE_MS
        self.alive = np.ones(n, np.bool_)
        self.filled = np.zeros(n, np.bool_)
        self.at_ms = np.minimum(events.served_ms[mine], committed.record.applied_ms)
        self.read_offset = np.zeros(n, np.int64)
        self.readings: list[Moment] = []
        self.clicked = np.zeros(n, np.bool_)
        self.watch_s, self.value = np.zeros(n), np.zeros(n)
        self.purchased, self.reported = np.zeros(n, np.bool_), np.zeros(n, np.bool_)
        self.label_offset = np.zeros(n, np.int64)

    def __len__(self) -> int:
        return len(self.rows)


class ImpressionRows:
    """The `models.rows.base.Job` for impressions.

    Memory: the decoded log of ``look_ahead_ms``, and the rows whose labels are open, about 1 kB each, and as much again
    as `Histories` takes for each viewer and moment of theirs.

    Args:
        cursor: at the record before the first one fed. emit: takes finished rows.
    """

    def __init__(
        self,
        cursor: Cursor,
        emit: Emit,
        shard: Shard | None = None,
        look_ahead_ms: int = LOOK_AHEAD_MS,
    ) -> None:
        self._cursor, self._emit, self._shard = cursor, emit, shard or Shard()
        self._look_ahead_ms = look_ahead_ms
        self.told: Counter[str] = Counter()
        self._ahead: deque[Committed] = deque()
        self._blocks: deque[Block] = deque()  # in the order of the log
        self._own: dict[int, Block] = {}  # by the record that tells of them, until that is applied
        self._by_offset: list[tuple[int, int, int, Block, int]] = []  # offset, as of, tie, block, row
        self._by_time: list[tuple[int, int, Block, int]] = []  # served, tie, block, row
        self._ties = itertools.count()
        self._attribution = Attribution()
        self._done: list[Any] = []
        self._done_rows = 0

    def feed(self, committed: Committed) -> None:
        self._register(committed)
        self._ahead.append(committed)
        while self._ahead and self._ahead[0].record.applied_ms <= committed.record.applied_ms - self._look_ahead_ms:
            self._step(self._ahead.popleft())

    def finish(self) -> None:
        while self._ahead:
            self._step(self._ahead.popleft())
        for block in self._blocks:
            open_rows = block.alive & (block.close_ms >= self._cursor.stamp_ms)
            self.told["labels not closed"] += int(open_rows.sum())
            block.alive &= ~open_rows
            self._take(block)
        self._blocks.clear()
        self._flush(1)

    # --- which moments ------------------------------------------------------------------------

    def _register(self, committed: Committed) -> None:
        """Notes the moments of a record's impressions."""
        if committed.batch is None or not len(committed.batch.events.impressions):
            return
        events = committed.batch.events
        rows = events.impressions
        mine = self._shard.owns(stream_keys(events.ids[rows], events.id_lengths[rows]))
        if not mine.any():
            return
        block = Block(committed, mine)
        self._blocks.append(block)
        self._own[block.offset] = block
        self._attribution.add(block)
        for row, applied_offset in enumerate(block.said.applied_offset.tolist()):
            if applied_offset == 0:
                heapq.heappush(self._by_time, (int(block.at_ms[row]), next(self._ties), block, row))
                continue
            wanted = min(applied_offset, block.offset - 1)
            if wanted < self._cursor.offset:
                self._drop(block, row, "served too long before it was told")
            else:
                tie = next(self._ties)
                heapq.heappush(self._by_offset, (wanted, int(block.at_ms[row]), tie, block, row))

    def _step(self, committed: Committed) -> None:
        """The table goes one record on; first, what was served before that record is read."""
        offset, stamp_ms = committed.record.offset, committed.record.applied_ms
        due: dict[tuple[int, int], list[tuple[Block, int]]] = {}
        while self._by_offset and self._by_offset[0][0] < offset:
            _, at_ms, _, block, row = heapq.heappop(self._by_offset)
            due.setdefault((at_ms, id(block)), []).append((block, row))
        while self._by_time and self._by_time[0][0] <= stamp_ms:
            at_ms, _, block, row = heapq.heappop(self._by_time)
            if at_ms <= self._cursor.stamp_ms:  # found out too late; a record of that very stamp counts as after it
                self._drop(block, row, "served too long before it was told")
            else:
                due.setdefault((at_ms, id(block)), []).append((block, row))
        for (at_ms, _), found in due.items():
            self._read(found[0][0], np.array([row for _, row in found], np.int64), at_ms)
        self._apply(committed)
        while self._blocks and (self._blocks[0].close_ms < self._cursor.stamp_ms).all():
            self._take(self._blocks.popleft())

    def _read(self, block: Block, rows: NDArray[np.int64], at_ms: int) -> None:
        slots = self._cursor.lookup(block.ids[rows], block.id_lengths[rows], block.epoch[rows])
        for row in rows[slots < 0]:
            self._drop(block, int(row), "no such session in that state")
        rows, slots = rows[slots >= 0], slots[slots >= 0]
        if not len(rows):
            return
        reading = self._cursor.read(slots, at_ms)
        who, viewer = np.unique(block.viewer_hash[rows], return_inverse=True)
        block.filled[rows] = True
        block.read_offset[rows] = reading.offset
        block.readings.append(Moment(rows, reading, viewer, self._cursor.histories(who, at_ms)))

    def _drop(self, block: Block, row: int, why: str) -> None:
        if block.alive[row]:
            block.alive[row] = False
            self.told[why] += 1

    # --- what followed ------------------------------------------------------------------------

    def _apply(self, committed: Committed) -> None:
        applied = self._cursor.apply(committed)
        own = self._own.pop(committed.record.offset, None)
        if applied is None or committed.batch is None:
            return
        if own is not None:
            for row in np.flatnonzero(applied.codes[own.rows] != fence.APPLIED):
                self._drop(own, int(row), "refused")
        self._attribution.events(committed, applied)

    # --- out ----------------------------------------------------------------------------------

    def _take(self, block: Block) -> None:
        """A block whose labels are final."""
        self._attribution.forget(block)
        table = finished(block, self._cursor.table.settings.embedding_dim, self._cursor.viewers is not None)
        if table is not None:
            self._done.append(table)
            self._done_rows += len(table)
            self._flush(_EMIT_ROWS)

    def _flush(self, least: int) -> None:
        if self._done_rows >= least:
            self._emit(pa.concat_tables(self._done))
            self._done, self._done_rows = [], 0


def finished(block: Block, dim: int, viewers: bool) -> Any:
    """The block's rows as an Arrow table, in the order of their events; None when none is left.

    Raises:
        LeakError: a state that was read from holds an event that made the row's label, or its own.
    """
    rows = np.flatnonzero(block.alive)
    if not len(rows):
        return None
    if not block.filled[rows].all():
        raise LeakError(f"record {block.offset}: rows without features were about to be emitted")
    check_no_leak(block.read_offset[rows], block.label_offset[rows], np.full(len(rows), block.offset))
    n_features = block.readings[0].reading.features.shape[1]
    schema = arrow_schema("impressions", n_features, dim, viewers)
    columns = _read_columns(block, n_features, dim)
    columns |= {
        "at_ms": block.at_ms, "offset": block.read_offset, "impression_ms": block.impression_ms,
        "impression_offset": np.full(len(block), block.offset), "impression_index": block.index,
        "viewer_id": block.said.viewer_id, "request_id": block.said.request_id,
        "stream_id": [
            block.ids[i, : block.id_lengths[i]].tobytes().decode() for i in range(len(block))
        ],
        "epoch": block.epoch, "position": np.minimum(block.said.position, 1 << 31) - 1,
        "propensity": block.said.propensity, "model_version": block.said.model_version,
        "clicked": block.clicked, "watch_s": block.watch_s.astype(np.float32),
        "watched": block.watch_s >= labels.WATCHED_S, "purchased": block.purchased,
        "purchase_value": block.value.astype(np.float32), "reported": block.reported,
        "label_offset": block.label_offset,
    }  # fmt: skip
    return pa.table([columns[name] for name in schema.names], schema=schema).take(pa.array(rows))


def check_no_leak(
    offset: NDArray[np.int64], label_offset: NDArray[np.int64], impression_offset: NDArray[np.int64]
) -> None:
    """Raises LeakError unless every row, int64[n] each, was read before its own record and those of its labels."""
    for name, later in (("label", np.where(label_offset == 0, offset + 1, label_offset)), ("own", impression_offset)):
        for row in np.flatnonzero(later <= offset)[:1]:
            raise LeakError(
                f"features read after record {offset[row]}, which is not before the {name} event in record {later[row]}"
            )


def _read_columns(block: Block, n_features: int, dim: int) -> dict[str, Any]:
    """What was read at one moment or several, put together."""
    n = len(block)
    features, states = np.zeros((n, n_features), np.float32), np.zeros((n, n_features), np.uint8)
    embedding = np.zeros((n, dim), np.float32)
    texts: dict[str, list[Any]] = {name: [None] * n for name in block.readings[0].reading.attributes}
    histories = empty_histories(n, dim)
    known = False
    for moment in block.readings:
        rows, reading = moment.rows, moment.reading
        features[rows], states[rows], embedding[rows] = reading.features, reading.states, reading.embedding
        for name, values in reading.attributes.items():
            for row, value in zip(rows.tolist(), values, strict=True):
                texts[name][row] = value
        if moment.histories is not None:
            known = True
            histories.embedding[rows] = moment.histories.embedding[moment.viewer]
            histories.meta[rows] = moment.histories.meta[moment.viewer]
    return {
        "features": vectors(features),
        "feature_states": vectors(states),
        "stream_embedding": vectors(embedding),
        **(history_columns(histories) if known else {}),
        **texts,
    }
