"""What the audit log and the metrics tell of calls."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import grpc
import pytest
from liverank.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    liveness_pb2,
    liveness_pb2_grpc,
)

from tests.app import serving_app
from tests.events import T0
from tests.secured import TOKENS, channel, write_access


def test_the_audit_log_tells_who_changed_what_and_what_came_of_it(tmp_path: Path) -> None:
    access = write_access(tmp_path / "access.toml", *TOKENS, producer_ids=["*"])
    audit = tmp_path / "logs" / "audit.jsonl"
    with serving_app(tmp_path, security={"access_file": str(access), "audit_file": str(audit)}) as app:
        with channel(app.port, TOKENS["admin"]) as made:
            admin = admin_pb2_grpc.AdminStub(made)
            request = admin_pb2.BlockStreamRequest(stream_id="ghost", reason="spam")
            with pytest.raises(grpc.RpcError):
                admin.BlockStream(request, timeout=10.0)
            admin.ReloadRules(admin_pb2.ReloadRulesRequest(), timeout=10.0)
            with pytest.raises(grpc.RpcError, match="reason: at most 256 bytes"):
                admin.BlockStream(admin_pb2.BlockStreamRequest(stream_id="s", reason="x" * 257), timeout=10.0)
            with pytest.raises(grpc.RpcError):
                made.unary_unary("/liverank.v1.Admin/BlockStream")(b"\xff", timeout=10.0)
        with channel(app.port, TOKENS["producer"]) as made:
            ids = [f"s{i}" for i in range(20)]
            request = liveness_pb2.ReconcileRequest(as_of_ms=T0, live_stream_ids=ids, source="media")
            liveness_pb2_grpc.LivenessStub(made).Reconcile(request, timeout=10.0)
            liveness = liveness_pb2_grpc.LivenessStub(made)
            with pytest.raises(grpc.RpcError, match="source: at most 64 bytes"):
                liveness.Reconcile(liveness_pb2.ReconcileRequest(as_of_ms=T0, source="x" * 65), timeout=10.0)
        for token in (TOKENS["reader"], None, "reader.wrong"):
            with channel(app.port, token) as made, pytest.raises(grpc.RpcError):
                admin_pb2_grpc.AdminStub(made).Status(admin_pb2.StatusRequest(), timeout=10.0)
        seen = urllib.request.urlopen(f"http://127.0.0.1:{app.metrics_port}/metrics", timeout=10.0).read().decode()
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    assert [(line["who"], line["what"].rpartition("/")[2], line["outcome"]) for line in lines] == [
        ("token:admin", "BlockStream", "NOT_FOUND"),
        ("token:admin", "ReloadRules", "OK"),
        ("token:admin", "BlockStream", "INVALID_ARGUMENT"),
        ("token:admin", "BlockStream", "INVALID_ARGUMENT"),
        ("token:producer", "Reconcile", "OK"),
        ("token:producer", "Reconcile", "INVALID_ARGUMENT"),
        ("token:reader", "Status", "PERMISSION_DENIED"),  # who is nobody leaves no line, so nobody can fill the file
    ]
    assert lines[0]["request"] == {"stream_id": "ghost", "reason": "spam"} and "ghost" in lines[0]["detail"]
    assert len(lines[2]["request"]["reason"]) == 256
    assert lines[4]["request"] == {"as_of_ms": T0, "live_stream_ids_count": 20, "source": "media"}
    assert 'liverank_auth_refused_total{reason="unauthenticated"} 2.0' in seen
    assert 'liverank_auth_refused_total{reason="forbidden"} 1.0' in seen
