"""Invariant 1: whatever is asked for, by however many callers, one thread touches the table."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from liverank.v1 import admin_pb2, liveness_pb2, ranking_pb2

from tests.app import running_app
from tests.events import T0, event, started


def test_only_the_engine_thread_reads_or_changes_the_table(tmp_path: Path) -> None:
    with running_app(tmp_path) as client:
        engine = client.app.engine
        seen: dict[str, set[str]] = {}

        def watch(owner: Any, name: str) -> None:
            original: Callable[..., Any] = getattr(owner, name)

            def watched(*arguments: Any, **named: Any) -> Any:
                seen.setdefault(name, set()).add(threading.current_thread().name)
                return original(*arguments, **named)

            setattr(owner, name, watched)

        for owner, names in (
            (engine.table, ("apply", "expire", "stream_id", "count_states", "live_mask")),
            (engine.table.map, ("lookup",)),
            (engine.streams, ("assess", "set_book", "row_columns")),
            (engine.pipeline, ("rank",)),
        ):
            for name in names:
                watch(owner, name)

        client.publish(*(started(f"s{i}", 0) for i in range(20)))
        client.tick()

        def use_everything() -> None:
            client.rank(exclude_stream_ids=["s1"], followed_creator_ids=["creator-s2"])
            client.ranking.Explain(ranking_pb2.ExplainRequest(stream_id="s3"), timeout=10.0)
            refs = [liveness_pb2.StreamRef(stream_id="s4")]
            client.liveness.CheckLive(liveness_pb2.CheckLiveRequest(streams=refs), timeout=10.0)
            listed = [f"s{i}" for i in range(19)]
            client.liveness.Reconcile(liveness_pb2.ReconcileRequest(as_of_ms=T0, live_stream_ids=listed), timeout=10.0)
            client.admin.BlockStream(admin_pb2.BlockStreamRequest(stream_id="s5"), timeout=10.0)
            client.admin.ReloadRules(admin_pb2.ReloadRulesRequest(), timeout=10.0)
            client.admin.Status(admin_pb2.StatusRequest(), timeout=10.0)

        threads = [threading.Thread(target=use_everything) for _ in range(4)]
        for thread in threads:
            thread.start()
        client.publish(event("s6", 0, epoch=1, ended={}))
        for thread in threads:
            thread.join()
        assert len(seen) >= 9 and set().union(*seen.values()) == {"engine"}, seen
