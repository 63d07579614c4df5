"""What a server remembers of viewers, and what a request gets of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from liverank.v1 import ranking_pb2

from server.app import App
from server.clock import ManualClock
from server.config import parse_settings
from server.errors import ConfigError
from server.viewers.table import ViewerTable
from tests.app import SMALL, Client, running_app
from tests.events import T0, event, started
from tests.unit.test_snapshots import viewers_of

CHART = {"surface": "chart", "limit": 100}


def fill(client: Client, streams: int = 10) -> None:
    client.publish(*(started(f"s{i}", 0, embedding=[1.0, float(i), 0.0, 0.0]) for i in range(streams)))
    client.tick()


def shown(reply: ranking_pb2.RankResponse) -> set[str]:
    return {stream.stream_id for stream in reply.streams}


def metric(client: Client, name: str, **labels: str) -> float:
    return client.app.metrics.registry.get_sample_value(name, labels) or 0.0


def known(client: Client) -> dict[str, Any]:
    return client.app.engine.call(lambda: viewers_of(client.app.engine.table)).result(10.0)


def test_what_a_viewer_reported_is_not_shown_to_that_viewer_again_and_the_reply_says_so(tmp_path: Path) -> None:
    with running_app(tmp_path, ManualClock(T0)) as client:
        fill(client)
        client.publish(event("s3", 0, viewer="v", reported={"reason": "r"}), event("s4", 0, viewer="w", reported={}))
        requests = [
            ranking_pb2.RankRequest(viewer_id="v", exclude_stream_ids=["s1", "unknown"], **CHART),
            ranking_pb2.RankRequest(viewer_id="x", **CHART),
            ranking_pb2.RankRequest(viewer_id="w", exclude_stream_ids=["s4", "s5"], **CHART),
            ranking_pb2.RankRequest(**CHART),
        ]
        batch = ranking_pb2.RankBatchRequest(requests=requests)
        replies = client.ranking.RankBatch(batch, timeout=10.0).responses
        every = {f"s{i}" for i in range(10)}
        assert [every - shown(reply) for reply in replies] == [{"s1", "s3"}, set(), {"s4", "s5"}, set()]
        assert [list(reply.notices) for reply in replies] == [["seen_excluded"], [], ["seen_excluded"], []]
        assert metric(client, "liverank_seen_excluded_total") == 2
        removed = metric(client, "liverank_slate_drops_total", stage="merge", reason="excluded")
        assert removed == 4, "kept + removed = offered: each is counted once, however many excluded it"
        client.tick()
        assert metric(client, "liverank_viewers") == 2
        asked = ranking_pb2.ExplainRequest(request=requests[0], stream_id="s3")
        found = client.ranking.Explain(asked, timeout=10.0)
        assert found.not_shown_reason == "rule:seen"
        assert {r.rule for r in found.rules if r.excluded} == {"seen"}


def test_nothing_is_remembered_with_a_capacity_of_zero(tmp_path: Path) -> None:
    with running_app(tmp_path, ManualClock(T0), viewers={"capacity": 0}) as client:
        fill(client)
        client.publish(event("s3", 0, viewer="v", reported={}))
        assert "s3" in shown(client.rank(viewer_id="v", **CHART)) and client.app.engine.table.follower is None


def test_after_a_restart_the_same_is_known_whether_from_a_snapshot_or_from_the_log(tmp_path: Path) -> None:
    clock = ManualClock(T0)
    with running_app(tmp_path, clock) as client:
        fill(client)
        client.publish(*(event(f"s{i}", 0, viewer=f"v{i % 4}", watched={"seconds": 10.0 * i}) for i in range(10)))
        client.app.snapshots.take()
        client.publish(event("s7", 0, viewer="v1", reported={}), event("s1", 0, viewer="v9", joined={}))
        before = known(client)
    with running_app(tmp_path, clock) as client:
        assert known(client) == before
        assert "s7" not in client.shown(viewer_id="v1", **CHART)
    for path in (tmp_path / "events.snapshots").glob("*"):
        path.unlink()
    with running_app(tmp_path, clock) as client:
        assert known(client) == before


def test_a_snapshot_of_more_viewers_than_there_is_room_for_is_refused_with_the_way_out(tmp_path: Path) -> None:
    clock = ManualClock(T0)
    with running_app(tmp_path, clock) as client:
        fill(client)
        client.publish(*(event("s1", 0, viewer=f"v{i}", joined={}) for i in range(5)))
        client.app.snapshots.take()
    sections: dict[str, Any] = {
        "serve": {"port": 0, "metrics_port": 0}, "table": SMALL, "log": {"path": str(tmp_path / "events.sqlite3")},
        "scoring": {"model_repository": str(tmp_path / "models")}, "viewers": {"capacity": 4},
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"at most 4 rows wanted, got 5. Raise viewers.capacity or .* = 0 to drop it"):
        App(parse_settings(sections), clock, lambda: None).start()
    with running_app(tmp_path, clock, viewers={"capacity": 0}) as client:
        client.publish(event("s1", 0, viewer="v1", joined={}))
        client.app.snapshots.take()
    with running_app(tmp_path, clock, viewers={"capacity": 4}) as client:
        viewers = client.app.engine.table.follower
        assert isinstance(viewers, ViewerTable) and len(viewers) == 0, "a snapshot without viewers: begins empty"
