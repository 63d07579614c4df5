"""Which impression an event belongs to: the joining of labels, by the rules of `models.labels`.

A join belongs to the viewer's last impression of the stream that was seen before it. Watching, buying and reporting
belong to the impression of the viewer's last join, while that one's window lasts, and else to the last impression: who
is shown a stream again while watching it does not watch because of that.

An event counts only for rows that are still open at the stamp of its record, whatever else is in memory, so that
labels do not depend on how the job is cut into shards. It never counts for a row whose features were read from a state
that already held it.
"""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

import numpy as np

from kernels import fence
from models import labels
from models.rows.base import stream_keys
from server.live.table import Applied
from server.log.commit import Committed

if TYPE_CHECKING:
    from models.rows.impressions import Block

Key = tuple[int, int]
"""(viewer's hash, stream's key)"""

_KINDS = (fence.JOINED, fence.WATCHED, fence.PURCHASED, fence.REPORTED)


class Attribution:
    """The open impressions by viewer and stream, and where each viewer's last join went."""

    def __init__(self) -> None:
        self._seen: dict[Key, list[tuple[int, Block, int]]] = {}  # (impression_ms, block, row) by time
        self._joined: dict[Key, tuple[int, Block, int]] = {}

    def add(self, block: Block) -> None:
        """New impressions. Those without a viewer get no labels."""
        for row, (viewer, key, at_ms) in enumerate(
            zip(block.viewer_hash.tolist(), block.keys.tolist(), block.impression_ms.tolist(), strict=True)
        ):
            if viewer:
                found = self._seen.setdefault((viewer, key), [])
                # Of two at the same time the first is looked at first: the second is most likely a resend of it.
                bisect.insort_left(found, (at_ms, block, row), key=lambda one: one[0])

    def forget(self, block: Block) -> None:
        """The labels of a block are final."""
        for viewer, key in zip(block.viewer_hash.tolist(), block.keys.tolist(), strict=True):
            found = self._seen.get((viewer, key))
            if found is None:
                continue
            left = [one for one in found if one[1] is not block]
            if left:
                self._seen[viewer, key] = left
            else:
                del self._seen[viewer, key]
            if (joined := self._joined.get((viewer, key))) is not None and joined[1] is block:
                del self._joined[viewer, key]

    def events(self, committed: Committed, applied: Applied) -> None:
        """Counts the events of a record that were applied."""
        assert committed.batch is not None
        events = committed.batch.events
        chosen = np.flatnonzero(
            (applied.codes == fence.APPLIED) & (events.viewer_hash != 0) & np.isin(events.kind, _KINDS)
        )
        if not len(chosen) or not self._seen:
            return
        keys = stream_keys(events.ids[chosen], events.id_lengths[chosen])
        for viewer, key, kind, at_ms, value in zip(
            events.viewer_hash[chosen].tolist(), keys.tolist(), events.kind[chosen].tolist(),
            events.time_ms[chosen].tolist(), events.value[chosen].tolist(), strict=True,
        ):  # fmt: skip
            if (viewer, key) in self._seen:
                self._count((viewer, key), kind, at_ms, value, committed)

    def _count(self, key: Key, kind: int, at_ms: int, value: float, committed: Committed) -> None:
        stamp_ms, offset = committed.record.applied_ms, committed.record.offset
        found = self._last_seen(key, at_ms)
        if found is None:
            return
        joined = self._joined.get(key)
        if kind == fence.JOINED:
            if joined is None or joined[0] <= found[0]:
                self._joined[key] = found
        elif joined is not None and joined[0] <= at_ms <= joined[0] + labels.WINDOW_MS and _open(joined, stamp_ms):
            found = joined
        impression_ms, block, row = found
        if not _open(found, stamp_ms) or at_ms > impression_ms + labels.WINDOW_MS:
            return
        if not block.filled[row]:
            return  # the state that it will be read from holds this event already
        if kind == fence.JOINED:
            if at_ms > impression_ms + labels.CLICK_WITHIN_MS:
                return
            block.clicked[row] = True
        elif kind == fence.WATCHED:
            block.watch_s[row] += value
        elif kind == fence.PURCHASED:
            block.purchased[row] = True
            block.value[row] += value
        else:
            block.reported[row] = True
        if block.label_offset[row] == 0:
            block.label_offset[row] = offset

    def _last_seen(self, key: Key, at_ms: int) -> tuple[int, Block, int] | None:
        for one in reversed(self._seen[key]):
            if one[0] <= at_ms and one[1].alive[one[2]]:
                return one
        return None


def _open(seen: tuple[int, Block, int], stamp_ms: int) -> bool:
    """Whether labels of that impression are still taken from records of this stamp."""
    return bool(seen[1].alive[seen[2]]) and int(seen[1].close_ms[seen[2]]) >= stamp_ms
