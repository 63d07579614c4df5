"""What happened, as the clients saw it. Recorded by many threads, judged afterwards by `check.py`.

Two clocks: ``…_s`` is time.monotonic() of the recording process, for what came before what; ``…_ms`` is
time.time(), comparable with the server's clock because both run on one machine.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

STARTED, HEARTBEAT, ENDED, VIEWERS = "started", "heartbeat", "ended", "viewer_count"


@dataclass(frozen=True)
class Moment:
    """One instant by both clocks."""

    at_s: float
    at_ms: int

    @classmethod
    def now(cls) -> Moment:
        return cls(time.monotonic(), time.time_ns() // 1_000_000)


@dataclass(frozen=True)
class EventSent:
    """value: media sequence of a heartbeat, count of a viewer_count."""

    sequence: int
    stream_id: str
    epoch: int
    kind: str
    event_ms: int
    value: int = 0


@dataclass
class BatchSent:
    """One sending of a batch; a resend is another. ``acked`` None: no acknowledgement came, so it may or may
    not have been applied. codes: reject code by place in the batch (RejectCode); accepted events have none."""

    producer_id: str
    events: tuple[EventSent, ...]
    sent: Moment
    acked: Moment | None = None
    offset: int = 0
    codes: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """What one request was told may be shown: (stream_id, epoch) pairs."""

    sent: Moment
    received: Moment
    as_of_ms: int
    shown: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Heard:
    """One end heard by a watcher; ``offset`` is its number in the stream of ends."""

    watcher: str
    offset: int
    stream_id: str
    epoch: int
    reason: str


@dataclass(frozen=True)
class FinalState:
    """A stream at the end of the run. viewers: the reported gauge; None when not asked for or not known."""

    state: str
    epoch: int
    as_of_ms: int
    viewers: float | None = None


@dataclass
class History:
    """Everything on record. Appending is safe from any thread; reading once all threads have ended.

    watching: when each watcher's first subscription was confirmed. resent: reject code (0: none) of each event
    that had been acknowledged and was sent once more with its old sequence. applied_offset: at the end.
    """

    batches: list[BatchSent] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    heard: list[Heard] = field(default_factory=list)
    watching: dict[str, Moment] = field(default_factory=dict)
    resent: list[tuple[EventSent, int]] = field(default_factory=list)
    final: dict[str, FinalState] = field(default_factory=dict)
    applied_offset: int = 0
    kills: int = 0
    failed_calls: int = 0
    began: Moment = field(default_factory=Moment.now)
    ended: Moment | None = None
