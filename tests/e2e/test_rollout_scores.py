"""Whose scores a reply shows, explains and counts while two versions are there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from liverank.v1 import admin_pb2 as pb
from liverank.v1 import ranking_pb2

from tests.app import Client, running_app
from tests.events import event
from tests.rollout import (
    MODEL,
    WHY,
    canary,
    files_of,
    lattice_net,
    listed,
    push,
    refreshed,
    served,
    settings,
    some_streams,
    versions_of,
)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with running_app(tmp_path, **settings(tmp_path)) as running:
        some_streams(running)
        yield running


def test_explain_follows_the_version_that_the_viewer_is_ranked_by(client: Client) -> None:
    push(client)
    for step in (1, 10, 100):
        canary(client, step)
    refreshed(client)
    request = ranking_pb2.ExplainRequest(request=ranking_pb2.RankRequest(viewer_id="v"), stream_id="s1")
    found = client.ranking.Explain(request, timeout=10.0)
    trend = next(score.value for score in found.scores if score.name == "trend")
    assert round(trend * 1000) % 2 == 0


def test_diff_tells_metrics_and_agreement_of_two_versions(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    push(client, files=files_of(lattice_net(2), b'{"headline": {"auc": 0.9}, "commit": "abc"}'))
    path = client.app.shipping._paths[MODEL]
    rows = path.samples()["features"]
    other_rows = iter([rows, rows[::-1].copy()])  # the server scores on between two looks
    monkeypatch.setattr(path, "samples", lambda: {"features": next(other_rows)})
    found = client.admin.DiffModels(pb.DiffModelsRequest(first=1, second=2), timeout=60.0)
    assert (found.first.metrics["auc"], found.second.metrics["auc"], found.second.commit) == (0.8, 0.9, "abc")
    assert found.agreement.rank_correlation > 0.99 and found.agreement.rows >= 60


def test_scores_of_the_old_version_that_arrive_after_the_flip_change_nothing(client: Client) -> None:
    push(client)
    late = client.app.engine.answerer.scores
    client.admin.PromoteModel(pb.PromoteModelRequest(version=2, force=True, why=WHY), timeout=10.0)
    client.app.engine.scored(late)  # the refresh that was on its way
    client.app.engine.call(lambda: None).result(10.0)
    assert set(served(client, 20).values()) == {"trendiness/2"}


def test_a_row_that_another_version_did_not_score_does_not_keep_the_score_of_the_one_before(client: Client) -> None:
    engine = client.app.engine
    used = engine.answerer.scores
    assert used.scores is not None
    scores = (np.floor(used.scores * 499) * 0.002).astype(np.float32)  # on the other lattice
    scores[::2] = np.nan
    engine.scored(replace(used, scores=scores, model_version="trendiness/2"))
    engine.call(lambda: None).result(10.0)
    reply = client.rank(viewer_id="v", limit=60)
    assert reply.model_version == "trendiness/2" and versions_of(reply) == {"even", "neither"}


def test_an_impression_counts_for_the_version_that_ranked_the_viewer(client: Client) -> None:
    push(client)
    for step in (1, 10):
        canary(client, step)
    refreshed(client)
    by_viewer = served(client)
    theirs = [viewer for viewer, version in by_viewer.items() if version == "trendiness/2"]
    now_ms = client.clock.now_ms()
    for i, viewer in enumerate(by_viewer):
        seen = {"request_id": "r", "served_ms": now_ms, "verify_by_ms": now_ms + 1_000, "position": 1}
        client.publish(event(f"s{i % 60}", 0, now_ms, 1, viewer=viewer, impression=seen))
    trial = listed(client).trial
    assert trial.candidate.impressions == len(theirs) > 0
    assert trial.serving.impressions == len(by_viewer) - len(theirs)
    assert trial.candidate.dead == trial.serving.dead == 0
