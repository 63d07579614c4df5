"""Ranking: Rank, RankBatch, Explain. Decodes, queues for the engine; its thread sends the bytes it has made."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, TimeoutError
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import grpc
from liverank.v1 import ranking_pb2 as pb

from kernels.wire import frame_messages
from server.admission.gate import Admission
from server.batching.base import Answer, Priority, Waiting
from server.config import Settings
from server.errors import InvalidRequest, LiverankError, NotFound
from server.ranking.replies import Replies
from server.recorder import Recorder
from server.retrieval.query import RankQuery
from server.rpc.decode import check_stream_id, decode_rank
from server.rpc.direct import Call, DirectMethod, Refusal
from server.rpc.outbox import Outbox
from server.rpc.status import CallerGone, verdict
from server.rpc.turnstile import Handler, Turnstile
from server.security.access import Identity
from server.security.gate import Gate

if TYPE_CHECKING:
    from server.engine import Engine
    from server.ranking.explain import Explanation
    from server.viewers.embeddings import ViewerEmbeddings

DEFAULT_DEADLINE_S = 30.0
MAX_BATCH_VIEWERS = 4_096
LEAST_STREAM_BYTES = 40
"""A ranked stream of a reply takes more, even with an id of one byte."""
BATCH_THREADS, LOOKUP_THREADS = 8, 64
_GONE = Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, "the caller stopped waiting")


_SERVICE = "/" + pb.DESCRIPTOR.services_by_name["Ranking"].full_name

A = TypeVar("A", bound=Answer)


class RankPort(Protocol):
    """What ranks: the engine, or the way to it from another process.

    surfaces: names that a request may give; None: checked further on.
    """

    settings: Settings
    admission: Admission

    @property
    def surfaces(self) -> Collection[str] | None: ...

    def rank(
        self, queries: list[RankQuery], client: str, priority: Priority, arrived_s: float, answer: Callable[[], A]
    ) -> list[A]:
        """See `server.engine.Engine.rank`."""

    def put(self, calls: Sequence[Waiting[RankQuery]]) -> int:
        """See `server.engine.Engine.put`."""

    @property
    def queued_rows(self) -> int:
        """Viewers that wait to be ranked."""


class RankingService:
    """Nothing waits here: what is queued knows which call it answers.

    Args:
        engine: answers Explain, too; None: somebody else does.
        embeddings: of viewers who bring none. Whoever waits for them must do so in a thread, so all calls get one.
    """

    def __init__(
        self,
        port: RankPort,
        gate: Gate,
        recorder: Recorder,
        engine: Engine | None,
        embeddings: ViewerEmbeddings | None = None,
    ) -> None:
        self._port, self._gate, self._recorder, self._engine = port, gate, recorder, engine
        self._embeddings = embeddings
        self.outbox = Outbox(self._put)
        """Calls of Rank that the polling thread has read and the engine has not yet."""
        # Thousands of viewers take tens of milliseconds to decode, and Explain waits for the engine.
        self._pool = ThreadPoolExecutor(BATCH_THREADS, thread_name_prefix="rank-batch")
        self._lookups = None if embeddings is None else ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix="rank")

    def methods(self) -> dict[str, DirectMethod]:
        """The methods of the service, by full name."""
        turnstile = Turnstile(self._port.admission, self._gate, self._recorder)
        found = {}

        def add(name: str, parse: Callable[[bytes], Any], handler: Handler, pool: ThreadPoolExecutor | None) -> None:
            found[f"{_SERVICE}/{name}"] = turnstile.method(f"{_SERVICE}/{name}", parse, handler, pool)

        add("Rank", pb.RankRequest.FromString, self._rank, self._lookups)
        add("RankBatch", pb.RankBatchRequest.FromString, self._rank_batch, self._pool)
        if self._engine is not None:
            add("Explain", pb.ExplainRequest.FromString, partial(self._explain, self._engine), self._pool)
        return found

    def close(self) -> None:
        """Lets the threads end."""
        self._pool.shutdown(wait=False)
        if self._lookups is not None:
            self._lookups.shutdown(wait=False)

    def _rank(self, request: pb.RankRequest, call: Call, priority: Priority, _: Identity) -> None:
        port = self._port
        query = decode_rank(request, port.settings, port.surfaces, _deadline_s(call))
        answer = RankAnswer(call, self._recorder)
        rows = self._with_embeddings([query])
        waiting = Waiting(rows, call.peer(), priority, call.arrived_s, query.deadline_s, query.min_offset, answer)
        if self._lookups is None:
            self.outbox.add(waiting)
        else:  # on a thread of its own
            self._put([waiting])
        call.on_gone = answer.cancel
        if call.ended:  # it left in between
            answer.cancel()

    def _put(self, calls: list[Waiting[RankQuery]]) -> None:
        """Queues calls of Rank; those that find no room are refused."""
        try:
            taken = self._port.put(calls)
        except LiverankError as error:
            for call in calls:
                call.done.set_exception(error)
            return
        for call in calls[taken:]:
            call.done.set_exception(self._port.admission.full(self._port.queued_rows, call.priority))

    def _rank_batch(self, request: pb.RankBatchRequest, call: Call, priority: Priority, identity: Identity) -> None:
        requests = request.requests
        if len(requests) > 1:
            self._gate.charge_more(identity, len(requests) - 1)
        if len(requests) > MAX_BATCH_VIEWERS:
            raise InvalidRequest("requests", f"at most {MAX_BATCH_VIEWERS} allowed, got {len(requests)}")
        if not requests:
            call.reply(b"")
            return
        deadline_s, surfaces = _deadline_s(call), self._port.surfaces
        queries = [
            decode_rank(one, self._port.settings, surfaces, deadline_s, f"requests[{i}].")
            for i, one in enumerate(requests)
        ]
        self._check_size([query.limit for query in queries])
        queries = self._with_embeddings(queries)
        parts: list[Future[Sequence[bytes]]] = self._port.rank(queries, call.peer(), priority, call.arrived_s, Future)
        call.on_gone = lambda: _cancel(parts)
        if call.ended:  # it left in between
            _cancel(parts)
        _answer_when_done(parts, call, self._recorder)

    def _with_embeddings(self, queries: list[RankQuery]) -> list[RankQuery]:
        """The same, with embeddings looked up for viewers who brought none."""
        if self._embeddings is None:
            return queries
        wanted = [i for i, query in enumerate(queries) if query.embedding is None and query.viewer_id]
        if not wanted:
            return queries
        found = self._embeddings.find([queries[i].viewer_id for i in wanted], queries[0].deadline_s)
        for i, answer in zip(wanted, found, strict=True):
            queries[i] = replace(queries[i], embedding=answer.embedding, embedding_problem=answer.problem)
        return queries

    def _check_size(self, limits: list[int]) -> None:
        """Refuses before the work what certainly could not be sent after it."""
        most = self._port.settings.serve.max_message_bytes // LEAST_STREAM_BYTES
        if sum(limits) > most:
            raise InvalidRequest(
                "requests", f"limits of {sum(limits)} streams in all; at most {most} fit a reply of max_message_bytes"
            )

    def _explain(self, engine: Engine, request: pb.ExplainRequest, call: Call, _: Priority, __: Identity) -> None:
        from server.ranking.explain import explain  # not in an edge, where it would load the whole table's code

        deadline_s = _deadline_s(call)
        check_stream_id("stream_id", request.stream_id)
        asked = decode_rank(request.request, engine.settings, engine.surfaces, deadline_s, "request.")
        (query,) = self._with_embeddings([asked])

        def ask() -> Explanation | None:
            age_ms = engine.answerer.reply_state().score_age_ms
            parts = (engine.table, engine.streams, engine.features, engine.pipeline)
            with engine.answerer.ranked_for(query):
                return explain(*parts, query, request.stream_id, age_ms)

        found = _await(engine.call(ask), deadline_s)
        if found is None:
            raise NotFound(f"stream_id: {request.stream_id!r} was never started here, or is forgotten")
        call.reply(_explanation(request.stream_id, found).SerializeToString())


class RankAnswer:
    """Where the engine leaves the reply to one call of Rank (`server.batching.base.Answer`): on the wire."""

    __slots__ = ("_call", "_lock", "_recorder", "_running", "_stopped", "_told")

    def __init__(self, call: Call, recorder: Recorder) -> None:
        self._call, self._recorder = call, recorder
        self._lock = threading.Lock()
        self._running = self._stopped = False
        self._told: Callable[[RankAnswer], object] | None = None

    def add_done_callback(self, tell: Callable[[RankAnswer], object]) -> None:
        """Told once when it is cancelled; whoever answers it knows."""
        self._told = tell
        if self._stopped:
            tell(self)

    def set_running_or_notify_cancel(self) -> bool:
        with self._lock:
            self._running = not self._stopped
            return self._running

    def cancel(self) -> bool:
        """Its deadline passed, or its caller is gone."""
        with self._lock:
            if self._running or self._stopped:
                return False
            self._stopped = True
        self._call.refuse(_GONE)  # nobody may be there to hear it
        self._recorder.refused("Rank", _GONE.code.name)
        if self._told is not None:
            self._told(self)
        return True

    def cancelled(self) -> bool:
        return self._stopped

    def done(self) -> bool:
        return self._call.ended

    def set_result(self, replies: Sequence[bytes], /) -> None:
        self._call.reply(replies[0])

    def set_exception(self, error: BaseException, /) -> None:
        if not isinstance(error, Exception):
            raise error
        self._call.refuse(verdict(self._recorder, "Rank", error))


def _answer_when_done(parts: list[Future[Sequence[bytes]]], call: Call, recorder: Recorder) -> None:
    """Replies once all parts are there, in order; when one fails, the others are not worked on any more."""
    waiting, lock = len(parts), threading.Lock()

    def finished(part: Future[Sequence[bytes]]) -> None:
        nonlocal waiting
        error = CallerGone() if part.cancelled() else part.exception()
        if isinstance(error, Exception):
            with lock:
                first, waiting = waiting > 0, 0
            if first:
                _cancel(parts)
                call.refuse(verdict(recorder, "RankBatch", error))
            return
        with lock:
            waiting -= 1
            last = waiting == 0
        if last:
            call.reply(frame_messages(chain.from_iterable(_in_parts(one.result()) for one in parts)))

    for part in parts:
        part.add_done_callback(finished)


def _in_parts(replies: Sequence[bytes]) -> Iterator[Sequence[bytes | memoryview]]:
    """Replies as `frame_messages` takes them; those of a whole batch are not joined before."""
    if isinstance(replies, Replies):
        return map(replies.parts, range(len(replies)))
    return ((reply,) for reply in replies)


def _cancel(parts: list[Future[Sequence[bytes]]]) -> None:
    for part in parts:
        part.cancel()


def _explanation(stream_id: str, found: Explanation) -> pb.ExplainResponse:
    return pb.ExplainResponse(
        stream_id=stream_id,
        epoch=found.epoch,
        state=found.state,
        lease_expires_ms=found.lease_expires_ms,
        sources=found.sources,
        features=[
            pb.FeatureValue(name=name, value=float(value), state=int(state))  # type: ignore[arg-type]
            for name, value, state in zip(
                found.feature_names, found.features.values[0], found.features.states[0], strict=True
            )
        ],
        scores=[pb.ScoreValue(name=n, value=v, age_ms=age_ms) for n, (v, age_ms) in found.scores.items()],
        rules=[pb.RuleVerdict(rule=r.rule, excluded=r.excluded, boost=r.boost) for r in found.rules],
        position_before_slate=found.position_before_slate,
        position_in_slate=found.position_in_slate,
        not_shown_reason=found.not_shown_reason,
        as_of_ms=found.as_of_ms,
    )


def _deadline_s(call: Call) -> float:
    return time.monotonic() + min(call.time_remaining(), DEFAULT_DEADLINE_S)


def _await(done: Future[Any], deadline_s: float) -> Any:
    """The future's result; cancels it when the caller's time is up, so that no work is done for nobody."""
    try:
        return done.result(timeout=max(0.0, deadline_s - time.monotonic()))
    except TimeoutError as error:
        done.cancel()
        raise CallerGone from error
    except CancelledError as error:
        raise CallerGone from error
