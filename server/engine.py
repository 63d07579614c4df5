"""The engine: one thread that owns the table. Events, ranking, ticks and control are serialised on it.

log writer ──committed──▶ ┐                        ┌─▶ acknowledgements
Rank calls ──queries────▶ ├─▶ apply · rank · tick ─┼─▶ encoded replies
score refresh ──scores──▶ ┘                        └─▶ ends, metrics
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kernels import fence
from server.admission.gate import Admission
from server.batching.base import Answer, Priority, Turn, Waiting, hand_out
from server.batching.queue import RankQueue
from server.clock import Clock
from server.config import Settings
from server.errors import Draining, LiverankError, OffsetNotReached
from server.live.ends import EndFeed
from server.live.events import DecodedBatch, EventColumns
from server.live.features import FeatureSet
from server.live.impressions import EndTimes
from server.live.table import Applied, End, LiveTable
from server.log.base import Record
from server.log.commit import CommitPath, Committed, Submission
from server.ranking.candidate import Candidate
from server.ranking.pipeline import Pipeline, Started
from server.ranking.slates import RankedBy, ReplyState, SlateBatch
from server.recorder import Recorder
from server.retrieval.query import QueryBatch, RankQuery, build_batch
from server.retrieval.streams import StreamState
from server.retrieval.view import Snapshot
from server.rules.rulebook import RuleBook, Surface
from server.scoring.ladder import Level
from server.scoring.refresh import Refresher, RefreshResult
from server.sweep import Sweep

logger = logging.getLogger(__name__)
T = TypeVar("T")
A = TypeVar("A", bound=Answer)


@dataclass(frozen=True)
class PublishResult:
    """What became of a batch: its offset, and the reject code of each decoded event (0 applied)."""

    offset: int
    codes: NDArray[np.uint8]


@dataclass(frozen=True)
class _OnItsWay:
    """A batch between start and finish, and who waits for it.

    started: the viewers ranked by the model in use, None for nobody. by_candidate: bool[B], the other ones.
    """

    items: list[Waiting[RankQuery]]
    started: Started | None
    began_s: float
    quality: float
    by_candidate: NDArray[np.bool_] | None

    def wait_s(self) -> float:
        """Seconds for which finishing it would wait for something that comes meanwhile."""
        return 0.0 if self.started is None else self.started.wait_s()


class _TableFault(Exception):
    """The table was being changed: which of its rows were is not known."""


Encoder = Callable[[SlateBatch, ReplyState, LiveTable, float], list[bytes]]


class Engine:
    """Runs the loop. Everything it is given is used by its thread alone, unless documented otherwise.

    Args:
        encode: turns a ranked batch into one serialised RankResponse per request.
        admission: told how long requests took; gives the quality factor.
        on_fault: called once, from the engine thread, if it must give up: its table cannot be trusted.
    """

    def __init__(
        self,
        settings: Settings,
        clock: Clock,
        table: LiveTable,
        features: FeatureSet,
        streams: StreamState,
        pipeline: Pipeline,
        ends: EndFeed,
        recorder: Recorder,
        encode: Encoder,
        admission: Admission,
        on_fault: Callable[[], None],
    ) -> None:
        self.settings, self.clock, self.table = settings, clock, table
        self.features, self.streams, self.pipeline, self.ends = features, streams, pipeline, ends
        self._recorder, self._encode, self._on_fault = recorder, encode, on_fault
        self.applied_offset = self.applied_stamp_ms = 0
        self._applied_payload: bytes | None = None
        self._restored_crc = 0
        self.table_ms = 0
        """Up to which leases were expired."""
        self._end_times = EndTimes(settings.serve.watch_buffer)
        self.admission = admission
        self.on_rules: Callable[[], None] = _nothing
        """Told, on the engine thread, that there are other rules, and maybe other surfaces."""
        self.scores = RefreshResult(
            np.zeros(0, np.int32), np.zeros(0, np.uint32), None, None, Level.FORMULA,
            ("no scores yet",), "", clock.now_ms(), 0,
        )  # fmt: skip
        self.candidate = Candidate(streams, pipeline)
        self._turn = 0  # which of the refresher's scorers is listened to
        self.first_scores = threading.Event()
        self.on_served: Callable[[SlateBatch, ReplyState], None] | None = None
        self._served: list[tuple[SlateBatch, ReplyState]] = []  # to be told once they are handed out
        """Told of each batch after it was answered, before anything else is applied. Set before `start`."""
        self._commit: CommitPath | None = None
        self._refresher: Refresher | None = None
        self._wake = threading.Condition()
        self._committed: deque[list[Committed]] = deque()
        serve = settings.serve
        self._queue: RankQueue[RankQuery] = RankQueue(serve.max_batch_rows, serve.batch_window_us / 1e6)
        self._calls: deque[tuple[Callable[[], object], Future[object]]] = deque()
        self._results: deque[RefreshResult] = deque()
        self._on_its_way: _OnItsWay | None = None  # a batch that the device works on
        self._in_hand: list[Answer] = []  # taken from the queues in this turn of the loop
        self._touched: list[NDArray[np.int32]] = []
        self._next_tick_s = 0.0
        self._view_ticks = 0  # that the present view is old
        self._next_refresh_ms = 0
        self._sweep = Sweep.begin(table, features)
        self._batch_s = 0.0
        self._started = self._stopping = False
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- from other threads -------------------------------------------------------------------

    def start(self, commit: CommitPath, refresher: Refresher) -> None:
        """Starts the loop; the log has been recovered before."""
        self._commit, self._refresher = commit, refresher
        with self._wake:
            self._started = True
        self._thread.start()

    def _check_open(self) -> None:
        if self._stopping:
            raise Draining("the server is draining")
        if not self._started:
            raise Draining("the server is starting: it recovers its table from the log")

    def committed(self, group: list[Committed]) -> None:
        """Takes batches that became durable, in log order."""
        with self._wake:
            if not self._failed:
                self._committed.append(group)
                self._wake.notify()
                return
        for done in _waiting_for([group]):
            done.set_exception(Draining("the engine failed; the server is going away"))

    def scored(self, result: RefreshResult) -> None:
        """Takes the result of a score refresh."""
        with self._wake:
            self._results.append(result)
            self._wake.notify()

    def rank(
        self,
        queries: list[RankQuery],
        client: str = "",
        priority: Priority = Priority.INTERACTIVE,
        arrived_s: float | None = None,
        answer: Callable[[], A] = Future,  # type: ignore[assignment]
    ) -> list[A]:
        """Queues viewers to be ranked; resolves to one serialised RankResponse each, in order.

        One answer per ``max_batch_rows`` viewers: between the parts of a large call the engine applies
        events and ticks. All or nothing is queued.

        Args:
            arrived_s: when the call came, monotonic; None: now.
            answer: makes what the engine thread resolves.

        Raises:
            Overloaded: too many viewers wait already. Draining: the engine has not started, or stops.
        """
        step = self.settings.serve.max_batch_rows
        arrived_s = time.monotonic() if arrived_s is None else arrived_s
        parts: list[Waiting[RankQuery]] = []
        answers: list[A] = []
        for i in range(0, len(queries), step):
            rows = queries[i : i + step]
            deadline_s, offset = min(q.deadline_s for q in rows), max(q.min_offset for q in rows)
            answers.append(answer())
            parts.append(Waiting(rows, client, priority, arrived_s, deadline_s, offset, answers[-1]))
        with self._wake:
            self._check_open()
            if self._queue.rows + len(queries) > max(self.settings.serve.max_queue_rows, len(queries)):
                raise self.admission.full(self._queue.rows, priority)
            self._queue.put(parts, self.applied_offset)
            self._wake.notify()
        return answers

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Runs ``function`` on the engine thread, between batches."""
        done: Future[T] = Future()
        with self._wake:
            self._check_open()
            self._calls.append((function, done))  # type: ignore[arg-type]
            self._wake.notify()
        return done

    def wake(self) -> None:
        """Something that the engine waits for has come. Any thread."""
        with self._wake:
            self._wake.notify()

    @property
    def surfaces(self) -> Mapping[str, Surface]:
        """Those that a request may name, of the rules as they are now."""
        return self.streams.book.surfaces

    @property
    def queued_rows(self) -> int:
        """Viewers that wait to be ranked."""
        return self._queue.rows

    def stop(self) -> None:
        """Finishes what is queued, then ends the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._started:
            self._thread.join()

    # --- before the loop ----------------------------------------------------------------------

    def restored(self, offset: int, stamp_ms: int, table_ms: int, record_crc: int, ends: Iterable[End] = ()) -> None:
        """The table and the ``ends``, oldest first, were taken from a snapshot as of record ``offset``."""
        self.applied_offset, self.applied_stamp_ms, self.table_ms = offset, stamp_ms, table_ms
        self._restored_crc = record_crc
        now_ms = self.clock.now_ms()
        for end in ends:  # as in `replay`: replies from before we went down are nobody's fault that is known here
            self._end_times.remember([end], end.ended_ms, now_ms)

    def applied_crc(self) -> int:
        """CRC-32 of the newest applied record, so that a snapshot can tell which log it is of."""
        return self._restored_crc if self._applied_payload is None else zlib.crc32(self._applied_payload)

    def replay(self, committed: Committed) -> None:
        """Applies a record of the log, before the loop."""
        if committed.batch is None:
            self._skip_record(committed.record)
        else:
            ends = self._apply_record(committed.record, committed.batch).ends
            self.ends.publish(ends)
            # What was served before we went down is not known here to have come after an end.
            self._end_times.remember(ends, committed.record.applied_ms, self.clock.now_ms())

    def recovered(self) -> None:
        """Everything was replayed: what is derived from the rows must be computed again."""
        rows = np.arange(self.table.rows, dtype=np.int32)
        self.streams.forget_changed_sessions(rows)
        self._touched.append(rows)

    # --- the loop -----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._loop()
        except Exception:
            logger.critical("the engine gives up: its table may be half-changed", exc_info=True)
            try:
                self._fail_everything(Draining("the engine failed; the server is going away"))
            finally:
                self._on_fault()

    def _fail_everything(self, error: LiverankError) -> None:
        with self._wake:
            self._stopping = self._failed = True
            futures = self._in_hand + [w.done for w in self._queue.waiting()]
            futures += [w.done for w in self._on_its_way.items] if self._on_its_way is not None else []
            futures += [done for _, done in self._calls]
            futures += _waiting_for(self._committed)
        for future in futures:
            with contextlib.suppress(InvalidStateError):  # answered, or its caller just went away
                future.set_exception(error)

    def _loop(self) -> None:
        while True:
            with self._wake:
                while (idle_s := self._idle_s()) > 0:
                    self._wake.wait(idle_s)
                groups, self._committed = list(self._committed), deque()
                results, self._results = list(self._results), deque()
                calls, self._calls = list(self._calls), deque()
                self._in_hand = _waiting_for(groups)
                self._in_hand += [done for _, done in calls]
                finished = self._stopping and not (groups or results or calls or self._queue.rows or self._on_its_way)
            if finished:
                return
            for group in groups:
                self._apply(group)
            for result in results:
                self._take_scores(result)
            if time.monotonic() >= self._next_tick_s:
                self._guard(self._tick, "tick")
                self._next_tick_s = time.monotonic() + self.settings.rank.tick_ms / 1000
            for function, done in calls:
                _resolve(done, function)
            if self._on_its_way is not None and self._on_its_way.wait_s() > 0 and not self._stopping:
                continue  # a model works on it: events and ticks meanwhile, rather than waiting in `finish`
            with self._wake:  # last, so that it sees the offsets applied above
                turn = self._queue.take(self.applied_offset, self._budget_s(), closing=self._stopping)
                self._in_hand += [item.done for item in turn.taken()]
            self._answer(turn)

    def _idle_s(self) -> float:
        """Seconds until there is something to do, unless something comes."""
        if self._committed or self._calls or self._results or self._stopping:
            return 0.0
        to_tick_s = self._next_tick_s - time.monotonic()
        if self._on_its_way is not None:  # the next turn is taken when this batch can be finished
            return min(to_tick_s, self._on_its_way.wait_s())
        to_turn_s = self._queue.due_in_s()
        return to_tick_s if to_turn_s is None else min(to_tick_s, to_turn_s)

    def _guard(self, step: Callable[[], None], name: str) -> None:
        """An unexpected fault in a periodic step is logged and counted; the engine must go on answering.

        Unless it was in the table: one that may be half-changed serves nobody.
        """
        try:
            step()
        except _TableFault:
            raise
        except Exception:
            logger.exception("unexpected fault in %s", name)
            self._recorder.fault(name)

    # --- events -------------------------------------------------------------------------------

    def _apply(self, group: list[Committed]) -> None:
        """Applies a durable group and acknowledges it. A batch is acknowledged only after it was applied."""
        assert self._commit is not None
        outcomes: list[tuple[Submission, PublishResult]] = []
        for committed in group:
            record, batch = committed.record, committed.batch
            if batch is None:
                self._skip_record(record)
                continue
            events = batch.events
            applied = self._apply_record(record, batch)
            self.streams.forget_changed_sessions(applied.touched)
            if applied.by_kind[fence.MODERATED]:
                moderated = (events.kind == fence.MODERATED) & (applied.codes == fence.APPLIED)
                self.streams.apply_moderation(applied.slots[moderated], record.applied_ms)
            self._touched.append(applied.touched)
            self._publish_ends(applied.ends)
            self._recorder.applied(applied)
            if applied.by_kind[fence.IMPRESSION]:
                self._saw(events, applied)
            if committed.submission is not None:
                outcomes.append((committed.submission, PublishResult(record.offset, applied.codes)))
        self._commit.applied(1)
        now_ms = self.clock.now_ms()
        for submission, result in outcomes:
            self._recorder.acknowledged(submission, result.codes, now_ms)
            submission.done.set_result(result)

    def _apply_record(self, record: Record, batch: DecodedBatch) -> Applied:
        applied = self.table.apply(batch.events, record.applied_ms)
        self.applied_offset, self.applied_stamp_ms = record.offset, record.applied_ms
        self._applied_payload = record.payload
        self.table_ms = max(self.table_ms, record.applied_ms)
        return applied

    def _skip_record(self, record: Record) -> None:
        """Nobody can decode it: it counts as applied, and its stamp as nothing."""
        self.applied_offset, self._applied_payload = record.offset, record.payload

    def _publish_ends(self, ends: list[End]) -> None:
        if ends:
            now_ms = self.clock.now_ms()
            self._end_times.remember(ends, now_ms, now_ms)
            self.ends.publish(ends)
            self._recorder.ended(ends)

    # --- time ---------------------------------------------------------------------------------

    def _tick(self) -> None:
        """Expires leases, refreshes rules of changed rows, sweeps on, takes a snapshot."""
        assert self._commit is not None
        started = time.perf_counter()
        settled_ms = self._commit.settled_ms()
        try:
            expired = self.table.expire(settled_ms)
        except Exception as error:
            raise _TableFault("while leases were expired") from error
        self.table_ms = max(self.table_ms, settled_ms)
        self._publish_ends(expired.ends)
        # Leases wait for the log; features, rules and views do not: they are no part of its state.
        now_ms = max(settled_ms, self.clock.now_ms())
        if self._touched:
            self.streams.assess(np.unique(np.concatenate(self._touched)), now_ms)
            self._touched.clear()
        self._refresh_scores(now_ms)
        self._view_ticks += 1
        if self._view_ticks >= round(1 / self.admission.quality):  # building views is what every tick costs anew
            self.take_snapshot(now_ms)
        self._recorder.ticked(self.table, self.streams, expired, self._queue.rows, time.perf_counter() - started)
        self._recorder.admitted(self.admission.quality, self.admission.limit)
        state = self.reply_state()
        self._recorder.disclosed(state.level, state.score_age_ms, state.applied_offset)
        self._recorder.clock_stepped(self.clock.stepped_ms())

    def _saw(self, events: EventColumns, applied: Applied) -> None:
        """Counts what clients saw, and which of it was dead, for the server and for the version on trial."""
        rows = events.impressions[applied.codes[events.impressions] == fence.APPLIED]
        dead = self._end_times.causes(events, applied, self.table.columns)
        self._recorder.impressions(len(rows), list(dead.values()))
        viewers = events.viewer_hash
        self.candidate.saw(viewers[rows], viewers[np.array(list(dead), np.int64)], list(dead.values()))

    def set_rules(self, book: RuleBook) -> None:
        """Takes other rules over, for all rows at once: no reply mixes the two."""
        assert self._commit is not None
        now_ms = max(self._commit.settled_ms(), self.clock.now_ms())
        self.streams.set_book(book)
        self.streams.assess(np.arange(self.table.rows, dtype=np.int32), now_ms)
        self.take_snapshot(now_ms)
        self.on_rules()

    def take_snapshot(self, now_ms: int) -> None:
        """Begins a new view of the table: every tick, but less often while quality is low."""
        self._view_ticks = 0
        before = self.pipeline.snapshot
        self.pipeline.snapshot = Snapshot(self.table, self.streams, before.settings, now_ms, before.trend_order)

    def _refresh_scores(self, now_ms: int) -> None:
        """Sweeps the table, a chunk per tick; then sends all features to the model."""
        assert self._refresher is not None
        if self._sweep.finished:
            if now_ms < self._next_refresh_ms:
                return
            self._next_refresh_ms = now_ms + self.settings.scoring.refresh_ms
            self._sweep = Sweep.begin(self.table, self.features)
        self._sweep.step(self.streams, now_ms, self.admission.quality)
        if self._sweep.finished:
            # Not taken while the last job still runs: the next sweep brings newer rows anyway.
            self._refresher.submit(self._sweep.job(self.table, now_ms))
            self._recorder.features(self._sweep.states, self.features)

    def refresh_now(self) -> None:
        """One whole refresh in the calling (engine) thread: for replay, where time is the file's.

        It stands for the one that is due: the next comes by itself after the usual time, and not just behind it.
        """
        assert self._refresher is not None and self._commit is not None
        now_ms = self._commit.settled_ms()
        sweep = Sweep.begin(self.table, self.features)
        while not sweep.finished:
            sweep.step(self.streams, now_ms)
        self._sweep, self._next_refresh_ms = sweep, now_ms + self.settings.scoring.refresh_ms
        with self._refresher.paused():
            with self._wake:
                self._results.clear()  # older than what follows
            self._take_scores(self._refresher.run_once(sweep.job(self.table, now_ms)))
        self._tick()

    def _take_scores(self, result: RefreshResult) -> None:
        """Writes new scores to the rows that still hold the session that was scored."""
        if result.turn != self._turn:
            return  # of a model that was replaced meanwhile
        if result.model_version != self.scores.model_version:
            self._settle()
            if result.scores is not None:
                self.streams.forget_trend()  # a row that got no new score must not keep the other version's
        self.scores = result
        self.first_scores.set()
        self._recorder.scored(result)
        if result.scores is None or result.order is None:
            return
        slots = result.slots
        same = (self.streams.session[slots] == result.sessions) & np.isfinite(result.scores)
        self.streams.set_trend(slots[same], result.scores[same])
        self.pipeline.snapshot.trend_order = result.order
        self.pipeline.snapshot.views.clear()

    def replace_scores(self, result: RefreshResult, turn: int) -> None:
        """Ranks everybody by these scores from the next batch on, in one step; engine thread.

        Args:
            turn: of the scorer that made them (`Refresher.use`); results of others that are on their way are dropped.
        """
        self._settle()
        self.candidate.begin("")
        self._turn = turn
        self._take_scores(replace(result, turn=turn))

    def try_candidate(self, version: str) -> None:
        """Begins with a version on trial, "" ends it; engine thread."""
        self._settle()
        self.candidate.begin(version)

    @contextmanager
    def ranked_for(self, query: RankQuery) -> Iterator[None]:
        """Inside, the host's pipeline ranks by the version that this viewer is ranked by; engine thread."""
        if self.candidate.split([query]) is None:
            yield
        else:
            with self.candidate.ranking():
                yield

    # --- ranking ------------------------------------------------------------------------------

    def _budget_s(self) -> float:
        """Time that ranking a batch takes."""
        return max(self._batch_s, self.settings.rank.min_budget_ms / 1000)

    def _answer(self, turn: Turn[RankQuery]) -> None:
        """Answers what was taken. Where the pipeline overlaps, a batch is finished after the next was started."""
        if turn.abandoned_rows:
            self._recorder.abandoned(turn.abandoned_rows)
        for item in turn.unreached:
            problem = f"min_offset: {item.min_offset} wanted, {self.applied_offset} applied"
            item.done.set_exception(OffsetNotReached(problem))
        before, self._on_its_way = self._on_its_way, self._start(turn.rank)
        if before is not None:
            self._finish(before)
        if self._on_its_way is not None and not (
            (self.pipeline.overlaps and self._queue.rows) or (self._on_its_way.wait_s() and not self._stopping)
        ):
            last, self._on_its_way = self._on_its_way, None
            self._finish(last)
        if turn.late:
            with self._guarded(turn.late):
                batch, began_s = self._batch_of(_queries_of(turn.late)), time.monotonic()
                replies = self._encoded(self.pipeline.popular(batch), self.reply_state(popular=True), began_s)
                self._hand_out(turn.late, replies, began_s)

    def _start(self, items: list[Waiting[RankQuery]]) -> _OnItsWay | None:
        if not items:
            return None
        with self._guarded(items):
            queries, quality = _queries_of(items), self.admission.quality
            split = self.candidate.split(queries)
            usual = queries if split is None else [q for q, theirs in zip(queries, split, strict=True) if not theirs]
            began_s = time.monotonic()
            started = self.pipeline.start(self._batch_of(usual), quality) if usual else None
            return _OnItsWay(items, started, began_s, quality, split)
        return None

    def _settle(self) -> None:
        """Answers what was started: with other scores than it began with, it would tell the wrong version."""
        before, self._on_its_way = self._on_its_way, None
        if before is not None:
            self._finish(before)

    def _finish(self, on_its_way: _OnItsWay) -> None:
        items, began_s = on_its_way.items, on_its_way.began_s
        with self._guarded(items):
            replies: list[bytes] = []
            if on_its_way.started is not None:
                slates = self.pipeline.finish(on_its_way.started)
                state = self.reply_state(quality=on_its_way.quality, by=slates.ranked_by)
                replies = self._encoded(slates, state, began_s)
            if on_its_way.by_candidate is not None:
                replies = self._with_candidate(on_its_way, on_its_way.by_candidate, replies)
            self._hand_out(items, replies, began_s)
            self.admission.answered(items, began_s)
        # Half-life of about 5 batches: follows load, ignores one slow batch.
        self._batch_s += 0.13 * (min(time.monotonic() - began_s, 0.1) - self._batch_s)

    def _with_candidate(
        self, on_its_way: _OnItsWay, by_candidate: NDArray[np.bool_], usual: list[bytes]
    ) -> list[bytes]:
        """All replies in order: ``usual``, and between them those of the viewers ranked by the candidate.

        A fault in its ranking costs nobody a reply: the version in use answers, and the fault is held against it.
        """
        queries = _queries_of(on_its_way.items)
        batch = self._batch_of([q for q, mine in zip(queries, by_candidate, strict=True) if mine])
        began_s = on_its_way.began_s
        try:
            with self.candidate.ranking():
                slates = Pipeline.rank(self.pipeline, batch, on_its_way.quality)
            usual_state = self.reply_state(quality=on_its_way.quality, by=slates.ranked_by)
            state = self.candidate.reply_state(usual_state, self.clock.now_ms())
        except Exception:
            logger.exception("unexpected fault while ranking by %s", self.candidate.version)
            self._recorder.fault("candidate")
            self.candidate.faults += 1
            slates = self.pipeline.rank(batch, on_its_way.quality)
            state = self.reply_state(quality=on_its_way.quality, by=slates.ranked_by)
        else:
            self.candidate.served += len(batch)
            self._recorder.ranked_by_candidate(len(batch))
            if self.pipeline.overlaps:
                self._recorder.ranked_on_host("canary", len(batch))
        ours, theirs = iter(usual), iter(self._encoded(slates, state, began_s))
        return [next(theirs if mine else ours) for mine in by_candidate]

    def _batch_of(self, queries: list[RankQuery]) -> QueryBatch:
        return build_batch(queries, self.table, self.streams.book, self.clock.now_ms())

    def _encoded(self, slates: SlateBatch, state: ReplyState, began_s: float) -> list[bytes]:
        """The replies, counted."""
        replies = self._encode(slates, state, self.table, began_s)
        shown = slates.slots[slates.slots >= 0]
        np.add.at(self.streams.exposures, shown, 1)
        self._recorder.ranked(slates, state.level.name.lower(), began_s)
        if self.on_served is not None:
            self._served.append((slates, state))
        return replies

    def _hand_out(self, items: list[Waiting[RankQuery]], replies: list[bytes], began_s: float) -> None:
        self._recorder.waited(items, began_s)
        hand_out(items, replies)
        served, self._served = self._served, []
        for slates, state in served:  # after the callers were answered: it reads features
            assert self.on_served is not None
            self.on_served(slates, state)

    @contextmanager
    def _guarded(self, items: list[Waiting[RankQuery]]) -> Iterator[None]:
        """A fault is the answer to these calls, and to no other."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, LiverankError):
                logger.exception("unexpected fault while ranking")
                self._recorder.fault("rank")
            for item in items:
                if not item.done.done():
                    item.done.set_exception(error)

    def reply_state(self, popular: bool = False, quality: float = 1.0, by: RankedBy | None = None) -> ReplyState:
        """What replies disclose now. ``by``: the ranker's part of a batch."""
        scores = self.scores
        age_ms = max(0, self.clock.now_ms() - scores.as_of_ms)
        if popular:
            reasons = ("deadline: no time left to rank", *scores.reasons)
            return ReplyState(self.applied_offset, "popular", Level.POPULAR, reasons, 0)
        version, level, reasons = scores.model_version or "formula", scores.level, scores.reasons
        if by is not None and by.problem:
            level, reasons = max(level, Level.LAST_GOOD), (*reasons, f"ranker: {by.problem}")
        elif by is not None:
            version = f"{version}+{by.version}"
        return ReplyState(self.applied_offset, version, level, reasons, age_ms, quality)


def _nothing() -> None: ...


def _queries_of(items: list[Waiting[RankQuery]]) -> list[RankQuery]:
    return [query for item in items for query in item.rows]


def _waiting_for(groups: Iterable[list[Committed]]) -> list[Answer]:
    return [c.submission.done for group in groups for c in group if c.submission is not None]


def _resolve(done: Future[object], function: Callable[[], object]) -> None:
    if not done.set_running_or_notify_cancel():
        return
    try:
        done.set_result(function())
    except Exception as error:  # noqa: BLE001 - handed to the caller, who maps it to a status
        done.set_exception(error)
