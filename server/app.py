"""Composition root: settings → parts → serve → drain. The only place that builds things."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from liverank.v1 import admin_pb2, admin_pb2_grpc, ingest_pb2, liveness_pb2, liveness_pb2_grpc, ranking_pb2

from server.admission.gate import Admission
from server.clock import Clock
from server.config import Settings
from server.engine import Engine
from server.errors import ConfigError
from server.live.ends import EndFeed
from server.live.features import FeatureSet
from server.live.table import LiveTable
from server.log.commit import GroupCommit
from server.log.sqlite import SqliteLog
from server.ranking.pipeline import Pipeline
from server.recorder import Recorder
from server.retrieval.registry import make_engine
from server.retrieval.streams import StreamState
from server.rpc.admin import AdminService
from server.rpc.admission import AdmissionInterceptor
from server.rpc.control import Control
from server.rpc.encode import encode_replies
from server.rpc.ingest import IngestService
from server.rpc.liveness import LivenessService
from server.rpc.ranking import RankingService
from server.rpc.raw import ingest_handler, ranking_handler
from server.rpc.slots import StreamSlots
from server.rules.rulebook import RuleBook
from server.scoring.base import Scorer
from server.scoring.refresh import Refresher
from server.telemetry.metrics import Metrics
from server.warmup import warm_up

logger = logging.getLogger(__name__)

OTHER_THREADS = 16
"""Unary calls outside Ranking that are handled at once."""
SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (ranking_pb2, "Ranking"),
        (liveness_pb2, "Liveness"),
        (ingest_pb2, "Ingest"),
        (admin_pb2, "Admin"),
    )
)


def open_scorer(settings: Settings, features: FeatureSet) -> Scorer:
    """The configured model transport; imported here so that one does not load the other's library."""
    scoring = settings.scoring
    if scoring.mode == "triton":
        from server.scoring.triton import TritonScorer

        return TritonScorer(scoring.triton_address, scoring.model_name, features.schema, len(features))
    from server.scoring.local import LocalScorer

    return LocalScorer(scoring.model_repository, scoring.model_name, features.schema, len(features))


class App:
    """One server. ``start`` returns when it is warm and SERVING; ``drain`` ends it in order.

    port, metrics_port: the bound ports, known after ``start``.

    Raises:
        ConfigError: a file is wrong, or a port cannot be bound. LogError: the log cannot be read.
    """

    def __init__(self, settings: Settings, clock: Clock, on_fault: Callable[[], None]) -> None:
        self.settings, self.clock = settings, clock
        features = FeatureSet.load(settings.table.features_file)
        book = RuleBook.load(settings.rank.rules_file, features.names)
        search = make_engine(settings.retrieval.engine, settings.table.capacity, settings.table.embedding_dim)
        table = LiveTable(settings.table, search.embeddings)
        streams = StreamState(table, features, book)
        pipeline = Pipeline(settings, clock, table, streams, search)
        self.metrics = Metrics()
        self.metrics.capacity_rows.set(settings.table.capacity)
        self.recorder = Recorder(self.metrics)
        serve = settings.serve
        admission = Admission(settings.admission, serve.rank_threads, serve.max_queue_rows, self.recorder.shed)
        self.engine = Engine(
            settings, clock, table, features, streams, pipeline,
            EndFeed(settings.serve.watch_buffer), self.recorder, encode_replies, admission, on_fault,
        )  # fmt: skip
        self._log = SqliteLog(settings.log.path)
        replayed = self.engine.recover(self._log)
        logger.info("recovered %d batches; offset %d", replayed, self.engine.applied_offset)
        self._commit = GroupCommit(self._log, clock, settings.log.group_commit_rows, self.engine.committed, on_fault)
        self._scorer = open_scorer(settings, features)
        self._refresher = Refresher(
            self._scorer,
            settings.scoring,
            features.names,
            clock,
            self.engine.scored,
            self.recorder.model_called,
        )
        self._slots = StreamSlots(settings.serve.max_open_streams)
        # Streaming calls hold a thread each; unary calls have threads of their own beside them, those of Ranking
        # in the interceptor: however many there are, health and liveness are answered.
        self._pool = ThreadPoolExecutor(OTHER_THREADS + settings.serve.max_open_streams, thread_name_prefix="rpc")
        self._admission = AdmissionInterceptor(admission, self.recorder, settings.serve.rank_threads)
        self._grpc = grpc.server(
            self._pool,
            interceptors=(self._admission,),
            options=[
                ("grpc.max_receive_message_length", settings.serve.max_message_bytes),
                ("grpc.max_send_message_length", settings.serve.max_message_bytes),
                ("grpc.so_reuseport", 0),
            ],
        )
        self._health = health.HealthServicer(
            experimental_non_blocking=True, experimental_thread_pool=ThreadPoolExecutor(2, "health")
        )
        self._register()
        self._drained = threading.Lock()
        self.port = 0
        self.metrics_port = 0

    def _register(self) -> None:
        engine, recorder = self.engine, self.recorder
        control = Control(engine, self._commit)
        ingest = IngestService(engine, self._commit, recorder, self._slots)
        self._grpc.add_generic_rpc_handlers((ranking_handler(RankingService(engine, recorder)), ingest_handler(ingest)))
        liveness_pb2_grpc.add_LivenessServicer_to_server(
            LivenessService(engine, control, recorder, self._slots), self._grpc
        )
        admin = AdminService(engine, control, recorder)
        admin_pb2_grpc.add_AdminServicer_to_server(admin, self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._grpc)
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)

    def start(self) -> None:
        """Binds, answers health with NOT_SERVING, warms up, then turns to SERVING."""
        serve = self.settings.serve
        try:
            self.port = self._grpc.add_insecure_port(f"{serve.host}:{serve.port}")
        except RuntimeError as error:
            raise ConfigError(f"serve.port: {serve.host}:{serve.port} cannot be bound: {error}") from error
        try:
            self.metrics_port, self._stop_metrics = self.metrics.serve(serve.host, serve.metrics_port)
        except OSError as error:
            raise ConfigError(
                f"serve.metrics_port: {serve.host}:{serve.metrics_port} cannot be bound: {error}"
            ) from error
        self._commit.start()
        self.engine.start(self._commit, self._refresher)
        self._grpc.start()
        warm_up(self.engine)
        self._set_health(health_pb2.HealthCheckResponse.SERVING)
        logger.info("serving on %s:%d, metrics on :%d", serve.host, self.port, self.metrics_port)

    def drain(self) -> bool:
        """Readiness off, in-flight calls finish within the grace period, then everything stops, in order.

        True when nothing had to be cut off. Later calls return at once.
        """
        if not self._drained.acquire(blocking=False):
            return True
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._slots.close()
        self.engine.ends.close()
        stopped = self._grpc.stop(grace=self.settings.serve.drain_grace_ms / 1000)
        clean = stopped.wait(self.settings.serve.drain_grace_ms / 1000 + 1.0)
        self._commit.stop()
        self.engine.stop()
        clean &= self._refresher.close()
        self._scorer.close()
        self._log.close()
        self._stop_metrics()
        self._admission.close()
        self._pool.shutdown(wait=False)
        logger.info("drained %s", "cleanly" if clean else "with calls cut off")
        return clean

    def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in ("", *SERVICES):
            self._health.set(service, status)
