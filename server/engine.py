"""The engine: one thread that owns the table. Events, ranking, ticks and control are serialised on it.

log writer ──committed──▶ ┐                        ┌─▶ acknowledgements   (applier.py)
Rank calls ──queries────▶ ├─▶ apply · rank · tick ─┼─▶ encoded replies    (answerer.py)
score refresh ──scores──▶ ┘                        └─▶ ends, metrics
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import TypeVar

import numpy as np

from server.admission.gate import Admission
from server.alarm import Alarm
from server.answerer import Answerer, Encoder
from server.applier import Applier, TableFault
from server.batching.base import Answer, Priority, Waiting
from server.batching.queue import RankQueue
from server.clock import Clock
from server.config import Settings
from server.errors import Draining, LiverankError
from server.live.ends import EndFeed
from server.live.features import FeatureSet
from server.live.table import LiveTable
from server.log.commit import CommitPath, Committed
from server.ranking.candidate import Candidate
from server.ranking.pipeline import Pipeline
from server.recorder import Recorder
from server.retrieval.query import RankQuery
from server.retrieval.streams import StreamState
from server.retrieval.view import Snapshot
from server.rules.rulebook import RuleBook, Surface
from server.scoring.refresh import Refresher, RefreshResult
from server.sweep import Sweeps

logger = logging.getLogger(__name__)
T = TypeVar("T")
A = TypeVar("A", bound=Answer)


class Engine:
    """Runs the loop. Everything it is given is used by its thread alone, unless documented otherwise.

    applier: what the log does to the table, and how far it is. answerer: what becomes of Rank calls.

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
        serve = settings.serve
        self.settings, self.clock, self.table = settings, clock, table
        self.features, self.streams, self.pipeline, self.ends = features, streams, pipeline, ends
        self.admission, self._recorder, self._on_fault = admission, recorder, on_fault
        self.on_rules: Callable[[], None] = _nothing
        """Told, on the engine thread, that there are other rules, and maybe other surfaces."""
        candidate = Candidate(streams, pipeline)
        self._queue: RankQueue[RankQuery] = RankQueue(serve.max_batch_rows, serve.batch_window_us / 1e6)
        self.applier = Applier(clock, table, streams, ends, candidate, recorder, serve.watch_buffer)
        self.answerer = Answerer(
            clock, table, streams, pipeline, candidate, self.applier, self._queue, admission, encode, recorder,
            settings.rank.min_budget_ms / 1000,
        )  # fmt: skip
        self._sweeps = Sweeps(table, features, streams, settings.scoring.refresh_ms)
        self._commit: CommitPath | None = None
        self._refresher: Refresher | None = None
        self._wake = Alarm()
        self.gather: Callable[[], None] = _nothing
        """Called on the engine thread whenever it looks for work: may `put` calls that wait elsewhere."""
        self._committed: deque[list[Committed]] = deque()
        self._results: deque[RefreshResult] = deque()
        self._calls: deque[tuple[Callable[[], object], Future[object]]] = deque()
        self._in_hand: list[Answer] = []  # taken from the queues in this turn of the loop
        self._next_tick_s = 0.0
        self._view_ticks = 0  # that the present view is old
        self._started = self._stopping = self._failed = False
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

        One answer per part of at most ``max_batch_rows`` viewers, fewer where the pipeline is slow: between the parts
        of a large call the engine applies events and ticks. All or nothing is queued.

        Args:
            arrived_s: when the call came, monotonic; None: now.
            answer: makes what the engine thread resolves.

        Raises:
            Overloaded: too many viewers wait already. Draining: the engine has not started, or stops.
        """
        step = self.pipeline.most_rows(self.settings.serve.max_batch_rows)
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
            self._queue.put(parts, self.applier.offset)
            self._wake.notify()
        return answers

    def put(self, calls: Sequence[Waiting[RankQuery]]) -> int:
        """Queues calls of one viewer each, as `rank` does; returns how many there was room for, the first ones.

        Raises:
            Draining: the engine has not started, or stops.
        """
        with self._wake:
            self._check_open()
            room = max(0, self.settings.serve.max_queue_rows - self._queue.rows)
            self._queue.put(calls[:room], self.applier.offset)
            self._wake.notify()
        return min(room, len(calls))

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Runs ``function`` on the engine thread, between batches."""
        done: Future[T] = Future()
        with self._wake:
            self._check_open()
            self._calls.append((function, done))  # type: ignore[arg-type]
            self._wake.notify()
        return done

    def watch(self, descriptor: int) -> None:
        """From now on the engine `gather`s as soon as there is something to read from it. Raises ValueError."""
        self._wake.watch(descriptor)

    def forget(self, descriptor: int) -> None:
        """Before a descriptor that is watched is closed."""
        self._wake.forget(descriptor)

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
        on_its_way = self.answerer.on_its_way
        with self._wake:
            self._stopping = self._failed = True
            futures = self._in_hand + [w.done for w in self._queue.waiting()]
            futures += [w.done for w in on_its_way.items] if on_its_way is not None else []
            futures += [done for _, done in self._calls]
            futures += _waiting_for(self._committed)
        for future in futures:
            with contextlib.suppress(InvalidStateError):  # answered, or its caller just went away
                future.set_exception(error)

    def _loop(self) -> None:
        assert self._commit is not None
        answerer = self.answerer
        while True:
            with self._wake:
                self.gather()
                while (idle_s := self._idle_s()) > 0:
                    self._wake.wait(idle_s)
                    self.gather()
                groups, self._committed = list(self._committed), deque()
                results, self._results = list(self._results), deque()
                calls, self._calls = list(self._calls), deque()
                self._in_hand = _waiting_for(groups)
                self._in_hand += [done for _, done in calls]
                on_its_way = answerer.on_its_way
                finished = self._stopping and not (groups or results or calls or self._queue.rows or on_its_way)
            if finished:
                return
            for group in groups:
                self.applier.apply(group, self._commit)
            for result in results:
                answerer.take_scores(result)
            if time.monotonic() >= self._next_tick_s:
                self._guard(self._tick, "tick")
                self._next_tick_s = time.monotonic() + self.settings.rank.tick_ms / 1000
            for function, done in calls:
                _resolve(done, function)
            if answerer.on_its_way is not None and answerer.on_its_way.wait_s() > 0 and not self._stopping:
                continue  # a model works on it: events and ticks meanwhile, rather than waiting for it
            with self._wake:  # last, so that it sees the offsets applied above
                most_rows = self.pipeline.most_rows(self.settings.serve.max_batch_rows)
                turn = self._queue.take(self.applier.offset, answerer.budget_s(), self._stopping, most_rows)
                self._in_hand += [item.done for item in turn.taken()]
            answerer.answer(turn, closing=self._stopping)

    def _idle_s(self) -> float:
        """Seconds until there is something to do, unless something comes."""
        if self._committed or self._calls or self._results or self._stopping:
            return 0.0
        to_tick_s, on_its_way = self._next_tick_s - time.monotonic(), self.answerer.on_its_way
        if on_its_way is not None:  # the next turn is taken when this batch can be finished
            return min(to_tick_s, on_its_way.wait_s())
        to_turn_s = self._queue.due_in_s()
        return to_tick_s if to_turn_s is None else min(to_tick_s, to_turn_s)

    def _guard(self, step: Callable[[], None], name: str) -> None:
        """An unexpected fault in a periodic step is logged and counted; the engine must go on answering.

        Unless it was in the table: one that may be half-changed serves nobody.
        """
        try:
            step()
        except TableFault:
            raise
        except Exception:
            logger.exception("unexpected fault in %s", name)
            self._recorder.fault(name)

    # --- time ---------------------------------------------------------------------------------

    def _tick(self) -> None:
        """Expires leases, refreshes rules of changed rows, sweeps on, takes a snapshot."""
        assert self._commit is not None and self._refresher is not None
        started = time.perf_counter()
        settled_ms = self._commit.settled_ms()
        expired = self.applier.expire(settled_ms)
        # Leases wait for the log; features, rules and views do not: they are no part of its state.
        now_ms = max(settled_ms, self.clock.now_ms())
        self.applier.assess_touched(now_ms)
        job = self._sweeps.step(now_ms, self.admission.quality)
        if job is not None:
            # Not taken while the last job still runs: the next sweep brings newer rows anyway.
            self._refresher.submit(job)
            self._recorder.features(self._sweeps.states, self.features)
        self._view_ticks += 1
        if self._view_ticks >= round(1 / self.admission.quality):  # building views is what every tick costs anew
            self.take_snapshot(now_ms)
        self._recorder.ticked(self.table, self.streams, expired, self._queue.rows, time.perf_counter() - started)
        self._recorder.admitted(self.admission.quality, self.admission.limit)
        state = self.answerer.reply_state()
        self._recorder.disclosed(state.level, state.score_age_ms, state.applied_offset)
        self._recorder.clock_stepped(self.clock.stepped_ms())

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

    def refresh_now(self) -> None:
        """One whole refresh in the calling (engine) thread: for replay, where time is the file's."""
        assert self._refresher is not None and self._commit is not None
        job = self._sweeps.whole(self._commit.settled_ms())
        with self._refresher.paused():
            with self._wake:
                self._results.clear()  # older than what follows
            self.answerer.take_scores(self._refresher.run_once(job))
        self._tick()


def _nothing() -> None: ...


def _waiting_for(groups: Iterable[list[Committed]]) -> list[Answer]:
    return [c.submission.done for group in groups for c in group if c.submission is not None]


def _resolve(done: Future[object], function: Callable[[], object]) -> None:
    if not done.set_running_or_notify_cancel():
        return
    try:
        done.set_result(function())
    except Exception as error:  # noqa: BLE001 - handed to the caller, who maps it to a status
        done.set_exception(error)
