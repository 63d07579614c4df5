"""Composition root: settings → parts → serve → drain. The only place that builds things."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from liverank.v1 import admin_pb2, admin_pb2_grpc, ingest_pb2, liveness_pb2, liveness_pb2_grpc, ranking_pb2

from kernels.backend import Backend, DeviceError, choose
from server.admission.gate import Admission
from server.clock import Clock
from server.config import Settings
from server.engine import Engine
from server.errors import ConfigError, Draining
from server.live.ends import EndFeed
from server.live.features import FeatureSet
from server.live.table import LiveTable
from server.log.snapshot import SnapshotFolder
from server.logs import open_log
from server.recorder import Recorder
from server.recovery import recover
from server.retrieval.registry import make_search
from server.rpc.admin import AdminService
from server.rpc.admission import AdmissionInterceptor
from server.rpc.auth import Gatekeeper
from server.rpc.control import Control
from server.rpc.encode import encode_replies
from server.rpc.ingest import IngestService
from server.rpc.liveness import LivenessService
from server.rpc.ranking import RankingService
from server.rpc.raw import ingest_handler, ranking_handler
from server.rpc.slots import StreamSlots
from server.rpc.tls import bind
from server.rules.rulebook import RuleBook
from server.scoring.base import Scorer
from server.scoring.refresh import Refresher
from server.security.gate import Gate
from server.snapshots import Snapshots
from server.telemetry.metrics import Metrics
from server.warmup import warm_up
from server.world import build_world

if TYPE_CHECKING:
    from server.row_log import RowLog

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


def open_scorer(
    settings: Settings, features: FeatureSet, on_gpu: bool = False, on_fallback: Callable[[], None] = lambda: None
) -> Scorer:
    """The configured model; imported here so that one way to it does not load the other's library.

    ``on_fallback`` is told when shared memory is refused and tensors take the plain way.
    """
    scoring = settings.scoring
    if scoring.mode == "triton":
        from server.scoring.transport import open_transport
        from server.scoring.triton import TritonScorer

        tensors = open_transport(scoring.transport, scoring.triton_address, on_gpu, on_fallback)
        return TritonScorer(scoring.triton_address, scoring.model_name, features.schema, len(features), tensors)
    from server.scoring.local import LocalScorer

    return LocalScorer(scoring.model_repository, scoring.model_name, features.schema, len(features))


def open_row_log(settings: Settings, table: LiveTable, features: FeatureSet, metrics: Metrics) -> RowLog | None:
    """The configured row log, or None; imported here, for it needs pyarrow. Raises ConfigError."""
    if settings.telemetry.row_log is None:
        return None
    from server.row_log import RowLog

    def dropped(reason: str, rows: int) -> None:
        metrics.row_log_dropped.labels(reason).inc(rows)

    return RowLog(settings.telemetry, table, features, metrics.row_log_rows.inc, dropped)


def open_device(settings: Settings) -> Backend:
    """The device that this process computes on. Raises ConfigError when the configured one cannot be used."""
    try:
        return choose(settings.device.kind, settings.device.allow_cpu)
    except DeviceError as error:
        raise ConfigError(
            f"device.kind: {error} (device.allow_cpu = true, or device.kind = 'cpu', serves from the CPU)"
        ) from error


class App:
    """One server. ``start`` returns when it is warm and SERVING; ``drain`` ends it in order.

    port, metrics_port: the bound ports, known from early in ``start`` on.

    Raises:
        ConfigError: a file is wrong. LogError: the log cannot be opened.
    """

    def __init__(self, settings: Settings, clock: Clock, on_fault: Callable[[], None]) -> None:
        self.settings, self.clock = settings, clock
        backend = open_device(settings)
        features = FeatureSet.load(settings.table.features_file)
        book = RuleBook.load(settings.rank.rules_file, features.names)
        self.metrics = Metrics()
        size = settings.table
        search = make_search(settings.retrieval, size.capacity, size.embedding_dim, self.metrics, backend)
        self._backend = backend
        self.recorder = Recorder(self.metrics)
        world = build_world(settings, clock, features, book, backend, search, self.recorder.ranked_on_host)
        self.metrics.capacity_rows.set(settings.table.capacity)
        self.gate = Gate(settings.security, clock, self.metrics)
        serve = settings.serve
        admission = Admission(settings.admission, serve.rank_threads, serve.max_queue_rows, self.recorder.shed)
        self.engine = Engine(
            settings, clock, world.table, features, world.streams, world.pipeline,
            EndFeed(settings.serve.watch_buffer), self.recorder, encode_replies, admission, on_fault,
        )  # fmt: skip
        self._row_log = open_row_log(settings, world.table, features, self.metrics)
        if self._row_log is not None:
            self.engine.on_served = self._row_log.offer
        self._log = open_log(settings, clock, self.engine, self.metrics, on_fault)
        self._commit = self._log.commit
        self._folder = SnapshotFolder(settings.snapshot_folder)
        self.snapshots = Snapshots(
            self.engine, self._folder, settings, self._log.history.name, self._log.trimmer, self.metrics
        )
        self._scorer = open_scorer(settings, features, backend.on_gpu, self.metrics.model_transport_fallbacks.inc)
        self.recorder.watch_transport(lambda: self._scorer.transport)
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
            interceptors=(self._admission, Gatekeeper(self.gate, self.recorder)),
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
        self._stopping = threading.Event()
        self._stop_metrics: Callable[[], None] = lambda: None
        self.port = 0
        self.metrics_port = 0

    def _register(self) -> None:
        engine, recorder = self.engine, self.recorder
        control = Control(engine, self._commit, self._log.control_producer)
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
        """Binds, answers health with NOT_SERVING, recovers, warms up, then turns to SERVING.

        Raises:
            ConfigError: a port cannot be bound, or the table cannot hold the snapshot. LogError: the log is damaged
            or incomplete. Draining: drained meanwhile. Nothing runs any more then.
        """
        try:
            self._start()
        except BaseException:
            self.drain()
            raise

    def _start(self) -> None:
        serve = self.settings.serve
        self.port = bind(self._grpc, f"{serve.host}:{serve.port}", self.settings.security, self.gate)
        metrics_host = self.settings.metrics_host
        try:
            self.metrics_port, self._stop_metrics = self.metrics.serve(metrics_host, serve.metrics_port)
        except OSError as error:
            raise ConfigError(
                f"serve.metrics_port: {metrics_host}:{serve.metrics_port} cannot be bound: {error}"
            ) from error
        self.gate.start()
        self._grpc.start()
        self._log.connect(self._stopping)
        recovered = recover(self.engine, self._log.history, self._folder, self.metrics, self._stopping)
        self._log.start(recovered.offset, recovered.stamp_ms)
        self.engine.start(self._commit, self._refresher)
        warm_up(self.engine, self._backend)
        self._log.catch_up(self._stopping)
        self.snapshots.start(recovered.snapshot_offset)
        if self._stopping.is_set():
            raise Draining("stopped while starting")
        self._set_health(health_pb2.HealthCheckResponse.SERVING)
        security = self.settings.security
        tls = "mutual TLS" if security.client_ca_file else "TLS" if security.cert_file else "no TLS"
        who = "callers by access file" if security.access_file else "anybody may call"
        logger.info("serving on %s:%d (%s, %s)", serve.host, self.port, tls, who)
        logger.info("metrics on %s:%d", metrics_host, self.metrics_port)

    def stop_starting(self) -> None:
        """Makes a `start` in another thread raise Draining soon; a started server is not affected."""
        self._stopping.set()

    def drain(self) -> bool:
        """Readiness off, in-flight calls finish within the grace period, then everything stops, in order.

        True when nothing had to be cut off. Later calls return at once.
        """
        if not self._drained.acquire(blocking=False):
            return True
        self._stopping.set()
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._slots.close()
        self.engine.ends.close()
        stopped = self._grpc.stop(grace=self.settings.serve.drain_grace_ms / 1000)
        clean = stopped.wait(self.settings.serve.drain_grace_ms / 1000 + 1.0)
        self.snapshots.stop()
        self._commit.stop()
        self.engine.stop()
        if self._row_log is not None:
            self._row_log.close()
        clean &= self._refresher.close()
        self._scorer.close()
        self._log.close()
        self._stop_metrics()
        self.gate.stop()
        self._admission.close()
        self._pool.shutdown(wait=False)
        logger.info("drained %s", "cleanly" if clean else "with calls cut off")
        return clean

    def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in ("", *SERVICES):
            self._health.set(service, status)
