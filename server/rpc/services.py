"""The services of the port, for health and reflection."""

from __future__ import annotations

from liverank.v1 import admin_pb2, ingest_pb2, liveness_pb2, ranking_pb2

SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (ranking_pb2, "Ranking"),
        (liveness_pb2, "Liveness"),
        (ingest_pb2, "Ingest"),
        (admin_pb2, "Admin"),
    )
)
OTHER_THREADS = 16
"""Unary calls outside Ranking that are handled at once."""
