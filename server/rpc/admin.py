"""Admin: status, blocks, rules; models are in `models.py`."""

from __future__ import annotations

import logging
from importlib.metadata import version

import grpc
from liverank.v1 import admin_pb2 as pb
from liverank.v1 import admin_pb2_grpc as pb_grpc

from kernels import fence
from server.engine import Engine
from server.recorder import Recorder
from server.rollout.shipping import Shipping
from server.rpc.control import Control
from server.rpc.decode import check_short, check_stream_id
from server.rpc.models import ModelMethods
from server.rpc.status import guarded
from server.rules.rulebook import RuleBook

logger = logging.getLogger(__name__)

MAX_REASON_BYTES = 256


class AdminService(ModelMethods, pb_grpc.AdminServicer):
    """For operators. Blocks are events in the log, hence durable and visible to the next ranking."""

    def __init__(self, engine: Engine, control: Control, recorder: Recorder, shipping: Shipping) -> None:
        self._engine, self._control, self.recorder, self._shipping = engine, control, recorder, shipping
        self._started_ms = engine.clock.now_ms()

    @guarded
    def Status(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> pb.StatusResponse:
        return self._engine.call(self._status).result()

    def _status(self) -> pb.StatusResponse:
        engine, state = self._engine, self._engine.answerer.reply_state()
        live, suspect, ended = engine.table.count_states()
        return pb.StatusResponse(
            version=version("liverank"),
            started_ms=self._started_ms,
            now_ms=engine.clock.now_ms(),
            capacity=engine.settings.table.capacity,
            live=live,
            suspect=suspect,
            ended=ended,
            applied_offset=state.applied_offset,
            feature_schema=engine.features.schema,
            model_version=state.model_version,
            scoring_backend=engine.settings.scoring.mode,
            degradation_level=state.level.name,
            degradation_reasons=state.reasons,
            score_age_ms=state.score_age_ms,
            rules_hash=engine.streams.book.hash,
            retrieval_engine=engine.settings.retrieval.engine,
            events_applied=self.recorder.events_applied,
            events_rejected=self.recorder.events_rejected,
            scoring_transport=self.recorder.model_transport(),
        )

    @guarded
    def BlockStream(self, request: pb.BlockStreamRequest, context: grpc.ServicerContext) -> pb.BlockStreamResponse:
        check_stream_id("stream_id", request.stream_id)
        check_short("reason", request.reason, MAX_REASON_BYTES)
        offset = self._control.moderate(request.stream_id, fence.BLOCK)
        logger.warning("blocked %r at offset %d: %r", request.stream_id, offset, request.reason)
        return pb.BlockStreamResponse(offset=offset)

    @guarded
    def UnblockStream(
        self, request: pb.UnblockStreamRequest, context: grpc.ServicerContext
    ) -> pb.UnblockStreamResponse:
        check_stream_id("stream_id", request.stream_id)
        offset = self._control.moderate(request.stream_id, fence.UNBLOCK)
        logger.warning("unblocked %r at offset %d", request.stream_id, offset)
        return pb.UnblockStreamResponse(offset=offset)

    @guarded
    def ReloadRules(self, request: pb.ReloadRulesRequest, context: grpc.ServicerContext) -> pb.ReloadRulesResponse:
        engine = self._engine
        book = RuleBook.load(engine.settings.rank.rules_file, engine.features.names)
        engine.call(lambda: engine.set_rules(book)).result()
        return pb.ReloadRulesResponse(rules_hash=book.hash, rules=len(book.rules))
