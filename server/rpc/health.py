"""Health of the server as grpc.health.v1 tells it, one state for all services."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from server.rpc.services import SERVICES

MOST_WATCHERS = 1_024
"""Open Watch calls; each holds a thread, made when it comes. Further ones wait for their first answer."""


class Health:
    """NOT_SERVING at first. Thread-safe.

    Watchers have threads. Without them grpc's servicer sends while it holds the lock that the polling thread takes
    when a watcher leaves; the polling thread then can never tell it that it has sent, and both wait for ever.
    """

    def __init__(self, server: grpc.Server) -> None:
        self._servicer = health.HealthServicer(
            experimental_non_blocking=False,
            experimental_thread_pool=ThreadPoolExecutor(MOST_WATCHERS, thread_name_prefix="health"),
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        self.tell(serves=False)

    def tell(self, serves: bool) -> None:
        """SERVING or NOT_SERVING from now on; watchers hear it."""
        answer = health_pb2.HealthCheckResponse
        for service in ("", *SERVICES):
            self._servicer.set(service, answer.SERVING if serves else answer.NOT_SERVING)
