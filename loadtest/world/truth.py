"""What really happened, for tests, labels and measurements. No server can see this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtest.world.streams import NEVER, Flaw, StreamColumns

StreamRefs = Sequence[str] | Sequence[int] | NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class EndEvents:
    """All Ended events that were sent; columns, in the order of sending."""

    stream: NDArray[np.int32]  # [M] row
    epoch: NDArray[np.int64]  # [M]
    emitted_ms: NDArray[np.int64]  # [M] its event time
    delivered_ms: NDArray[np.int64]  # [M] first delivery, WorldEvents.now_ms; −1: never arrives


@dataclass(frozen=True, slots=True)
class MediaSpans:
    """Times during which media flowed, [from, to); columns, by start."""

    stream: NDArray[np.int32]  # [M] row
    epoch: NDArray[np.int64]  # [M]
    from_ms: NDArray[np.int64]  # [M]
    to_ms: NDArray[np.int64]  # [M] NEVER while it flows


class Truth:
    """Answers for any moment up to now. Streams are given as ids or as rows."""

    def __init__(self, streams: StreamColumns, start_ms: int) -> None:
        self._streams = streams
        self._start_ms = self.now_ms = start_ms
        self._spans: list[list[int]] = []  # [row, epoch, from_ms, to_ms]
        self._ends: list[tuple[int, int, int, int]] = []
        self._history: list[tuple[int, NDArray[np.int32], NDArray[np.int32]]] = []
        self._sorted: tuple[NDArray[np.int64], MediaSpans] | None = None

    # What is true now, one entry per stream that ever was.

    @property
    def viewers(self) -> NDArray[np.int64]:
        """int64[n] people watching; bots are not people."""
        return self._streams.viewers

    @property
    def reported_viewers(self) -> NDArray[np.int64]:
        """int64[n] what a ViewerCount would say: people and bots."""
        return np.where(self._streams.viewers > 0, self._streams.viewers + self._streams.bots, 0)

    @property
    def epoch(self) -> NDArray[np.int64]:
        return self._streams.epoch

    @property
    def ended_ms(self) -> NDArray[np.int64]:
        """int64[n] when media stopped for good; NEVER if it has not (a comeback takes an end back)."""
        return self._streams.ended_ms

    @property
    def view_bot(self) -> NDArray[np.bool_]:
        return np.asarray(self._streams.flaw == Flaw.VIEW_BOT)

    @property
    def chat_spam(self) -> NDArray[np.bool_]:
        return np.asarray(self._streams.flaw == Flaw.CHAT_SPAM)

    @property
    def low_quality(self) -> NDArray[np.bool_]:
        return np.asarray(self._streams.flaw == Flaw.LOW_QUALITY)

    # What was true at some time.

    def is_live(self, streams: StreamRefs, t_ms: int) -> NDArray[np.bool_]:
        """bool[k]: did media flow at ``t_ms`` <= now? False before the start, in gaps and after the end."""
        return np.asarray(self.dead_for_ms(streams, t_ms) == 0)

    def dead_for_ms(self, streams: StreamRefs, t_ms: int) -> NDArray[np.int64]:
        """int64[k]: how long before ``t_ms`` media last flowed; 0: it flows; NEVER: it had not begun.

        A server that trusts leases may show a stream while this is below its lease.
        """
        if t_ms > self.now_ms:
            raise ValueError(f"the truth is known up to {self.now_ms}, not yet at {t_ms}")
        rows = self._streams.rows_of(streams)
        keys, spans = self._index()
        place = np.searchsorted(keys, self._key(rows, t_ms), side="right") - 1
        found = place >= 0
        if len(keys):
            found &= spans.stream[place] == rows
            since = t_ms - spans.to_ms[place] + 1
        else:
            since = np.zeros(len(rows), np.int64)
        return np.where(found, np.maximum(since, 0), NEVER)

    def viewers_at(self, streams: StreamRefs, t_ms: int) -> NDArray[np.int64]:
        """int64[k] people watching at the last recording at or before ``t_ms``; 0 for streams not live then.

        Raises LookupError where nothing was recorded: see WorldSettings.record_viewers_ms.
        """
        times = [time_ms for time_ms, _, _ in self._history]
        place = int(np.searchsorted(times, t_ms, side="right")) - 1
        if place < 0 or t_ms > self.now_ms:
            raise LookupError(f"no viewers recorded for {t_ms}; is record_viewers_ms set?")
        _, known, viewers = self._history[place]
        rows = self._streams.rows_of(streams)
        if len(known) == 0:
            return np.zeros(len(rows), np.int64)
        at = np.minimum(np.searchsorted(known, rows), len(known) - 1)
        return np.where(known[at] == rows, viewers[at], 0).astype(np.int64)

    @property
    def recorded_ms(self) -> NDArray[np.int64]:
        """int64[M] times of recordings."""
        return np.array([time_ms for time_ms, _, _ in self._history], np.int64)

    @property
    def end_events(self) -> EndEvents:
        table = np.array(self._ends, np.int64).reshape(-1, 4)
        return EndEvents(table[:, 0].astype(np.int32), table[:, 1], table[:, 2], table[:, 3])

    @property
    def media_spans(self) -> MediaSpans:
        table = np.array(self._spans, np.int64).reshape(-1, 4)
        return MediaSpans(table[:, 0].astype(np.int32), table[:, 1], table[:, 2], table[:, 3])

    # Written by the world only.

    def open_span(self, row: int, epoch: int, from_ms: int) -> None:
        self._streams.open_span[row] = len(self._spans)
        self._spans.append([row, epoch, from_ms, NEVER])
        self._sorted = None

    def close_span(self, row: int, to_ms: int) -> None:
        self._spans[int(self._streams.open_span[row])][3] = to_ms
        self._sorted = None

    def end_sent(self, row: int, epoch: int, emitted_ms: int, delivered_ms: int) -> None:
        self._ends.append((row, epoch, emitted_ms, delivered_ms))

    def record(self, time_ms: int, rows: NDArray[np.int32]) -> None:
        rows = np.sort(rows)
        self._history.append((time_ms, rows, self._streams.viewers[rows].astype(np.int32)))

    def _key(self, rows: NDArray[np.integer[Any]], time_ms: NDArray[np.int64] | int) -> NDArray[np.int64]:
        # Row and time in one sortable number; streams already running began before the world did.
        return (rows.astype(np.int64) << 42) + np.maximum(time_ms - self._start_ms + 1, 0)

    def _index(self) -> tuple[NDArray[np.int64], MediaSpans]:
        """Spans by (stream, start), kept until the next one opens or closes."""
        if self._sorted is None:
            s = self.media_spans
            keys = self._key(s.stream, s.from_ms)
            order = np.argsort(keys, kind="stable")
            self._sorted = (
                keys[order],
                MediaSpans(s.stream[order], s.epoch[order], s.from_ms[order], s.to_ms[order]),
            )
        return self._sorted
