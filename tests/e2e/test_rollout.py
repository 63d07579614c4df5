"""From push to rollback on a serving app with an in-process model: which steps are taken, and what stays."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from liverank.v1 import admin_pb2 as pb

from loadtest.faults.nets import all_nan, on_lattice, one_row_short, small_net, two_columns_out
from server.errors import ScorerUnavailable
from tests.app import FEATURES, Client, running_app, status_of
from tests.rollout import (
    AT_ONCE_S,
    METRICS,
    MODEL,
    WHY,
    canary,
    ended,
    files_of,
    lattice_net,
    listed,
    push,
    refreshed,
    served,
    settings,
    some_streams,
)
from tests.triton_server import eventually


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with running_app(tmp_path, **settings(tmp_path)) as running:
        some_streams(running)
        yield running


def test_a_version_goes_the_whole_way_and_comes_back(client: Client) -> None:
    assert set(served(client).values()) == {"trendiness/1"}
    pushed = push(client)
    assert (pushed.rollout.serving, pushed.rollout.candidate, pushed.rollout.stage) == (1, 2, "pushed")
    assert dict(pushed.version.metrics) == METRICS
    (candidate,) = (version for version in listed(client).versions if version.version == 2)
    assert candidate.feature_schema == FEATURES.schema and dict(candidate.metrics) == METRICS
    assert list(candidate.roles) == ["candidate"]
    client.tick()
    assert set(served(client).values()) == {"trendiness/1"}, "a new folder is there, and serves nobody"

    client.admin.ShadowModel(pb.ShadowModelRequest(version=2, why=WHY), timeout=10.0)
    refreshed(client, 3)
    assert set(served(client).values()) == {"trendiness/1"}
    trial = listed(client).trial
    assert trial.refreshes == 3 and trial.failures == 0
    assert trial.agreement.rows == 60 and trial.agreement.rank_correlation > 0.99 and trial.agreement.top10 == 1.0
    assert 0 < trial.drift < 0.1 and trial.agreement.calibration_gap == pytest.approx(0.001, abs=1e-4)

    canary(client, 1)
    canary(client, 10)
    refreshed(client)
    tenth = {viewer for viewer, version in served(client).items() if version == "trendiness/2"}
    assert 5 <= len(tenth) <= 40
    refreshed(client)
    assert tenth == {viewer for viewer, version in served(client).items() if version == "trendiness/2"}
    canary(client, 100)
    assert set(served(client).values()) == {"trendiness/2"}
    promoted = client.admin.PromoteModel(pb.PromoteModelRequest(version=2, why=WHY), timeout=10.0).rollout
    assert (promoted.serving, promoted.previous, promoted.candidate, promoted.answering) == (2, 1, 0, 2)
    assert set(served(client).values()) == {"trendiness/2"}
    client.tick()
    assert set(served(client).values()) == {"trendiness/2"}

    back = client.admin.RollbackModel(pb.RollbackModelRequest(why="it was not"), timeout=AT_ONCE_S).rollout
    assert (back.serving, back.previous, back.answering) == (1, 0, 1)
    assert set(served(client).values()) == {"trendiness/1"}
    client.tick()
    assert set(served(client).values()) == {"trendiness/1"}
    with pytest.raises(grpc.RpcError) as refused:
        client.admin.RollbackModel(pb.RollbackModelRequest(why=WHY), timeout=10.0)
    assert status_of(refused.value)[0] == "FAILED_PRECONDITION" and "nothing" not in listed(client).history[-1].why

    steps = [(entry.step, entry.outcome, entry.version, entry.why) for entry in listed(client).history]
    assert [step for step, outcome, *_ in steps if outcome == "OK"] == [
        "push", "shadow", "canary", "canary", "canary", "promote", "rollback",
    ]  # fmt: skip
    assert steps[-2] == ("rollback", "OK", 2, "it was not") and steps[-1][:2] == ("rollback", "REFUSED")
    assert {entry.who for entry in listed(client).history} == {"peer:127.0.0.1"}


BAD = {
    "unreadable": (files_of(b"\0garbage"), "model.onnx cannot be read"),
    "other_schema": (files_of(lattice_net(2)), "built for feature schema 'another'"),
    "no_schema": (files_of(small_net(2, len(FEATURES))), "built for feature schema '.none.'"),
    "narrow": (files_of(small_net(2, 5, FEATURES.schema)), "input features: shape"),
    "two_columns": (files_of(two_columns_out(len(FEATURES), FEATURES.schema)), "output trend: shape"),
    "short": (files_of(one_row_short(len(FEATURES), FEATURES.schema)), "does not run on 1 rows"),
    "nan": (files_of(all_nan(len(FEATURES), FEATURES.schema)), "not finite on the warm-up sample"),
    "no_metrics": (files_of(small_net(2, len(FEATURES), FEATURES.schema)), "auc of at least 0.6 wanted"),
    "below_the_gate": (files_of(lattice_net(2), b'{"auc": 0.55}'), "auc of at least 0.6 wanted.*0.55"),
    "not_a_number": (files_of(lattice_net(2), b'{"auc": NaN}'), "auc of at least 0.6 wanted.*nan"),
    "bad_facts": (files_of(lattice_net(2), b"{"), "metrics.json"),
    "strange_name": ([pb.ModelFile(name="../x", content=b"")], "files: .* are allowed"),
    "no_model": ([pb.ModelFile(name="metrics.json", content=b"{}")], "one of model.onnx and model.plan"),
}


def test_what_is_not_fit_is_refused_with_the_reason_and_leaves_nothing(client: Client, tmp_path: Path) -> None:
    other = lattice_net(2)
    del other.metadata_props[:]
    on = {"feature_schema": "another", "metric.auc": "0.9"}
    for key, value in on.items():
        entry = other.metadata_props.add()
        entry.key, entry.value = key, value
    bad = {**BAD, "other_schema": (files_of(other), BAD["other_schema"][1])}
    folder = tmp_path / "models" / MODEL
    for name, (files, told) in bad.items():
        with pytest.raises(grpc.RpcError, match=told) as refused:
            push(client, files=files)
        assert status_of(refused.value)[0] == "FAILED_PRECONDITION", name
        assert sorted(path.name for path in folder.iterdir()) == ["1", "config.pbtxt"], name
        assert listed(client).rollout.candidate == 0
    client.tick()
    assert set(served(client, 20).values()) == {"trendiness/1"}
    assert push(client).rollout.candidate == 2, "a good one is taken afterwards"
    lines = (tmp_path / "events.rollout.jsonl").read_text().splitlines()
    assert [json.loads(line)["outcome"] for line in lines] == ["REFUSED"] * len(bad) + ["OK"]


def test_a_version_in_the_repository_is_not_overwritten(client: Client) -> None:
    push(client)
    with pytest.raises(grpc.RpcError, match="serves already"):
        push(client, 1)
    with pytest.raises(grpc.RpcError, match="with other contents"):
        push(client, files=files_of(lattice_net(2, seed=9)))
    assert listed(client).rollout.candidate == 2, "the one that was pushed before is still the candidate"
    assert push(client).rollout.candidate == 2, "the same once more changes nothing"
    assert push(client, files=[]).rollout.candidate == 2, "and it can be named without being sent"
    with pytest.raises(grpc.RpcError, match="is not in the repository"):
        push(client, 7, files=[])


def test_steps_out_of_order_and_without_a_reason_are_refused(client: Client) -> None:
    push(client)
    for call, told in (
        (lambda: canary(client, 10), "1 comes before 10"),
        (lambda: canary(client, 3), "one of 1, 10, 100"),
        (lambda: canary(client, 1, version=3), "not the candidate"),
        (lambda: client.admin.PromoteModel(pb.PromoteModelRequest(version=2, why=WHY)), "canary of 100 %"),
        (lambda: client.admin.RollbackModel(pb.RollbackModelRequest(why=" ")), "why: a reason"),
        (lambda: push(client, why=""), "why: a reason"),
        (lambda: client.admin.ListModels(pb.ListModelsRequest(model="ranker")), "trendiness wanted"),
    ):
        with pytest.raises(grpc.RpcError, match=told):
            call()
    forced = client.admin.PromoteModel(pb.PromoteModelRequest(version=2, force=True, why="urgent"), timeout=10.0)
    assert forced.rollout.serving == 2
    assert set(served(client, 20).values()) == {"trendiness/2"}


def test_a_canary_whose_scores_drift_ends_itself(client: Client) -> None:
    far = small_net(1, len(FEATURES))
    far.graph.node[-1].op_type = "HardSigmoid"  # other probabilities for the same logits
    on_lattice(far, False, FEATURES.schema, METRICS)
    push(client, files=files_of(far))
    canary(client, 1)
    refreshed(client, 3)
    last = ended(client)
    assert (last.who, last.outcome) == ("server", "OK") and last.why.startswith("drift: ")
    assert set(served(client, 100).values()) == {"trendiness/1"}
    assert client.app.metrics.rollbacks.labels(MODEL, "drift")._value.get() == 1


def test_a_fault_in_the_candidates_ranking_costs_no_reply_and_ends_the_canary(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(client)
    canary(client, 1)
    canary(client, 10)
    canary(client, 100)
    refreshed(client)

    def broken(*_: object) -> None:
        raise ValueError("planted")

    monkeypatch.setattr(client.app.engine.answerer.candidate, "reply_state", broken)
    assert set(served(client, 50).values()) == {"trendiness/1"}
    assert ended(client).why.startswith("errors: ")


def test_a_canary_climbs_by_itself_while_nothing_speaks_against_it(tmp_path: Path) -> None:
    with running_app(tmp_path, **settings(tmp_path, min_refreshes=1)) as client:
        some_streams(client)
        push(client)
        canary(client, 1, hold_ms=60_000)
        refreshed(client)
        assert listed(client).rollout.percent == 1
        client.clock.advance(59_000)
        assert listed(client).rollout.percent == 1
        client.clock.advance(1_000)
        eventually(lambda: listed(client).rollout.percent == 10, what="10 %")
        client.clock.advance(60_000)
        eventually(lambda: listed(client).rollout.percent == 100, what="100 %")
        client.clock.advance(600_000)
        assert listed(client).rollout.stage == "canary", "promoting is a decision of people"


def test_a_caller_who_goes_away_in_a_push_leaves_nothing_half_done(client: Client) -> None:
    pushing = client.admin.PushModel.future(pb.PushModelRequest(version=2, files=files_of(lattice_net(2)), why=WHY))
    pushing.cancel()
    with pytest.raises((grpc.FutureCancelledError, grpc.RpcError)):
        pushing.result(10.0)

    def settled() -> bool:
        rollout = listed(client).rollout
        return rollout.candidate == 2 or not client.app.shipping._pushing.locked()

    eventually(settled, what="the push is over")
    client.tick()
    assert set(served(client, 20).values()) == {"trendiness/1"}
    assert push(client).rollout.candidate == 2


def test_a_promotion_that_fails_leaves_the_rollout_and_its_file_as_they_were(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(client)
    before = (tmp_path / "events.rollout.json").read_text()

    def gone(version: int) -> None:
        raise ScorerUnavailable("Triton is gone")

    monkeypatch.setattr(client.app.shipping._paths[MODEL], "promote", gone)
    with pytest.raises(grpc.RpcError, match="was not promoted: Triton is gone"):
        client.admin.PromoteModel(pb.PromoteModelRequest(version=2, force=True, why=WHY), timeout=10.0)
    assert (tmp_path / "events.rollout.json").read_text() == before
    assert listed(client).rollout.serving == 1 and listed(client).rollout.candidate == 2
    assert set(served(client, 20).values()) == {"trendiness/1"}
