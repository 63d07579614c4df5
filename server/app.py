"""Composition root: settings → parts → serve → drain. The only place that builds things."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection
from liverank.v1 import admin_pb2_grpc, liveness_pb2_grpc

from kernels.backend import Backend, DeviceError, choose
from server.admission.gate import Admission
from server.clock import Clock
from server.config import Settings
from server.edges.intake import Intake
from server.edges.sockets import engine_address, rings_path
from server.engine import Engine
from server.errors import ConfigError, Draining
from server.live.ends import EndFeed
from server.live.features import FeatureSet
from server.live.table import LiveTable
from server.log.snapshot import SnapshotFolder
from server.logs import open_log
from server.ranking.ranker import RankerStage
from server.recorder import Recorder
from server.recovery import recover
from server.retrieval.registry import make_search
from server.rollout.ledger import Ledger
from server.rollout.repository import Repository
from server.rollout.shipping import Shipping
from server.rollout.store import RolloutFile
from server.rpc.admin import AdminService
from server.rpc.auth import Gatekeeper
from server.rpc.control import Control
from server.rpc.direct import WAITING_OPTIONS, DirectServer
from server.rpc.encode import encode_replies
from server.rpc.health import Health
from server.rpc.ingest import IngestService
from server.rpc.liveness import LivenessService
from server.rpc.ranking import RankingService
from server.rpc.raw import ingest_handler
from server.rpc.services import OTHER_THREADS, SERVICES
from server.rpc.slots import StreamSlots
from server.rpc.tls import bind
from server.rules.rulebook import RuleBook
from server.scoring.base import VersionedScorer
from server.scoring.ranker import Ranker, RankerCaller
from server.scoring.refresh import Refresher
from server.scoring.shared import SharedScorer
from server.scoring.versions import LocalVersions, TritonVersions, Versions
from server.security.gate import Gate
from server.snapshots import Snapshots
from server.telemetry.metrics import Metrics
from server.trend_path import TrendPath
from server.viewers.embeddings import open_embeddings
from server.warmup import warm_ranker, warm_up
from server.world import build_world

if TYPE_CHECKING:
    from server.row_log import RowLog

logger = logging.getLogger(__name__)


def open_scorer(
    settings: Settings,
    features: FeatureSet,
    on_gpu: bool = False,
    on_fallback: Callable[[], None] = lambda: None,
    version: int = 0,
    versions: Versions | None = None,
    on_trial: bool = False,
) -> VersionedScorer:
    """The configured model; imported here so that one way to it does not load the other's library.

    Args:
        on_fallback: told when shared memory is refused and tensors take the plain way.
        version: 0: the newest. versions: what a reload has to bring back. on_trial: never reloaded.
    """
    scoring = settings.scoring
    if scoring.mode == "triton":
        from server.scoring.transport import open_transport
        from server.scoring.triton import TritonScorer

        tensors = open_transport(scoring.transport, scoring.triton_address, on_gpu, on_fallback)
        held = versions if isinstance(versions, TritonVersions) else None
        return TritonScorer(
            scoring.triton_address, scoring.model_name, features.schema, len(features), tensors, version, held,
            heals=not on_trial,
        )  # fmt: skip
    from server.scoring.local import LocalScorer

    return LocalScorer(scoring.model_repository, scoring.model_name, features.schema, len(features), version)


def open_versions(settings: Settings) -> Versions:
    """Who makes versions of the model ready to answer."""
    scoring = settings.scoring
    if scoring.mode == "triton":
        return TritonVersions(scoring.triton_address, scoring.model_name, scoring.model_repository)
    return LocalVersions(scoring.model_repository, scoring.model_name)


def open_row_log(settings: Settings, table: LiveTable, features: FeatureSet, metrics: Metrics) -> RowLog | None:
    """The configured row log, or None; imported here, for it needs pyarrow. Raises ConfigError."""
    if settings.telemetry.row_log is None:
        return None
    from server.row_log import RowLog

    def dropped(reason: str, rows: int) -> None:
        metrics.row_log_dropped.labels(reason).inc(rows)

    return RowLog(settings.telemetry, table, features, metrics.row_log_rows.inc, dropped)


def open_ranker(
    settings: Settings,
    features: FeatureSet,
    clock: Clock,
    on_call: Callable[[str, float], None],
    on_answer: Callable[[], None],
) -> RankerCaller | None:
    """Who asks the configured ranker; None when there is none."""
    scoring, name = settings.scoring, settings.ranker.model
    if not name:
        return None
    sizes = (features.schema, len(features), settings.table.embedding_dim)
    ranker: Ranker
    if scoring.mode == "triton":
        from server.scoring.ranker_triton import TritonRanker

        ranker = TritonRanker(scoring.triton_address, name, *sizes)
    else:
        from server.scoring.ranker_local import LocalRanker

        ranker = LocalRanker(scoring.model_repository, name, *sizes)
    return RankerCaller(ranker, settings.ranker, clock, on_call, on_answer)


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

    port, metrics_port: the bound ports, known from early in ``start`` on; port is 0 behind edges.

    Args:
        folder: given, this is the engine behind edges: it listens on Unix sockets in there and on no port.

    Raises:
        ConfigError: a file is wrong. LogError: the log cannot be opened.
    """

    def __init__(
        self, settings: Settings, clock: Clock, on_fault: Callable[[], None], folder: Path | None = None
    ) -> None:
        self.settings, self.clock, self._behind = settings, clock, folder
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
        admission = Admission(settings.admission, serve.max_rank_calls, serve.max_queue_rows, self.recorder.shed)
        self.engine = Engine(
            settings, clock, world.table, features, world.streams, world.pipeline,
            EndFeed(settings.serve.watch_buffer), self.recorder, encode_replies, admission, on_fault,
        )  # fmt: skip
        self._row_log = open_row_log(settings, world.table, features, self.metrics)
        if self._row_log is not None:
            self.engine.answerer.on_served = self._row_log.offer
        self._log = open_log(settings, clock, self.engine, self.metrics, on_fault)
        self._commit = self._log.commit
        self._folder = SnapshotFolder(settings.snapshot_folder)
        self.snapshots = Snapshots(
            self.engine, self._folder, settings, self._log.history.name, self._log.trimmer, self.metrics
        )
        model, versions = settings.scoring.model_name, open_versions(settings)
        rollout_file = RolloutFile(settings.rollout_file)
        decided = rollout_file.load().get(model)
        serving = decided.serving if decided else 0

        def open_version(version: int, on_trial: bool = True) -> SharedScorer:
            told = self.metrics.model_transport_fallbacks.inc
            return SharedScorer(open_scorer(settings, features, backend.on_gpu, told, version, versions, on_trial))

        scorer = open_version(serving, on_trial=False)
        self._refresher = Refresher(
            scorer,
            settings.scoring,
            features.names,
            clock,
            self.engine.scored,
            self.recorder.model_called,
        )
        self._embeddings = open_embeddings(settings, clock, self.recorder.embedding_looked_up)
        self._ranker = open_ranker(settings, features, clock, self.recorder.ranker_called, self.engine.wake)
        if self._ranker is not None:
            most = settings.ranker.candidates
            world.pipeline.ranker = RankerStage(self._ranker, world.table, world.streams, most)
        self._trend = TrendPath(self.engine, self._refresher, model, scorer, serving, open_version, versions)
        self.recorder.watch_transport(lambda: self._trend.transport)
        self.shipping = Shipping(
            settings.rollout, rollout_file, {model: self._trend},
            {model: Repository(settings.scoring.model_repository / model)},
            Ledger(settings.rollout_file.with_suffix(".jsonl"), settings.security.audit_max_bytes, self.metrics),
            clock, self.metrics,
        )  # fmt: skip
        self._slots = StreamSlots(settings.serve.max_open_streams)
        # Streaming calls hold a thread each; other unary calls have threads of their own beside them, those of
        # Ranking need none: however many there are, health and liveness are answered.
        self._pool = ThreadPoolExecutor(OTHER_THREADS + settings.serve.max_open_streams, thread_name_prefix="rpc")
        self._grpc = grpc.server(
            self._pool,
            interceptors=(Gatekeeper(self.gate, self.recorder),),
            options=[
                ("grpc.max_receive_message_length", settings.serve.max_message_bytes),
                ("grpc.max_send_message_length", settings.serve.max_message_bytes),
                ("grpc.so_reuseport", 0),
                *WAITING_OPTIONS,
            ],
        )
        self._health = Health(self._grpc)
        self._ranking = RankingService(self.engine, self.gate, self.recorder, self.engine, self._embeddings)
        self._register()
        self._calls = DirectServer(self._grpc, self._ranking.methods(), self._ranking.outbox)
        self._drained = threading.Lock()
        self._stopping = threading.Event()
        self._stop_metrics: Callable[[], None] = lambda: None
        self._intake: Intake | None = None
        self.port = 0
        self.metrics_port = 0

    def _register(self) -> None:
        engine, recorder = self.engine, self.recorder
        control = Control(engine, self._commit, self._log.control_producer)
        ingest = IngestService(engine, self._commit, recorder, self._slots)
        self._grpc.add_generic_rpc_handlers((ingest_handler(ingest),))
        liveness_pb2_grpc.add_LivenessServicer_to_server(
            LivenessService(engine, control, recorder, self._slots), self._grpc
        )
        admin = AdminService(engine, control, recorder, self.shipping)
        admin_pb2_grpc.add_AdminServicer_to_server(admin, self._grpc)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._grpc)

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
        self._bind()
        metrics_host = self.settings.metrics_host
        try:
            self.metrics_port, self._stop_metrics = self.metrics.serve(metrics_host, serve.metrics_port)
        except OSError as error:
            raise ConfigError(
                f"serve.metrics_port: {metrics_host}:{serve.metrics_port} cannot be bound: {error}"
            ) from error
        self.gate.start()
        self._calls.start()
        self._log.connect(self._stopping)
        recovered = recover(self.engine, self._log.history, self._folder, self.metrics, self._stopping)
        self._log.start(recovered.offset, recovered.stamp_ms)
        self.engine.start(self._commit, self._refresher)
        self.shipping.start()
        warm_up(self.engine, self._backend)
        if self._ranker is not None:
            warm_ranker(self._ranker, self.settings, len(self.engine.features))
        self._log.catch_up(self._stopping)
        self.snapshots.start(recovered.snapshot_offset)
        if self._stopping.is_set():
            raise Draining("stopped while starting")
        if self._intake is not None:
            self._intake.start()
        self._health.tell(serves=True)
        security = self.settings.security
        if self._behind is not None:
            logger.info("serving edges; metrics on %s:%d", metrics_host, self.metrics_port)
            return
        tls = "mutual TLS" if security.client_ca_file else "TLS" if security.cert_file else "no TLS"
        who = "callers by access file" if security.access_file else "anybody may call"
        logger.info("serving on %s:%d (%s, %s)", serve.host, self.port, tls, who)
        logger.info("metrics on %s:%d", metrics_host, self.metrics_port)

    def _bind(self) -> None:
        serve, folder = self.settings.serve, self._behind
        if folder is None:
            self.port = bind(self._grpc, f"{serve.host}:{serve.port}", self.settings.security, self.gate)
            return
        self._grpc.add_insecure_port(engine_address(folder))  # who may open files in there is the same user
        self._intake = Intake(rings_path(folder), self.engine, self.recorder)

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
        self._health.tell(serves=False)
        self._slots.close()
        self.engine.ends.close()
        stopped = self._calls.stop(self.settings.serve.drain_grace_ms / 1000)
        clean = stopped.wait(self.settings.serve.drain_grace_ms / 1000 + 1.0)
        if self._intake is not None:
            self._intake.stop()
        self.shipping.stop()
        self.snapshots.stop()
        self._commit.stop()
        self.engine.stop()
        if self._row_log is not None:
            self._row_log.close()
        clean &= self._refresher.close()
        self._trend.close()
        if self._ranker is not None:
            self._ranker.close()
        if self._embeddings is not None:
            self._embeddings.close()
        self._log.close()
        self._stop_metrics()
        self.gate.stop()
        self._ranking.close()
        self._pool.shutdown(wait=False)
        logger.info("drained %s", "cleanly" if clean else "with calls cut off")
        return clean
