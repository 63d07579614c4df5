"""Handlers that leave messages as bytes where we read or write the wire ourselves."""

from __future__ import annotations

import grpc
from liverank.v1 import ingest_pb2

from server.rpc.ingest import IngestService


def _as_is(payload: bytes) -> bytes:
    return payload


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
