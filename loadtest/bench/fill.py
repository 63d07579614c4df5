"""Fills a running liverank server with a catalogue and waits until it serves as it would in service."""

from __future__ import annotations

import threading
import time

import grpc
from liverank.v1 import admin_pb2, admin_pb2_grpc, ingest_pb2_grpc

from loadtest.bench.catalogue import Catalogue, event_batches

WITHIN_S = 120.0


def fill(channel: grpc.Channel, catalogue: Catalogue) -> float:
    """Publishes every stream; returns the events applied per second, serialisation left out.

    Raises:
        RuntimeError: the server refused an event.
    """
    batches = list(event_batches(catalogue, int(time.time() * 1000)))
    begun_s = time.monotonic()
    accepted: int = sum(ack.accepted for ack in ingest_pb2_grpc.IngestStub(channel).Publish(iter(batches)))
    wall_s = time.monotonic() - begun_s
    if accepted != (sent := sum(len(batch.events) for batch in batches)):
        raise RuntimeError(f"fill: the server accepted {accepted} of {sent} events")
    return accepted / wall_s


def wait_until_scored(channel: grpc.Channel) -> None:
    """Until a score refresh began a second or more after this call: every stream is assessed and scored.

    Raises:
        TimeoutError: that did not happen within two minutes.
    """
    admin = admin_pb2_grpc.AdminStub(channel)
    begun_ms = admin.Status(admin_pb2.StatusRequest()).now_ms
    ends_at_s = time.monotonic() + WITHIN_S
    pause = threading.Event()
    while time.monotonic() < ends_at_s:
        status = admin.Status(admin_pb2.StatusRequest())
        if status.now_ms - status.score_age_ms > begun_ms + 1_000:
            return
        pause.wait(0.1)
    raise TimeoutError(f"fill: scores not refreshed within {WITHIN_S:.0f} s")
