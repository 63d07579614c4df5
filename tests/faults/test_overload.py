"""A flood: what is accepted is answered in time, the rest is told when to come back, and nobody else notices."""

from __future__ import annotations

import json
from pathlib import Path

from loadtest.bench.overload import DEFAULT, QUICK, measure, plan_from


def test_a_flood_is_shed_with_a_hint_while_goodput_health_liveness_and_ingest_go_on(tmp_path: Path) -> None:
    said = json.loads(json.dumps(measure(tmp_path, QUICK)))
    assert said["offered_factor"] > 1.5, "the generator must overload the server at all"
    assert said["shed"] > 100 and said["shed_with_hint"] == said["shed"]
    assert said["other_errors"] == 0 and said["errors"] == {} and said["peak_errors"] == {}
    assert said["goodput_share"] > 0.3, "a server that queues without end answers a few per cent in time"
    assert said["accepted_p50_ms"] < said["slo_ms"]
    assert said["degraded_share"] > 0.9, "quality went down before anything was shed, and replies say so"
    assert said["probe_errors"] == {} and said["probe_calls"] > 10
    assert max(said[f"{name}_max_ms"] for name in ("check_live", "health", "publish")) < 2_000


def test_what_is_not_given_on_the_command_line_is_as_planned() -> None:
    assert plan_from(None, None, quick=False) == DEFAULT and plan_from(None, None, quick=True) == QUICK
    assert (plan_from(500, 1.0, quick=True).streams, plan_from(500, 1.0, quick=True).seconds) == (500, 1.0)
