"""Composition root of an edge: one of several processes that share the port and speak to the one engine.

Rank and RankBatch are admitted, checked and decoded here and go to the engine through shared memory (`server/edges`);
every other method is handed on to the engine's own port (`server/rpc/proxy.py`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from server.admission.gate import Admission
from server.clock import Clock
from server.config import Settings
from server.edges.link import EngineLink
from server.edges.sockets import engine_address, rings_path
from server.errors import ConfigError
from server.recorder import Recorder
from server.rpc.direct import WAITING_OPTIONS, DirectServer
from server.rpc.health import Health
from server.rpc.proxy import Proxy
from server.rpc.ranking import RankingService
from server.rpc.services import OTHER_THREADS
from server.rpc.tls import bind
from server.security.gate import Gate
from server.telemetry.metrics import Metrics
from server.viewers.embeddings import open_embeddings

logger = logging.getLogger(__name__)

_RETRY_S = 0.1


class Edge:
    """One edge. ``start`` listens, and returns when the engine serves; it is SERVING while the engine is.

    Args:
        folder: where the engine's sockets are.
        number: from 0; its metrics are on ``serve.metrics_port`` + 1 + number, unless that is 0.

    Raises:
        ConfigError: a file is wrong.
    """

    def __init__(self, settings: Settings, clock: Clock, folder: Path, number: int = 0) -> None:
        self.settings, self._number = settings, number
        self.metrics = Metrics()
        recorder = Recorder(self.metrics)
        serve = settings.serve
        self._gate = Gate(settings.security, clock, self.metrics)
        # Each edge sees its share of the calls, and keeps its share of the limit.
        share = -(-serve.max_rank_calls // max(1, serve.edges))
        admission = Admission(settings.admission, share, serve.max_queue_rows, recorder.shed)
        self._connected = self._engine_serves = False
        self._telling = threading.Lock()
        self._stopping = threading.Event()
        self._served = threading.Event()
        self.link = EngineLink(rings_path(folder), settings, admission, self._linked)
        self._proxy = Proxy(engine_address(folder), serve.max_message_bytes)
        self._pool = ThreadPoolExecutor(OTHER_THREADS + serve.max_open_streams, thread_name_prefix="rpc")
        self._grpc = grpc.server(
            self._pool,
            options=[
                ("grpc.max_receive_message_length", serve.max_message_bytes),
                ("grpc.max_send_message_length", serve.max_message_bytes),
                ("grpc.so_reuseport", 1),
                *WAITING_OPTIONS,
            ],
        )
        self._health = Health(self._grpc)
        self._grpc.add_generic_rpc_handlers((self._proxy,))
        self._tell()
        self._embeddings = open_embeddings(settings, clock, recorder.embedding_looked_up)
        self._ranking = RankingService(self.link, self._gate, recorder, None, self._embeddings)
        self._calls = DirectServer(self._grpc, self._ranking.methods(), self._ranking.outbox)
        self._watching = threading.Thread(target=self._watch_health, name="engine-health", daemon=True)
        self._stop_metrics: Callable[[], None] = lambda: None
        self.port = self.metrics_port = 0

    def start(self) -> None:
        """Binds and listens. Raises ConfigError when a port cannot be bound."""
        serve = self.settings.serve
        self.port = bind(self._grpc, f"{serve.host}:{serve.port}", self.settings.security, self._gate)
        wanted = serve.metrics_port and serve.metrics_port + 1 + self._number
        try:
            self.metrics_port, self._stop_metrics = self.metrics.serve(self.settings.metrics_host, wanted)
        except OSError as error:
            raise ConfigError(
                f"serve.metrics_port: {wanted}, of edge {self._number}, cannot be bound: {error}"
            ) from error
        self._gate.start()
        self._calls.start()
        self.link.start()
        self._watching.start()
        logger.info("edge %d listens on %s:%d, metrics on %d", self._number, serve.host, self.port, self.metrics_port)
        self._served.wait()

    def stop_starting(self) -> None:
        """Makes a `start` in another thread that waits for the engine return."""
        self._served.set()

    def drain(self) -> bool:
        """Readiness off, in-flight calls finish within the grace period. True when none was cut off."""
        self._stopping.set()
        self._tell()
        grace_s = self.settings.serve.drain_grace_ms / 1000
        clean = self._calls.stop(grace_s).wait(grace_s + 1.0)
        self.link.stop()
        self._proxy.close()
        if self._watching.ident is not None:
            self._watching.join()
        self._stop_metrics()
        self._gate.stop()
        self._ranking.close()
        if self._embeddings is not None:
            self._embeddings.close()
        self._pool.shutdown(wait=False)
        return clean

    def _linked(self, connected: bool) -> None:
        self._connected = connected
        self._tell()

    def _watch_health(self) -> None:
        """Repeats what the engine says of itself."""
        stub = health_pb2_grpc.HealthStub(self._proxy.channel)
        while not self._stopping.is_set():
            try:
                for update in stub.Watch(health_pb2.HealthCheckRequest()):
                    self._engine_serves = update.status == health_pb2.HealthCheckResponse.SERVING
                    self._tell()
            except (grpc.RpcError, ValueError) as error:  # ValueError: the channel was closed by `drain`
                logger.debug("the engine's health is unknown: %s", error)
            self._engine_serves = False
            self._tell()
            self._stopping.wait(_RETRY_S)

    def _tell(self) -> None:
        """SERVING while the engine says so and the rings are there; without them no Rank would be answered."""
        with self._telling:
            serves = self._connected and self._engine_serves and not self._stopping.is_set()
            if serves:
                self._served.set()
            self._health.tell(serves)
