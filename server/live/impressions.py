"""Dead impressions: a viewer saw a stream after it had ended. Who could have prevented it?

Closes the loop of the promise "no dead stream is shown": clients report what they showed (`Impression`), and
each impression of a session that was over by then is counted under one cause.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import numpy as np

from kernels import fence
from server.live.columns import Columns
from server.live.events import EventColumns
from server.live.table import Applied, End


class Cause(Enum):
    """Why a dead stream was seen."""

    US = "us"
    """Our reply was made after the end had been acknowledged. Must never happen."""
    CACHE = "cache"
    """Served while it lived, but shown past its verify_by without asking again."""
    CLIENT = "client"
    """Served while it lived and shown within its verify_by: it ended on the way to the screen."""


@dataclass(frozen=True)
class EndTime:
    """When a session ended, by the server's clock.

    ended_ms: stamp of the end. gone_ms: from when on no reply may contain it. The second is later by the time
    that the log takes; a reply made in between is as good as one made before the end.
    """

    ended_ms: int
    gone_ms: int


def cause_of(shown_ms: int, served_ms: int, verify_by_ms: int, end: EndTime | None) -> Cause | None:
    """The cause of a dead impression; None when the session lived, as far as is known, when it was shown.

    Args:
        shown_ms: when the viewer saw it. served_ms: RankResponse.as_of_ms of the reply that it was in.
        verify_by_ms: until when that reply allowed it to be shown. end: of that session; None: not ended.

    Two times in the same millisecond count in favour of whoever would be blamed.
    """
    if end is None or shown_ms <= end.ended_ms:
        return None
    if served_ms > end.gone_ms:
        return Cause.US
    return Cause.CACHE if shown_ms > verify_by_ms else Cause.CLIENT


class EndTimes:
    """Remembers when the newest ``capacity`` sessions ended, by (stream_id, epoch). One thread uses it."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._ends: OrderedDict[tuple[str, int], EndTime] = OrderedDict()

    def remember(self, ends: Iterable[End], ended_ms: int, gone_ms: int) -> None:
        """Takes ends over; the first word on a session counts."""
        for end in ends:
            self._ends.setdefault((end.stream_id, end.epoch), EndTime(ended_ms, gone_ms))
        while len(self._ends) > self._capacity:
            self._ends.popitem(last=False)

    def of(self, stream_id: str, epoch: int) -> EndTime | None:
        """None: this session has not ended, or so long ago that it is forgotten."""
        return self._ends.get((stream_id, epoch))

    def causes(self, events: EventColumns, applied: Applied, columns: Columns) -> dict[int, Cause]:
        """The causes of the dead ones among the impressions of a batch that was just applied, by row of ``events``.

        ``columns`` are the table's. Python runs only for impressions of sessions that are not open any more.
        """
        rows = events.impressions
        slots = applied.slots[rows]  # -1, hence some other row, only where not applied
        over = (columns.state[slots] == fence.ENDED) | (events.epoch[rows] < columns.epoch[slots])
        found: dict[int, Cause] = {}
        for at in np.flatnonzero(over & (applied.codes[rows] == fence.APPLIED)).tolist():
            row = rows[at]
            stream_id = events.ids[row, : events.id_lengths[row]].tobytes().decode()
            end = self.of(stream_id, int(events.epoch[row]))
            times = (int(events.time_ms[row]), int(events.served_ms[at]), int(events.verify_by_ms[at]))
            if (cause := cause_of(*times, end)) is not None:
                found[int(row)] = cause
        return found
