"""Ranking: Rank, RankBatch, Explain."""

from __future__ import annotations

import time
from concurrent.futures import CancelledError, Future, TimeoutError
from typing import Any

import grpc
from liverank.v1 import ranking_pb2 as pb
from liverank.v1 import ranking_pb2_grpc as pb_grpc

from kernels.wire import frame_messages
from server.batching.base import Priority
from server.engine import Engine
from server.errors import InvalidRequest, NotFound
from server.ranking.explain import Explanation, explain
from server.recorder import Recorder
from server.rpc.admission import arrival
from server.rpc.decode import check_stream_id, decode_rank
from server.rpc.status import CallerGone, guarded

DEFAULT_DEADLINE_S = 30.0
MAX_BATCH_VIEWERS = 4_096
LEAST_STREAM_BYTES = 40
"""A ranked stream of a reply takes more, even with an id of one byte."""


class RankingService(pb_grpc.RankingServicer):
    """Decodes, queues for the engine, and returns the bytes it gets back."""

    def __init__(self, engine: Engine, recorder: Recorder) -> None:
        self._engine, self.recorder = engine, recorder

    @guarded
    def Rank(self, request: pb.RankRequest, context: grpc.ServicerContext) -> bytes:
        deadline_s, came, client = _deadline_s(context), arrival(), context.peer()
        with self._engine.admission.place(client, came.priority):
            query = decode_rank(request, self._engine.settings, self._engine.streams.book.surfaces, deadline_s)
            waiting = self._engine.rank([query], client, came.priority, came.arrived_s)
            return _await_all(waiting, deadline_s)[0]

    @guarded
    def RankBatch(self, request: pb.RankBatchRequest, context: grpc.ServicerContext) -> bytes:
        deadline_s = _deadline_s(context)
        if len(request.requests) > MAX_BATCH_VIEWERS:
            raise InvalidRequest("requests", f"at most {MAX_BATCH_VIEWERS} allowed, got {len(request.requests)}")
        if not request.requests:
            return b""
        surfaces = self._engine.streams.book.surfaces
        queries = [
            decode_rank(one, self._engine.settings, surfaces, deadline_s, f"requests[{i}].")
            for i, one in enumerate(request.requests)
        ]
        self._check_size([query.limit for query in queries])
        waiting = self._engine.rank(queries, context.peer(), Priority.BATCH, arrival().arrived_s)
        return frame_messages(_await_all(waiting, deadline_s))

    def _check_size(self, limits: list[int]) -> None:
        """Refuses before the work what certainly could not be sent after it."""
        most = self._engine.settings.serve.max_message_bytes // LEAST_STREAM_BYTES
        if sum(limits) > most:
            raise InvalidRequest(
                "requests", f"limits of {sum(limits)} streams in all; at most {most} fit a reply of max_message_bytes"
            )

    @guarded
    def Explain(self, request: pb.ExplainRequest, context: grpc.ServicerContext) -> pb.ExplainResponse:
        deadline_s = _deadline_s(context)
        check_stream_id("stream_id", request.stream_id)
        surfaces = self._engine.streams.book.surfaces
        query = decode_rank(request.request, self._engine.settings, surfaces, deadline_s, "request.")
        engine = self._engine

        def ask() -> Explanation | None:
            age_ms = engine.reply_state().score_age_ms
            parts = (engine.table, engine.streams, engine.features, engine.pipeline)
            with engine.ranked_for(query):
                return explain(*parts, query, request.stream_id, age_ms)

        found = _await(engine.call(ask), deadline_s)
        if found is None:
            raise NotFound(f"stream_id: {request.stream_id!r} was never started here, or is forgotten")
        return _explanation(request.stream_id, found)


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


def _deadline_s(context: grpc.ServicerContext) -> float:
    left_s = context.time_remaining()
    return time.monotonic() + (DEFAULT_DEADLINE_S if left_s is None else min(left_s, DEFAULT_DEADLINE_S))


def _await_all(parts: list[Future[list[bytes]]], deadline_s: float) -> list[bytes]:
    """All replies in order; when one part fails, the others are not worked on any more."""
    try:
        return [reply for part in parts for reply in _await(part, deadline_s)]
    except BaseException:
        for part in parts:
            part.cancel()
        raise


def _await(done: Future[Any], deadline_s: float) -> Any:
    """The future's result; cancels it when the caller's time is up, so that no work is done for nobody."""
    try:
        return done.result(timeout=max(0.0, deadline_s - time.monotonic()))
    except TimeoutError as error:
        done.cancel()
        raise CallerGone from error
    except CancelledError as error:
        raise CallerGone from error
