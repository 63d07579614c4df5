"""Access files, tokens and channels for tests of a server that asks who calls."""

from __future__ import annotations

import json
import queue
from pathlib import Path
from typing import Any

import grpc
from liverank.v1 import ingest_pb2, ingest_pb2_grpc, liveness_pb2, liveness_pb2_grpc

from server.app import App
from server.channel import client_settings, open_channel
from server.security.tokens import hash_token, new_token

TOKENS = {name: new_token(name) for name in ("reader", "producer", "admin", "other", "moderator")}
HASHES = {name: hash_token(token) for name, token in TOKENS.items()}
REFUSED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
ROLES = {"other": ["producer"], "moderator": ["producer", "admin"]}


def write_access(path: Path, *names: str, certificates: dict[str, list[str]] | None = None, **more: Any) -> Path:
    """An access file with the tokens of `TOKENS`, each with the role of its name; ``more`` goes into each entry."""
    lines = []
    for name in names:
        lines += [f"[token.{name}]", f"hashes = {json.dumps([HASHES[name]])}"]
        lines += [f"roles = {json.dumps(ROLES.get(name, [name]))}"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in more.items()]
    for name, roles in (certificates or {}).items():
        lines += [f"[certificate.{json.dumps(name)}]", f"roles = {json.dumps(roles)}"]
    beside = path.with_suffix(".new")
    beside.write_text("\n".join(lines) + "\n")
    beside.replace(path)
    return path


def channel(port: int, token: str | None = None, **given: Any) -> grpc.Channel:
    """A channel to a server on this machine."""
    return open_channel(f"127.0.0.1:{port}", client_settings(token=token, **given))


def allowed(app: App, name: str) -> bool:
    """Whether its token lets a reader's call through."""
    with channel(app.port, TOKENS[name]) as made:
        try:
            liveness_pb2_grpc.LivenessStub(made).CheckLive(liveness_pb2.CheckLiveRequest(), timeout=10.0)
        except grpc.RpcError as error:
            if error.code() not in REFUSED:  # type: ignore[attr-defined]
                raise
            return False
    return True


class Publisher:
    """An open Publish call."""

    def __init__(self, made: grpc.Channel, within_s: float = 60.0) -> None:
        self.outbox: queue.SimpleQueue[ingest_pb2.EventBatch | None] = queue.SimpleQueue()
        self.acks = ingest_pb2_grpc.IngestStub(made).Publish(iter(self.outbox.get, None), timeout=within_s)
        self.sequence = 0

    def send(self, *events: ingest_pb2.Event, producer: str) -> ingest_pb2.PublishAck:
        for one in events:
            self.sequence += 1
            one.sequence = self.sequence
        self.outbox.put(ingest_pb2.EventBatch(producer_id=producer, events=events))
        return next(self.acks)

    def codes(self, *events: ingest_pb2.Event, producer: str) -> list[int]:
        """The reject code of each event; 0 applied."""
        ack = self.send(*events, producer=producer)
        codes = {r.index: r.code for r in ack.rejected}
        return [codes.get(i, 0) for i in range(len(events))]

    def close(self) -> None:
        self.outbox.put(None)
