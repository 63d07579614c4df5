"""A whole server process at its most talkative: nothing secret and no viewer in its log, metrics or audit log."""

from __future__ import annotations

import contextlib
import json
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest
from liverank.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    ingest_pb2,
    ingest_pb2_grpc,
    liveness_pb2,
    liveness_pb2_grpc,
    ranking_pb2,
    ranking_pb2_grpc,
)

from loadtest.processes import start_server
from server.clock import SystemClock
from tests.app import SMALL, put_current_model
from tests.certificates import Authority
from tests.events import event, started
from tests.secured import HASHES, TOKENS, channel, write_access

VIEWER, REQUEST = "viewer-MARKED-4711", "request-MARKED-4712"


def calls(made: grpc.Channel, now_ms: int) -> None:
    """Good and bad calls of every kind with a viewer's id wherever one fits."""
    ranking, admin = ranking_pb2_grpc.RankingStub(made), admin_pb2_grpc.AdminStub(made)
    ingest, liveness = ingest_pb2_grpc.IngestStub(made), liveness_pb2_grpc.LivenessStub(made)
    events = [
        started("s", 1, now_ms),
        event("s", 2, now_ms, viewer=VIEWER, chatted={}),
        event("s", 3, 0, viewer=VIEWER, liked={}),
        event("s", 4, now_ms, viewer=VIEWER * 20, liked={}),
        event("s", 5, now_ms, viewer=VIEWER, bid={"amount_minor": 1, "currency": VIEWER}),
    ]
    batch = ingest_pb2.EventBatch(producer_id="p", events=events)
    good = ranking_pb2.RankRequest(viewer_id=VIEWER, request_id=REQUEST)
    bad = ranking_pb2.RankRequest(viewer_id=VIEWER * 20, request_id=REQUEST)
    for call in (
        lambda: list(ingest.Publish(iter([batch]), timeout=10.0)),
        lambda: ranking.Rank(good, timeout=10.0),
        lambda: ranking.Rank(good, timeout=0.000_001),
        lambda: ranking.Rank(bad, timeout=10.0),
        lambda: ranking.RankBatch(ranking_pb2.RankBatchRequest(requests=[good, bad]), timeout=10.0),
        lambda: ranking.Explain(ranking_pb2.ExplainRequest(request=good, stream_id="s"), timeout=10.0),
        lambda: ranking.Explain(ranking_pb2.ExplainRequest(request=good, stream_id="ghost"), timeout=10.0),
        lambda: liveness.CheckLive(liveness_pb2.CheckLiveRequest(), timeout=10.0),
        lambda: admin.BlockStream(admin_pb2.BlockStreamRequest(stream_id="s", reason="spam"), timeout=10.0),
        lambda: admin.ReloadRules(admin_pb2.ReloadRulesRequest(), timeout=10.0),
        lambda: made.unary_unary("/liverank.v1.Ranking/Rank")(b"\x12\xff" + VIEWER.encode(), timeout=10.0),
        lambda: made.unary_unary("/liverank.v1.Ranking/Nothing")(VIEWER.encode(), timeout=10.0),
    ):
        with contextlib.suppress(grpc.RpcError):
            call()


def test_neither_log_nor_metrics_nor_audit_tell_secrets_or_viewers(tmp_path: Path) -> None:
    put_current_model(tmp_path / "models")
    cert, key = Authority(tmp_path / "ca", "ca").issue("server")
    access = write_access(tmp_path / "access.toml", *TOKENS, producer_ids=["p"])
    roles = access.read_text().replace('["admin"]', '["admin", "reader", "producer"]', 1)
    access.write_text(roles)
    audit = tmp_path / "audit.jsonl"
    settings: dict[str, dict[str, Any]] = {
        "table": SMALL,
        "scoring": {"mode": "local", "model_repository": str(tmp_path / "models")},
        "security": {
            "cert_file": str(cert), "key_file": str(key), "access_file": str(access), "audit_file": str(audit),
            "reload_ms": 20,
        },
    }  # fmt: skip
    server = start_server(tmp_path / "server", settings, options=("--log-level", "debug"))
    try:
        port = int(server.address.rpartition(":")[2])
        ca = tmp_path / "ca" / "ca.pem"
        for token in (TOKENS["admin"], TOKENS["reader"], TOKENS["admin"] + "wrong", None):
            with channel(port, token, ca_file=ca) as made:
                calls(made, SystemClock().now_ms())
        access.write_text(f"{roles}\nhashes = 'twice'")  # a reload that fails over a line with a hash in it
        metrics = urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=10.0).read()
    finally:
        assert server.stop() == 0
    assert "INTERNAL" not in server.log.read_text() and "Traceback" not in server.log.read_text()
    told = server.log.read_text() + metrics.decode() + audit.read_text()
    assert " DEBUG " in server.log.read_text() and "blocked 's'" in told, "or this proves nothing"
    assert json.loads(audit.read_text().partition("\n")[0])["who"] == "token:admin"
    secrets = [*TOKENS.values(), *(token.split(".")[1] for token in TOKENS.values()), *HASHES.values()]
    for marked in (*secrets, *key.read_text().splitlines()[1:-1], VIEWER, REQUEST):
        assert marked not in told, marked[:12]


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
def test_an_open_server_on_a_public_address_does_not_start(tmp_path: Path, host: str) -> None:
    from server.__main__ import main

    config = tmp_path / "liverank.toml"
    config.write_text(f'[serve]\nhost = "{host}"\n')
    assert main(["serve", "--config", str(config)]) == 2
