"""The client's side of the API: an open Publish stream and the unary calls of a replay."""

from __future__ import annotations

import queue
from collections.abc import Sequence

import grpc
from liverank.v1 import admin_pb2, admin_pb2_grpc, ingest_pb2, ingest_pb2_grpc, ranking_pb2, ranking_pb2_grpc

CALL_TIMEOUT_S = 30.0


class Connection:
    """One producer and one anonymous viewer of the server at ``address``. Raises grpc.RpcError."""

    def __init__(self, address: str, producer_id: str) -> None:
        self._producer_id = producer_id
        self._channel = grpc.insecure_channel(address)
        self._ranking = ranking_pb2_grpc.RankingStub(self._channel)
        self._admin = admin_pb2_grpc.AdminStub(self._channel)
        self._outbox: queue.SimpleQueue[ingest_pb2.EventBatch | None] = queue.SimpleQueue()
        self._acks = ingest_pb2_grpc.IngestStub(self._channel).Publish(iter(self._outbox.get, None))

    def publish(self, events: Sequence[ingest_pb2.Event]) -> ingest_pb2.PublishAck:
        """Sends one batch and waits for its acknowledgement."""
        self._outbox.put(ingest_pb2.EventBatch(producer_id=self._producer_id, events=events))
        return next(self._acks)

    def rank(self, request_id: str, surface: str, limit: int) -> ranking_pb2.RankResponse:
        """The feed of somebody about whom nothing is known."""
        request = ranking_pb2.RankRequest(request_id=request_id, surface=surface, limit=limit)
        return self._ranking.Rank(request, timeout=CALL_TIMEOUT_S)

    def live(self) -> int:
        """Streams that the server holds for live."""
        return int(self._admin.Status(admin_pb2.StatusRequest(), timeout=CALL_TIMEOUT_S).live)

    def close(self) -> None:
        """Ends the Publish stream; the server has acknowledged everything."""
        self._outbox.put(None)
        self._channel.close()
