"""The benches in a form so small that it shows only that they work: real servers, real load, JSON last."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest

from loadtest.bench import ingest, redis_rival
from loadtest.bench.event_columns import has_columns
from loadtest.bench.freshness import run_freshness
from loadtest.bench.ingest import Plan, run_ingest
from loadtest.bench.scale import run_scale
from loadtest.bench.soak import run_soak
from server.__main__ import main
from tests.rollout import AT_ONCE_S

STREAMS = 200
P99_MS = 5_000
"""Held by a busy machine, too: how fast it is is not tested."""


def said(capsys: pytest.CaptureFixture[str], bench: str) -> dict[str, Any]:
    """The last line, which every bench has in common."""
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["bench"] == bench and found["floor"] and found["machine"] and "commit" in found
    return found


def test_slo_finds_a_rate_that_holds(capsys: pytest.CaptureFixture[str]) -> None:
    window = ["--seconds", "0.2", "--p99-ms", str(P99_MS), "--budget-seconds", "2"]
    assert main(["bench", "slo", "--streams", str(STREAMS), *window]) == 0
    found = said(capsys, "slo")
    held = [trial for trial in found["tried"] if trial["holds"]]
    assert any(trial["rate_rps"] == pytest.approx(found["rate_rps"], abs=0.1) for trial in held)
    assert 0 < found["p50_ms"] <= found["p99_ms"] <= P99_MS and found["stopped"]


@pytest.mark.skipif(redis_rival.redis_binary() is None, reason="redis-server is not installed")
def test_ingest_compares_with_a_real_redis(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_ingest(Plan(events=1_000, batches=(250,), connections=2, rounds=1, streams=STREAMS)) == 0
    found = said(capsys, "ingest")
    rivals = {row["rival"]: row for row in found["rows"]}
    wanted = {"messages", "redis always", "redis everysec", "redis counts only"}
    assert set(rivals) == wanted | ({"columns"} if has_columns() else set())
    assert [name for name, row in rivals.items() if not row["durable"]] == ["redis everysec", "redis counts only"]
    assert all(row["events_per_s"] > 0 and row["server_cpu_us_per_event"] > 0 for row in rivals.values())
    assert found["ratios_events_per_server_core_second"]["messages ÷ redis always, 250"] > 0


def test_ingest_without_redis_says_loudly_that_nothing_was_compared(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "redis_binary", lambda: None)
    assert run_ingest(Plan(events=500, batches=(250,), connections=1, rounds=1, streams=STREAMS)) == 1
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert "NOTHING IS COMPARED" in out and any("NOTHING IS COMPARED" in text for text in found["not_measured"])
    assert not found["ratios_events_per_server_core_second"] and found["rows"][0]["events_per_s"] > 0


def test_freshness_sees_streams_come_and_go(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_freshness(STREAMS, seconds=1.0, find_s=0.2) == 0
    found = said(capsys, "freshness")
    assert found["probes"] >= 2 and found["shown_after_end"] == 0 and found["never_told"] == 0
    assert 0 < found["visible_p50_ms"] <= found["visible_p99_ms"] and found["gone_p50_ms"] > 0
    assert found["load"]["answered"] > 10 and not found["load"]["errors"]


def test_soak_tells_slopes_with_their_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_soak(minutes=0.04, rate_rps=100.0, streams=STREAMS, events_per_s=100.0) == 0
    found = said(capsys, "soak")
    assert found["rate_rps"] == 100.0 and found["p99_ms"] > 0 and not found["errors"] and found["unsent"] == 0
    assert found["rss_slope_error_mb_per_h"] is not None and found["p99_drift_error_ms_per_h"] > 0
    assert sum(window["calls"] for window in found["windows"]) == 240 and found["events_accepted"] > 200


@pytest.mark.skipif(importlib.util.find_spec("onnx") is None, reason="onnx is not installed")
def test_swap_changes_the_model_under_load_and_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "swap", "--quick", "--seconds", "7", "--streams", str(STREAMS)]) == 0
    found = said(capsys, "swap")
    assert found["failed"] == found["mixed"] == found["late_old"] == 0 and found["steps_done"]
    assert set(found["versions"]) == {"trendiness/1", "trendiness/2"} and found["rollback_ms"] < 1_000 * AT_ONCE_S
    assert found["quiet_p99_ms"] > 0 and found["swap_p99_ms"] > 0 and [part["part"] for part in found["parts"]] == [
        "quiet", "push", "shadow", "canary 1 %", "canary 10 %", "canary 100 %", "promote", "rollback",
    ]  # fmt: skip


def test_scale_measures_every_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_scale((STREAMS,), seconds=0.2, events=200, batches=(10, 100)) == 0
    found = said(capsys, "scale")
    (row,) = found["rows"]
    positive = ("start_empty_s", "start_recovering_s", "ready_s", "cpu_ms_per_reply", "rps", "lone_p50_ms", "rss_mb")
    assert row["streams"] == STREAMS and all(row[key] > 0 for key in positive) and not row["errors"]
    assert [entry["batch"] for entry in row["events"]] == [10, 100]
    assert all(entry["cpu_us_per_event"] > 0 and entry["events"] == 200 for entry in row["events"])
