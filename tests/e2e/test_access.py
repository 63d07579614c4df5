"""Who may call what: every method of every service with every role."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from liverank.v1 import (
    liveness_pb2,
    liveness_pb2_grpc,
    ranking_pb2,
    ranking_pb2_grpc,
)

from server.app import SERVICES, App
from server.security.roles import ACCESS, Role
from tests.app import serving_app, status_of
from tests.secured import REFUSED, TOKENS, channel, write_access

HEALTH, REFLECTION = "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"
WANTED = {
    "Rank": "reader", "RankBatch": "reader", "Explain": "reader", "CheckLive": "reader", "WatchEnded": "reader",
    "Publish": "producer", "Reconcile": "producer",
    "Status": "admin", "BlockStream": "admin", "UnblockStream": "admin", "ReloadRules": "admin",
    "PushModel": "admin", "ShadowModel": "admin", "CanaryModel": "admin", "PromoteModel": "admin",
    "RollbackModel": "admin", "ListModels": "admin", "DiffModels": "admin",
    "Check": "nobody", "Watch": "nobody", "List": "nobody", "ServerReflectionInfo": "anybody known",
}  # fmt: skip


def methods() -> dict[str, Any]:
    """Every method of every service that a server answers, by its path, from the descriptors."""
    pool = descriptor_pool.Default()
    services = [pool.FindServiceByName(name) for name in (*SERVICES, HEALTH, REFLECTION)]
    return {f"/{service.full_name}/{method.name}": method for service in services for method in service.methods}


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    folder = tmp_path_factory.mktemp("secured")
    access = write_access(folder / "access.toml", *TOKENS, producer_ids=["*"])
    with serving_app(folder, security={"access_file": str(access)}) as app:
        yield app


def outcome(app: App, path: str, method: Any, token: str | None) -> grpc.StatusCode:
    """The status of a call with an empty message; OK as soon as a stream was let in."""
    with channel(app.port, token) as made:
        try:
            if not method.server_streaming:
                made.unary_unary(path)(b"", timeout=10.0)
            elif method.client_streaming:
                list(made.stream_stream(path)(iter([b""]), timeout=10.0))
            else:
                call = made.unary_stream(path)(b"", timeout=10.0)
                if path.endswith("/WatchEnded"):
                    call.initial_metadata()
                    if call.is_active():
                        call.cancel()
                        return grpc.StatusCode.OK
                next(call)
                call.cancel()
        except grpc.RpcError as error:
            return error.code()  # type: ignore[attr-defined, no-any-return]
    return grpc.StatusCode.OK


@pytest.mark.parametrize("path", sorted(methods()))
def test_every_method_is_open_to_its_role_only(secured: App, path: str) -> None:
    method, wanted = methods()[path], WANTED[path.rpartition("/")[2]]
    assert (outcome(secured, path, method, None) is grpc.StatusCode.UNAUTHENTICATED) == (wanted != "nobody")
    assert (outcome(secured, path, method, "reader.wrong") is grpc.StatusCode.UNAUTHENTICATED) == (wanted != "nobody")
    for role in Role:
        status = outcome(secured, path, method, TOKENS[str(role)])
        if wanted in (str(role), "nobody", "anybody known"):
            assert status not in REFUSED, (role, status)
        else:
            assert status is grpc.StatusCode.PERMISSION_DENIED, (role, status)


def test_every_method_that_is_served_has_its_roles_written_down(secured: App) -> None:
    with channel(secured.port, TOKENS["admin"]) as made:
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (reply,) = reflection_pb2_grpc.ServerReflectionStub(made).ServerReflectionInfo(iter([request]), timeout=10.0)
    pool = descriptor_pool.Default()
    served = {
        f"/{service.name}/{method.name}"
        for service in reply.list_services_response.service
        for method in pool.FindServiceByName(service.name).methods
    }
    assert served == set(ACCESS) == set(methods()), "give a new method its roles in server/security/roles.py"


def test_a_method_without_roles_is_refused_even_where_anybody_may_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(ACCESS, "/liverank.v1.Ranking/Rank")
    with serving_app(tmp_path) as app, channel(app.port) as made, pytest.raises(grpc.RpcError) as refused:
        ranking_pb2_grpc.RankingStub(made).Rank(ranking_pb2.RankRequest(), timeout=10.0)
    assert status_of(refused.value)[0] == "PERMISSION_DENIED"


def test_nothing_is_parsed_before_the_caller_is_known(secured: App) -> None:
    for path, method in methods().items():
        if not method.server_streaming and WANTED[path.rpartition("/")[2]] != "nobody":
            with channel(secured.port) as made, pytest.raises(grpc.RpcError) as refused:
                made.unary_unary(path)(b"\xff\xff\xff", timeout=10.0)
            assert status_of(refused.value)[0] == "UNAUTHENTICATED"


def test_two_authorizations_and_other_schemes_are_refused(secured: App) -> None:
    token = TOKENS["reader"]
    with channel(secured.port) as made:
        check = liveness_pb2_grpc.LivenessStub(made).CheckLive
        request = liveness_pb2.CheckLiveRequest()
        good = ("authorization", f"bearer {token}")
        check(request, metadata=[good], timeout=10.0)
        wrong = [[good, good], [("authorization", token)], [("authorization", f"Basic {token}")]]
        for metadata in (*wrong, [("authorization", "Bearer ")], [("authorization", f"Bearer  {token}")]):
            with pytest.raises(grpc.RpcError) as refused:
                check(request, metadata=metadata, timeout=10.0)
            assert status_of(refused.value)[0] == "UNAUTHENTICATED"


def test_texts_of_any_length_come_back_in_no_error(secured: App) -> None:
    with channel(secured.port, TOKENS["reader"]) as made:
        stub = ranking_pb2_grpc.RankingStub(made)
        for name in ("request_id", "viewer_id", "region", "surface"):
            with pytest.raises(grpc.RpcError, match=f"{name}: at most 64 bytes allowed, got 100000"):
                stub.Rank(ranking_pb2.RankRequest(**{name: "x" * 100_000}), timeout=10.0)
        with pytest.raises(grpc.RpcError, match="viewer_embedding: a length of 0, or from 1e-06 to 1e\\+06, wanted"):
            stub.Rank(ranking_pb2.RankRequest(viewer_embedding=[1e30] * 4), timeout=10.0)
