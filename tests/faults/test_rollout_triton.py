"""Rollouts on a real Triton under explicit model control: what serves is never disturbed, what is lost comes back."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from liverank.v1 import admin_pb2 as pb
from liverank.v1 import ranking_pb2

from server.clock import SystemClock
from tests import triton_server as ts
from tests.app import Client, running_app, status_of
from tests.rollout import WHY, checked, files_of, lattice_net, put_lattice, settings, some_streams

LEASE = {"lease_ms": 600_000, "grace_ms": 600_000, "capacity": 256, "embedding_dim": 4}


@contextmanager
def serving(folder: Path, triton: ts.RunningTriton, **rollout: Any) -> Iterator[Client]:
    """A server on this Triton that refreshes every 100 ms of real time, with streams, scored by a model."""
    sections = settings(folder, **rollout)
    scoring = {
        "mode": "triton", "triton_address": triton.address, "model_repository": str(folder / "models"),
        "refresh_ms": 100, "deadline_ms": 2_000, "breaker_open_ms": 200,
    }  # fmt: skip
    with running_app(folder, clock=SystemClock(), scoring=scoring, table=LEASE, **sections) as client:
        yield client


def by_model(client: Client) -> None:
    """Waits until replies are a model's."""
    request = ranking_pb2.RankRequest(viewer_id="v", limit=30)

    def is_scored() -> bool:
        reply = client.ranking.Rank(request, timeout=10.0)
        return reply.degradation.level == 0 and "/" in reply.model_version

    ts.eventually(is_scored, what="a model's scores")


class Asking:
    """Asks all the time, for many viewers; counts versions, keeps what went wrong."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.versions: Counter[str] = Counter()
        self.degraded: Counter[str] = Counter()
        self.faults: list[str] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        viewer = 0
        while not self._over.wait(0.005):
            viewer += 1
            versions = self.versions
            try:
                request = ranking_pb2.RankRequest(viewer_id=f"v{viewer % 200}", limit=30)
                reply = self._client.ranking.Rank(request, timeout=10.0)
                if "/" in reply.model_version:
                    versions[checked(reply)] += 1
                self.degraded[ranking_pb2.Degradation.Level.Name(reply.degradation.level)] += 1
            except (grpc.RpcError, AssertionError) as error:
                self.faults.append(str(error))

    def forget(self) -> None:
        """From now on ``versions`` counts replies to what was asked from now on."""
        self.versions = Counter()

    def __enter__(self) -> Asking:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def rollout(client: Client) -> pb.Rollout:
    return client.admin.ListModels(pb.ListModelsRequest(), timeout=10.0).models[0].rollout


def push(client: Client, version: int, **given: Any) -> pb.PushModelResponse:
    wanted = {"files": files_of(lattice_net(version)), "why": WHY, **given}
    return client.admin.PushModel(pb.PushModelRequest(version=version, **wanted), timeout=90.0)


def canary(client: Client, version: int, *steps: float) -> None:
    for percent in steps:
        client.admin.CanaryModel(pb.CanaryModelRequest(version=version, percent=percent, why=WHY), timeout=10.0)


def seen(asking: Asking, version: str) -> None:
    before = asking.versions[version]
    ts.eventually(lambda: asking.versions[version] > before + 5, what=f"{version} serves")


def test_the_whole_way_and_bad_pushes_disturb_nobody(tmp_path: Path) -> None:
    put_lattice(tmp_path / "models")
    with (
        ts.running_triton(tmp_path / "models", tmp_path / "triton.log", "trendiness") as triton,
        serving(tmp_path, triton) as client,
    ):
        some_streams(client)
        by_model(client)
        with Asking(client) as asking:
            with pytest.raises(grpc.RpcError) as refused:
                push(client, 2, files=files_of(b"no graph"))
            assert status_of(refused.value)[0] == "FAILED_PRECONDITION"
            assert rollout(client).candidate == 0
            took_s: list[float] = []
            while not took_s or (min(took_s) >= 1.0 and len(took_s) < 4):  # once may be slow on a busy machine
                asking.forget()
                new = 2 + 2 * len(took_s)
                push(client, new)
                canary(client, new, 1, 10, 100)
                seen(asking, f"trendiness/{new}")
                client.admin.PromoteModel(pb.PromoteModelRequest(version=new, why=WHY), timeout=10.0)
                seen(asking, f"trendiness/{new}")
                push(client, new + 1)
                canary(client, new + 1, 1)
                began_s = time.monotonic()
                client.admin.RollbackModel(pb.RollbackModelRequest(why=WHY), timeout=10.0)
                client.admin.RollbackModel(pb.RollbackModelRequest(why="both of them"), timeout=10.0)
                took_s.append(time.monotonic() - began_s)
                asking.forget()
                seen(asking, "trendiness/1")
                assert set(asking.versions) == {"trendiness/1"}
            assert min(took_s) < 1.0, f"seconds that two rollbacks took: {took_s}"
        assert set(asking.versions) == {"trendiness/1"}
        assert not asking.faults, asking.faults[:3]
        assert set(asking.degraded) == {"NONE"}


def test_a_push_that_triton_cannot_end_is_taken_out_again(tmp_path: Path) -> None:
    """Once because Triton cannot load the version, once because it dies while it does."""
    put_lattice(tmp_path / "models")
    with (
        ts.running_triton(tmp_path / "models", tmp_path / "triton.log", "trendiness") as triton,
        serving(tmp_path, triton) as client,
    ):
        some_streams(client)
        by_model(client)
        config = tmp_path / "models" / "trendiness" / "config.pbtxt"
        good = config.read_text()
        config.write_text(good.replace(ts.SCHEMA, "x").replace('name: "trend"', 'name: "other"'))
        with Asking(client) as asking:
            with pytest.raises(grpc.RpcError, match="trendiness/2: "):
                push(client, 2)
            config.write_text(good)
            ts.eventually(lambda: asking.versions["trendiness/1"] > 20)
            left = sorted(path.name for path in config.parent.iterdir())
            assert left == ["1", "config.pbtxt"]

            request = pb.PushModelRequest(version=2, files=files_of(lattice_net(2)), why=WHY)
            pushing = client.admin.PushModel.future(request, timeout=90.0)
            ts.eventually((config.parent / "2").exists, what="Triton is about to load it")
            triton.kill()
            ts.finish(triton.runner, None)
            assert status_of(pushing.exception(90.0))[0] == "FAILED_PRECONDITION"
            ts.eventually(lambda: asking.degraded["LAST_GOOD"] + asking.degraded["FORMULA"] > 0)
            with ts.running_triton(tmp_path / "models", tmp_path / "again.log", "trendiness", port=triton.port):
                by_model(client)
                seen(asking, "trendiness/1")
                assert push(client, 2).rollout.candidate == 2
        assert set(asking.versions) == {"trendiness/1"} and not asking.faults, asking.faults[:3]


def test_a_triton_restarted_in_a_canary_gets_back_what_it_lost(tmp_path: Path) -> None:
    """Left to itself it would load the two newest versions, of which the one that serves is none."""
    put_lattice(tmp_path / "models")
    port = 0
    with ts.running_triton(tmp_path / "models", tmp_path / "triton.log", "trendiness") as triton:
        port = triton.port
        with serving(tmp_path, triton, max_failures=100) as client:
            some_streams(client)
            by_model(client)
            put_lattice(tmp_path / "models", 2, seed=7)
            push(client, 4)
            canary(client, 4, 1, 10)
            with Asking(client) as asking:
                seen(asking, "trendiness/4")
                triton.kill()
                ts.finish(triton.runner, None)
                ts.eventually(lambda: asking.degraded["LAST_GOOD"] + asking.degraded["FORMULA"] > 5)
                with ts.running_triton(tmp_path / "models", tmp_path / "again.log", "trendiness", port=port):
                    ts.eventually(lambda: client.app.metrics.rollout_mends.labels("trendiness")._value.get() >= 1)
                    by_model(client)
                    asking.forget()
                    seen(asking, "trendiness/1")
                    seen(asking, "trendiness/4")
                    assert rollout(client).stage == "canary"
                    assert set(asking.versions) == {"trendiness/1", "trendiness/4"}
            assert not asking.faults, asking.faults[:3]
