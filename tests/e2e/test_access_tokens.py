"""Tokens that come and go: what that does to calls, and to streams that are open."""

from __future__ import annotations

import contextlib
import json
import queue
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2_grpc
from liverank.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    liveness_pb2,
    liveness_pb2_grpc,
)

from server.clock import ManualClock
from tests.app import serving_app, status_of
from tests.events import T0, event, started
from tests.secured import TOKENS, Publisher, allowed, channel, write_access
from tests.triton_server import eventually


def test_tokens_change_without_a_restart_and_a_broken_file_changes_nothing(tmp_path: Path) -> None:
    access = write_access(tmp_path / "access.toml", "reader")
    settings = {"access_file": str(access), "reload_ms": 20, "audit_file": str(tmp_path / "audit.jsonl")}
    with serving_app(tmp_path, security=settings) as app:
        assert allowed(app, "reader") and not allowed(app, "admin")
        metric = app.metrics.security_reloads.labels("access", "failed")
        access.write_text("[token.reader]\nroles = ['root']")
        eventually(lambda: metric._value.get() == 1, what="the broken file was seen")
        assert allowed(app, "reader")
        write_access(access, "other", certificates={"x": ["reader"]}, roles_of_nobody=[])  # an unknown key
        eventually(lambda: metric._value.get() == 2, what="the second broken file was seen")
        assert allowed(app, "reader")
        access.unlink()
        eventually(lambda: metric._value.get() == 3, what="the missing file was seen")
        assert allowed(app, "reader")
        write_access(access, "admin")
        eventually(lambda: not allowed(app, "reader"), what="the old token is refused")
        with channel(app.port, TOKENS["admin"]) as made:
            assert admin_pb2_grpc.AdminStub(made).Status(admin_pb2.StatusRequest(), timeout=10.0).version
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    outcomes = [line["outcome"] for line in lines if line["what"] == "reload:access"]
    assert outcomes == ["failed", "failed", "failed", "ok"]


def revocable(folder: Path) -> tuple[Path, dict[str, Any]]:
    """An access file that is looked at only when the test says so."""
    access = write_access(folder / "access.toml", "reader", "producer", "admin", producer_ids=["p"])
    return access, {"access_file": str(access), "reload_ms": 3_600_000}


def test_a_revoked_token_ends_a_busy_stream_at_its_next_message(tmp_path: Path) -> None:
    access, settings = revocable(tmp_path)
    with serving_app(tmp_path, security=settings) as app, channel(app.port, TOKENS["producer"]) as made:
        publisher = Publisher(made)
        assert publisher.send(started("s", 0), producer="p").accepted == 1
        with channel(app.port, TOKENS["reader"]) as other:
            watch = liveness_pb2_grpc.LivenessStub(other).WatchEnded(liveness_pb2.WatchEndedRequest())
            watch.initial_metadata()
            write_access(access, "admin", "other", producer_ids=["p"])
            app.gate.look()
            with pytest.raises(grpc.RpcError) as refused:
                publisher.send(event("s", 0, epoch=1, ended={}), producer="p")
            assert status_of(refused.value)[0] == "UNAUTHENTICATED"
            with channel(app.port, TOKENS["other"]) as third:
                late = Publisher(third)
                assert late.send(event("s", 0, epoch=1, ended={}), producer="p").accepted == 0, "its number is used"
                assert late.send(event("s", 0, epoch=1, ended={}), producer="p").accepted == 1
                late.close()
            with pytest.raises(grpc.RpcError) as refused:  # the end is not told to it any more
                next(watch)
            assert status_of(refused.value)[0] == "UNAUTHENTICATED"


def test_a_revoked_token_ends_idle_streams_within_two_looks(tmp_path: Path) -> None:
    access, settings = revocable(tmp_path)
    with contextlib.ExitStack() as stack:
        app = stack.enter_context(serving_app(tmp_path, security=settings))
        one, two = (stack.enter_context(channel(app.port, TOKENS[name])) for name in ("producer", "reader"))
        publisher = Publisher(one, within_s=10.0)
        publisher.send(started("s", 0), producer="p")
        watch = liveness_pb2_grpc.LivenessStub(two).WatchEnded(liveness_pb2.WatchEndedRequest(), timeout=10.0)
        watch.initial_metadata()
        reflect = reflection_pb2_grpc.ServerReflectionStub(two).ServerReflectionInfo(
            iter(queue.SimpleQueue[Any]().get, None), timeout=10.0
        )
        eventually(lambda: len(app.gate._grants) == 3, what="all three are open")
        app.gate.look()
        assert len(app.gate._grants) == 3, "nothing has changed yet"
        write_access(access, "admin", producer_ids=["p"])
        app.gate.look()
        app.gate.look()
        for call in (publisher.acks, watch, reflect):
            with pytest.raises(grpc.RpcError) as ended:
                next(call)
            assert status_of(ended.value)[0] == "CANCELLED"
        eventually(lambda: not app.gate._grants and not app.gate._open, what="the server has let go of them")
        publisher.close()


def test_a_token_that_loses_a_role_or_expires_ends_its_streams_too(tmp_path: Path) -> None:
    access, settings = revocable(tmp_path)
    clock = ManualClock(T0)
    write_access(access, "producer", "reader", producer_ids=["p"])
    access.write_text(access.read_text() + "expires = 2023-11-14T22:13:30Z\n")  # of the reader: T0 + 10 s
    with serving_app(tmp_path, clock, security=settings) as app, channel(app.port, TOKENS["reader"]) as made:
        watch = liveness_pb2_grpc.LivenessStub(made).WatchEnded(liveness_pb2.WatchEndedRequest())
        watch.initial_metadata()
        app.gate.look()
        assert watch.is_active() and allowed(app, "reader")
        clock.advance(10_000)
        assert not allowed(app, "reader")
        app.gate.look()
        app.gate.look()
        with pytest.raises(grpc.RpcError):
            next(watch)
