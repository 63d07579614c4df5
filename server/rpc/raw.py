"""Handlers that leave messages as bytes where we read or write the wire ourselves."""

from __future__ import annotations

import grpc
from liverank.v1 import ingest_pb2, ranking_pb2

from server.rpc.ingest import IngestService
from server.rpc.ranking import RankingService


def _as_is(payload: bytes) -> bytes:
    return payload


def ranking_handler(service: RankingService) -> grpc.GenericRpcHandler:
    """Rank and RankBatch return finished bytes: the engine encodes a whole batch at once."""
    return grpc.method_handlers_generic_handler(
        ranking_pb2.DESCRIPTOR.services_by_name["Ranking"].full_name,
        {
            "Rank": grpc.unary_unary_rpc_method_handler(service.Rank, ranking_pb2.RankRequest.FromString, _as_is),
            "RankBatch": grpc.unary_unary_rpc_method_handler(
                service.RankBatch, ranking_pb2.RankBatchRequest.FromString, _as_is
            ),
            "Explain": grpc.unary_unary_rpc_method_handler(
                service.Explain,
                ranking_pb2.ExplainRequest.FromString,
                ranking_pb2.ExplainResponse.SerializeToString,
            ),
        },
    )


def ingest_handler(service: IngestService) -> grpc.GenericRpcHandler:
    """Publish takes bytes: they go to the log as they came, and a malformed batch gets our own status."""
    return grpc.method_handlers_generic_handler(
        ingest_pb2.DESCRIPTOR.services_by_name["Ingest"].full_name,
        {
            "Publish": grpc.stream_stream_rpc_method_handler(
                service.Publish, _as_is, ingest_pb2.PublishAck.SerializeToString
            )
        },
    )
