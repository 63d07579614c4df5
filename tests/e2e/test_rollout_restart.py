"""Rollouts and a server that starts again: it goes on where they stood."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from liverank.v1 import admin_pb2 as pb

from server.errors import BadScores, ConfigError
from server.rollout import shipping
from tests.app import running_app, status_of
from tests.rollout import (
    AT_ONCE_S,
    MODEL,
    WHY,
    canary,
    listed,
    push,
    refreshed,
    served,
    settings,
    some_streams,
)


@pytest.mark.parametrize("percent", [0.0, 100.0])
def test_a_restart_goes_on_where_the_rollout_stood(tmp_path: Path, percent: float) -> None:
    with running_app(tmp_path, **settings(tmp_path)) as client:
        some_streams(client)
        push(client)
        if percent:
            for step in (1, 10, 100):
                canary(client, step)
        before = listed(client).rollout
    with running_app(tmp_path, **settings(tmp_path)) as client:
        client.tick()
        assert client.app.shipping._resumed[MODEL].wait(10.0)
        after = listed(client).rollout
        assert (after.serving, after.candidate, after.stage, after.percent) == (1, 2, before.stage, before.percent)
        if percent:
            refreshed(client)
            assert set(served(client, 50).values()) == {"trendiness/2"}
        promoted = client.admin.PromoteModel(pb.PromoteModelRequest(version=2, force=True, why=WHY), timeout=10.0)
        assert promoted.rollout.serving == 2
    with running_app(tmp_path, **settings(tmp_path)) as client:
        client.tick()
        assert set(served(client, 50).values()) == {"trendiness/2"}
        assert client.app.metrics.model_versions.labels(MODEL, "serving")._value.get() == 2
        client.admin.RollbackModel(pb.RollbackModelRequest(why="after a restart, too"), timeout=AT_ONCE_S)
        assert set(served(client, 50).values()) == {"trendiness/1"}


def test_a_trial_that_began_before_the_first_look_is_not_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping, "LOOK_EVERY_S", 3_600.0)
    with running_app(tmp_path, **settings(tmp_path)) as client:
        some_streams(client)
        push(client)
        canary(client, 1)
        refreshed(client, 2)
        client.app.shipping.look(MODEL, client.app.shipping._paths[MODEL])
        assert listed(client).trial.refreshes == 2


def test_steps_after_a_restart_wait_for_what_was_loaded_before_it_and_a_rollback_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_app(tmp_path, **settings(tmp_path)) as client:
        some_streams(client)
        push(client)
        canary(client, 1)
    monkeypatch.setattr(shipping, "LOOK_EVERY_S", 3_600.0)
    monkeypatch.setattr(shipping, "RESUME_WAIT_S", 0.0)
    with running_app(tmp_path, **settings(tmp_path)) as client:
        client.tick()
        before = (tmp_path / "events.rollout.json").read_text()
        promotion = pb.PromoteModelRequest(version=2, force=True, why=WHY)
        for call in (
            lambda: push(client, 2),
            lambda: canary(client, 10),
            lambda: client.admin.ShadowModel(pb.ShadowModelRequest(version=2, why=WHY), timeout=10.0),
            lambda: client.admin.PromoteModel(promotion, timeout=10.0),
        ):
            with pytest.raises(grpc.RpcError, match="are not loaded yet; try again") as refused:
                call()
            assert status_of(refused.value)[0] == "FAILED_PRECONDITION"
        assert (tmp_path / "events.rollout.json").read_text() == before
        monkeypatch.setattr(shipping, "RESUME_WAIT_S", 10.0)
        promoting = client.admin.PromoteModel.future(promotion, timeout=20.0)
        client.app.shipping.look(MODEL, client.app.shipping._paths[MODEL])
        assert promoting.result(20.0).rollout.serving == 2
        assert set(served(client, 20).values()) == {"trendiness/2"}
        push(client, 3)
    with running_app(tmp_path, **settings(tmp_path)) as client:
        client.tick()
        back = client.admin.RollbackModel(pb.RollbackModelRequest(why=WHY), timeout=10.0).rollout
        assert (back.serving, back.previous, back.candidate) == (2, 1, 0)


@pytest.mark.parametrize("fails", [False, True])
def test_a_candidate_rolled_back_while_it_is_loaded_after_a_restart_takes_nothing_else_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    with running_app(tmp_path, **settings(tmp_path)) as client:
        some_streams(client)
        push(client)
        client.admin.PromoteModel(pb.PromoteModelRequest(version=2, force=True, why=WHY), timeout=10.0)
        push(client, 3)
        canary(client, 1, 3)
    monkeypatch.setattr(shipping, "LOOK_EVERY_S", 3_600.0)
    with running_app(tmp_path, **settings(tmp_path)) as client:
        client.tick()
        path = client.app.shipping._paths[MODEL]
        warm = path.warm

        def rolled_back_meanwhile(version: int) -> object:
            client.admin.RollbackModel(pb.RollbackModelRequest(why=WHY), timeout=10.0)
            if fails:
                raise BadScores("planted")
            return warm(version)

        monkeypatch.setattr(path, "warm", rolled_back_meanwhile)
        for _ in range(2):
            client.app.shipping.look(MODEL, path)
        assert client.app.shipping._resumed[MODEL].is_set() and 3 not in path._opened
        after = listed(client).rollout
        assert (after.serving, after.previous, after.candidate) == (2, 1, 0)
        assert set(served(client, 20).values()) == {"trendiness/2"}


def test_a_rollout_file_that_cannot_be_read_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "events.rollout.json").write_text('{"format": 1, "models": {"trendiness": {"serving": 1}}}')
    told = r"rollout.file: .*events.rollout.json cannot be used: keys serving, "
    with pytest.raises(ConfigError, match=told), running_app(tmp_path, **settings(tmp_path)):
        pass
