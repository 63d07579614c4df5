"""What the log does to the table: records are applied, acknowledged, and their ends published."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernels import fence
from server.clock import Clock
from server.live.ends import EndFeed
from server.live.events import DecodedBatch, EventColumns
from server.live.impressions import EndTimes
from server.live.table import Applied, End, Expired, LiveTable
from server.log.base import Record
from server.log.commit import CommitPath, Committed, Submission
from server.ranking.candidate import Candidate
from server.recorder import Recorder
from server.retrieval.streams import StreamState


@dataclass(frozen=True)
class PublishResult:
    """What became of a batch: its offset, and the reject code of each decoded event (0 applied)."""

    offset: int
    codes: NDArray[np.uint8]


class TableFault(Exception):
    """The table was being changed: which of its rows were is not known."""


class Applier:
    """Applies records of the log in its order, and knows how far it is. Its methods are the engine thread's.

    offset, stamp_ms: of the last record applied; others may read them. table_ms: up to which leases were expired.

    Args:
        candidate: told what its viewers saw.
        remembered_ends: of so many ends it is known when they were, to tell what was shown after them.
    """

    def __init__(
        self,
        clock: Clock,
        table: LiveTable,
        streams: StreamState,
        ends: EndFeed,
        candidate: Candidate,
        recorder: Recorder,
        remembered_ends: int,
    ) -> None:
        self._clock, self._table, self._streams = clock, table, streams
        self._ends, self._candidate, self._recorder = ends, candidate, recorder
        self.offset = self.stamp_ms = self.table_ms = 0
        self._end_times = EndTimes(remembered_ends)
        self._touched: list[NDArray[np.int32]] = []  # rows changed since their rules were assessed
        self._payload: bytes | None = None  # of the last record applied
        self._restored_crc = 0

    # --- before the loop ----------------------------------------------------------------------

    def restored(self, offset: int, stamp_ms: int, table_ms: int, record_crc: int, ends: Iterable[End] = ()) -> None:
        """The table and the ``ends``, oldest first, were taken from a snapshot as of record ``offset``."""
        self.offset, self.stamp_ms, self.table_ms = offset, stamp_ms, table_ms
        self._restored_crc = record_crc
        now_ms = self._clock.now_ms()
        for end in ends:  # as in `replay`: replies from before we went down are nobody's fault that is known here
            self._end_times.remember([end], end.ended_ms, now_ms)

    def replay(self, committed: Committed) -> None:
        """Applies a record of the log that was acknowledged already, if ever."""
        if committed.batch is None:
            self._skip(committed.record)
        else:
            ends = self._apply_record(committed.record, committed.batch).ends
            self._ends.publish(ends)
            # What was served before we went down is not known here to have come after an end.
            self._end_times.remember(ends, committed.record.applied_ms, self._clock.now_ms())

    def recovered(self) -> None:
        """Everything was replayed: what is derived from the rows must be computed again."""
        rows = np.arange(self._table.rows, dtype=np.int32)
        self._streams.forget_changed_sessions(rows)
        self._touched.append(rows)

    # --- in the loop --------------------------------------------------------------------------

    def apply(self, group: list[Committed], commit: CommitPath) -> None:
        """Applies a durable group and acknowledges it. A batch is acknowledged only after it was applied."""
        outcomes: list[tuple[Submission, PublishResult]] = []
        for committed in group:
            record, batch = committed.record, committed.batch
            if batch is None:
                self._skip(record)
                continue
            events = batch.events
            applied = self._apply_record(record, batch)
            self._streams.forget_changed_sessions(applied.touched)
            if applied.by_kind[fence.MODERATED]:
                moderated = (events.kind == fence.MODERATED) & (applied.codes == fence.APPLIED)
                self._streams.apply_moderation(applied.slots[moderated], record.applied_ms)
            self._touched.append(applied.touched)
            self._publish_ends(applied.ends)
            self._recorder.applied(applied)
            if applied.by_kind[fence.IMPRESSION]:
                self._saw(events, applied)
            if committed.submission is not None:
                outcomes.append((committed.submission, PublishResult(record.offset, applied.codes)))
        commit.applied(1)
        now_ms = self._clock.now_ms()
        for submission, result in outcomes:
            self._recorder.acknowledged(submission, result.codes, now_ms)
            submission.done.set_result(result)

    def expire(self, settled_ms: int) -> Expired:
        """Ends the leases that ran out by ``settled_ms``, which no later record's stamp may undercut.

        Raises:
            TableFault: it failed midway.
        """
        try:
            expired = self._table.expire(settled_ms)
        except Exception as error:
            raise TableFault("while leases were expired") from error
        self.table_ms = max(self.table_ms, settled_ms)
        self._publish_ends(expired.ends)
        return expired

    def assess_touched(self, now_ms: int) -> None:
        """Brings the rules of the rows that records changed up to date."""
        if self._touched:
            self._streams.assess(np.unique(np.concatenate(self._touched)), now_ms)
            self._touched.clear()

    def crc(self) -> int:
        """CRC-32 of the last record applied, so that a snapshot can tell which log it is of."""
        return self._restored_crc if self._payload is None else zlib.crc32(self._payload)

    # --- inside -------------------------------------------------------------------------------

    def _apply_record(self, record: Record, batch: DecodedBatch) -> Applied:
        applied = self._table.apply(batch.events, record.applied_ms)
        self.offset, self.stamp_ms = record.offset, record.applied_ms
        self._payload = record.payload
        self.table_ms = max(self.table_ms, record.applied_ms)
        return applied

    def _skip(self, record: Record) -> None:
        """Nobody can decode it: it counts as applied, and its stamp as nothing."""
        self.offset, self._payload = record.offset, record.payload

    def _publish_ends(self, ends: list[End]) -> None:
        if ends:
            now_ms = self._clock.now_ms()
            self._end_times.remember(ends, now_ms, now_ms)
            self._ends.publish(ends)
            self._recorder.ended(ends)

    def _saw(self, events: EventColumns, applied: Applied) -> None:
        """Counts what clients saw, and which of it was dead, for the server and for the version on trial."""
        rows = events.impressions[applied.codes[events.impressions] == fence.APPLIED]
        dead = self._end_times.causes(events, applied, self._table.columns)
        self._recorder.impressions(len(rows), list(dead.values()))
        viewers = events.viewer_hash
        self._candidate.saw(viewers[rows], viewers[np.array(list(dead), np.int64)], list(dead.values()))
