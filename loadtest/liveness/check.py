"""Judges a recorded history. Pure: no clock, no network, no order of threads.

What is decided, and what would make it wrong:

Streams that no batch of the history names belong to somebody else on the same server and are not judged.

- *Ends.* A reply must not contain a session that was over when its request was **sent**: an end of this or a
  higher epoch, or a start of a higher one, had been acknowledged. One clock of one process, hence no tolerance.
- *Leases.* A reply must not contain a session whose lease had run out when its request was sent. The checker
  computes the latest moment itself: newest proof that can have been applied by the time the reply was received,
  min(event time, its acknowledgement) + lease. Proofs that were never acknowledged count in the server's
  favour. The server's clock and ours are compared, so LEASE_BOUND_MS is allowed; less goes unseen.
- *Events.* Whatever was acknowledged must be there at the end: epoch, end, newest viewer count, offset, and
  the sequence number of what is sent again.
- *Notices.* Every watcher hears every acknowledged end, and ends without a gap in their numbers.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from liverank.v1 import ingest_pb2 as pb

from loadtest.liveness.history import ENDED, HEARTBEAT, STARTED, VIEWERS, BatchSent, EventSent, History, Reply

LEASE_BOUND_MS = 50
_APPLIED = (0, pb.DUPLICATE_SEQUENCE)  # the second: by an earlier sending whose acknowledgement was lost
_OVER = (pb.STREAM_ENDED, pb.EPOCH_BACKWARDS)
Session = tuple[str, int]


@dataclass
class Verdict:
    """What was found, in words; empty lists are what is promised. lapses: leases that ran out in the run."""

    violations: list[str] = field(default_factory=list)
    missing_events: list[str] = field(default_factory=list)
    missed_watch_ends: list[str] = field(default_factory=list)
    replies: int = 0
    ends: int = 0
    lapses: int = 0
    kills: int = 0

    @property
    def ok(self) -> bool:
        return not (self.violations or self.missing_events or self.missed_watch_ends)

    def summary(self) -> dict[str, int]:
        """The figures of the checker's last line."""
        return {
            "replies": self.replies, "ends": self.ends, "expiries": self.lapses, "kills": self.kills,
            "violations": len(self.violations), "missing_events": len(self.missing_events),
            "missed_watch_ends": len(self.missed_watch_ends),
        }  # fmt: skip


def check(history: History, lease_ms: int) -> Verdict:
    """Judges the whole history; ``lease_ms`` is the server's setting."""
    found = tally(history, lease_ms)
    found.violations = find_violations(history, lease_ms)
    found.missing_events = find_missing(history, lease_ms)
    found.missed_watch_ends = find_missed_notices(history)
    return found


def tally(history: History, lease_ms: int) -> Verdict:
    """How much there was to judge, nothing judged yet; also usable on a history that is still growing."""
    ends = sum(event.kind == ENDED for _, event, code in _acknowledged(history) if code == 0)
    lapses = _Proofs(history, lease_ms).lapses(history)
    return Verdict(replies=len(history.replies), ends=ends, lapses=lapses, kills=history.kills)


def find_violations(history: History, lease_ms: int) -> list[str]:
    """Sessions in replies that must not be there; also usable on a history that is still growing."""
    replies = list(history.replies)  # before the batches: a stream shown by one of these is known by then
    over, proofs = _Over(history), _Proofs(history, lease_ms)
    ours = {event.stream_id for batch in list(history.batches) for event in batch.events}
    found = []
    for reply in replies:
        for stream_id, epoch in reply.shown:
            if stream_id not in ours:
                continue
            since_s = over.since_s(stream_id, epoch)
            if since_s < reply.sent.at_s:
                ago_ms = (reply.sent.at_s - since_s) * 1000
                found.append(f"{stream_id}/{epoch} was shown; its end was acknowledged {ago_ms:.1f} ms before")
                continue
            until_ms = proofs.until_ms(stream_id, epoch, reply)
            if until_ms is None:
                found.append(f"{stream_id}/{epoch} was shown, and nobody ever started it")
            elif reply.sent.at_ms > until_ms + LEASE_BOUND_MS:
                found.append(f"{stream_id}/{epoch} was shown {reply.sent.at_ms - until_ms:.0f} ms past its lease")
    return found


def find_missing(history: History, lease_ms: int) -> list[str]:
    """Acknowledged events that left no trace."""
    found = []
    seen: dict[int, BatchSent] = {}
    for batch in history.batches:
        if batch.acked is None:
            continue
        if not 0 < batch.offset <= history.applied_offset:
            found.append(f"offset {batch.offset} was acknowledged; {history.applied_offset} is the last applied")
        if batch.offset in seen:
            found.append(f"offset {batch.offset} was acknowledged twice")
        seen[batch.offset] = batch
    for event, code in history.resent:
        if code not in (pb.DUPLICATE_SEQUENCE, pb.SEQUENCE_TOO_OLD):
            found.append(f"{event.kind} of {event.stream_id} ({event.sequence}) is forgotten: a resend got {code}")
    by_stream: dict[str, list[tuple[BatchSent, EventSent, int | None]]] = defaultdict(list)
    for batch in history.batches:
        for place, event in enumerate(batch.events):
            code = batch.codes.get(place, 0) if batch.acked else None
            by_stream[event.stream_id].append((batch, event, code))
    for stream_id, state in history.final.items():
        found += _missing_of_stream(stream_id, by_stream[stream_id], state.state, state.epoch, state.as_of_ms, lease_ms)
        found += _missing_viewers(stream_id, by_stream[stream_id], state.epoch, state.viewers)
    return found


def _missing_of_stream(
    stream_id: str,
    sent: list[tuple[BatchSent, EventSent, int | None]],
    state: str,
    epoch: int,
    as_of_ms: int,
    lease_ms: int,
) -> list[str]:
    """Epoch, end and lease of one stream at the end of the run."""
    begun = [(event, code) for _, event, code in sent if event.kind in (STARTED, ENDED)]
    least = max((event.epoch for event, code in begun if code in _APPLIED), default=0)
    most = max((event.epoch for event, code in begun if code is None or code in _APPLIED), default=0)
    if not least <= epoch <= most:
        return [f"{stream_id} is at epoch {epoch}; {least} was acknowledged and {most} is the highest sent"]
    if least == 0 or epoch == 0:
        return []
    ends = [code for event, code in begun if event.kind == ENDED and event.epoch == epoch]
    if any(code in (*_APPLIED, pb.STREAM_ENDED) for code in ends) and state != "ENDED":
        return [f"{stream_id}/{epoch} is {state}; its end was acknowledged"]
    certain_ms, highest = 0, -1
    for batch, event, code in sent:
        if event.kind == HEARTBEAT and event.epoch == epoch:
            if event.value > highest and code in _APPLIED:
                certain_ms = max(certain_ms, min(event.event_ms, batch.sent.at_ms) + lease_ms)
            highest = max(highest, event.value)
    if not ends and state != "LIVE" and certain_ms > as_of_ms + LEASE_BOUND_MS:
        return [f"{stream_id}/{epoch} is {state}; an acknowledged heartbeat holds for {certain_ms - as_of_ms} ms more"]
    return []


def _missing_viewers(
    stream_id: str, sent: list[tuple[BatchSent, EventSent, int | None]], epoch: int, viewers: float | None
) -> list[str]:
    counts = [(event, code) for _, event, code in sent if event.kind == VIEWERS and event.epoch == epoch]
    newest_ms = max((event.event_ms for event, code in counts if code in _APPLIED), default=None)
    if viewers is None or newest_ms is None:
        return []
    allowed = {event.value for event, code in counts if event.event_ms >= newest_ms and code in (None, *_APPLIED)}
    if int(viewers) in allowed:
        return []
    return [f"{stream_id}/{epoch} has {viewers:.0f} viewers; acknowledged last: {sorted(allowed)}"]


def find_missed_notices(history: History) -> list[str]:
    """Ends that a watcher did not hear, and gaps in what it heard."""
    found = []
    offsets: dict[str, set[int]] = defaultdict(set)
    sessions: dict[str, set[Session]] = defaultdict(set)
    for notice in history.heard:
        offsets[notice.watcher].add(notice.offset)
        sessions[notice.watcher].add((notice.stream_id, notice.epoch))
    for watcher, since in history.watching.items():
        if heard := offsets[watcher]:
            gaps = set(range(min(heard), max(heard) + 1)) - heard
            found += [f"{watcher} never heard end number {number}" for number in sorted(gaps)]
        for batch, event, code in _acknowledged(history):
            due = event.kind == ENDED and code in _APPLIED and batch.sent.at_s > since.at_s
            if due and (event.stream_id, event.epoch) not in sessions[watcher]:
                found.append(f"{watcher} never heard of the end of {event.stream_id}/{event.epoch}")
    return found


def _acknowledged(history: History) -> Iterator[tuple[BatchSent, EventSent, int]]:
    for batch in list(history.batches):
        if batch.acked is not None:
            for place, event in enumerate(batch.events):
                yield batch, event, batch.codes.get(place, 0)


class _Over:
    """From when on each session was known to be over."""

    def __init__(self, history: History) -> None:
        known: dict[str, list[Session | tuple[int, float]]] = defaultdict(list)
        for batch, event, code in _acknowledged(history):
            assert batch.acked is not None
            epoch = -1
            if event.kind == ENDED and (code in _APPLIED or code in _OVER):
                epoch = event.epoch
            elif event.kind == STARTED and code in _APPLIED:
                epoch = event.epoch - 1
            elif event.kind == STARTED and code in _OVER:
                epoch = event.epoch
            if epoch > 0:
                known[event.stream_id].append((epoch, batch.acked.at_s))
        self._epochs: dict[str, list[int]] = {}
        self._since_s: dict[str, list[float]] = {}
        for stream_id, entries in known.items():
            entries.sort()
            epochs, since_s, earliest_s = [], [], float("inf")
            for epoch, at_s in reversed(entries):  # the end of a higher epoch is one of every lower too
                earliest_s = min(earliest_s, float(at_s))
                epochs.append(int(epoch))
                since_s.append(earliest_s)
            self._epochs[stream_id], self._since_s[stream_id] = epochs[::-1], since_s[::-1]

    def since_s(self, stream_id: str, epoch: int) -> float:
        """Infinity when it was not over."""
        epochs = self._epochs.get(stream_id, [])
        place = bisect_left(epochs, epoch)
        return self._since_s[stream_id][place] if place < len(epochs) else float("inf")


class _Proofs:
    """Until when each session can have been live, given what was sent."""

    def __init__(self, history: History, lease_ms: int) -> None:
        confirmed: dict[Session, list[tuple[float, int]]] = defaultdict(list)  # (acked_s, media sequence)
        started_s: dict[Session, float] = {}
        for batch, event, code in _acknowledged(history):
            assert batch.acked is not None
            session = (event.stream_id, event.epoch)
            if event.kind == HEARTBEAT and code in _APPLIED:
                confirmed[session].append((batch.acked.at_s, event.value))
            elif event.kind == STARTED and code in _APPLIED:
                started_s[session] = min(batch.acked.at_s, started_s.get(session, float("inf")))
        reached = {session: _running_max(entries) for session, entries in confirmed.items()}
        found: dict[Session, list[tuple[float, float]]] = defaultdict(list)  # (sent_s, until_ms)
        self._renewals: dict[Session, list[tuple[int, float]]] = defaultdict(list)  # (sent_ms, until_ms)
        for batch in list(history.batches):
            for event in batch.events:
                session = (event.stream_id, event.epoch)
                if event.kind == HEARTBEAT:
                    if session in reached and event.value <= _before(reached[session], batch.sent.at_s):
                        continue  # no media progress
                elif event.kind != STARTED or started_s.get(session, float("inf")) < batch.sent.at_s:
                    continue
                proof_ms = min(event.event_ms, batch.acked.at_ms) if batch.acked else event.event_ms
                found[session].append((batch.sent.at_s, float(proof_ms + lease_ms)))
                self._renewals[session].append((batch.sent.at_ms, float(proof_ms + lease_ms)))
        self._until = {session: _running_max(entries) for session, entries in found.items()}

    def until_ms(self, stream_id: str, epoch: int, reply: Reply) -> float | None:
        """The latest possible end of the lease as of when ``reply`` was received; None: never started."""
        proofs = self._until.get((stream_id, epoch))
        if proofs is None or proofs[0][0] > reply.received.at_s:
            return None
        return _at(proofs, reply.received.at_s)

    def lapses(self, history: History) -> int:
        """How often a lease ran out: before its next renewal was sent, or before the run was over."""
        over, n = _Over(history), 0
        for session, renewals in self._renewals.items():
            renewals.sort()
            until_ms = [until_ms for _, until_ms in renewals]
            n += sum(sent_ms > until for (sent_ms, _), until in zip(renewals[1:], until_ms, strict=False))
            still_open = over.since_s(*session) == float("inf")
            n += still_open and history.ended is not None and until_ms[-1] < history.ended.at_ms
        return n


Steps = tuple[list[float], list[float]]


def _running_max(entries: list[tuple[float, float]] | list[tuple[float, int]]) -> Steps:
    """A step function of time: (times, largest value up to each)."""
    times, values, largest = [], [], float("-inf")
    for at, value in sorted(entries):
        largest = max(largest, value)
        times.append(at)
        values.append(largest)
    return times, values


def _at(steps: Steps, at: float) -> float:
    """Its value at ``at``, which is not before its first step."""
    return steps[1][bisect_right(steps[0], at) - 1]


def _before(steps: Steps, at: float) -> float:
    """Its value just before ``at``; minus infinity before its first step."""
    place = bisect_left(steps[0], at)
    return steps[1][place - 1] if place else float("-inf")
