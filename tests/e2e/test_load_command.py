"""`liverank load` as a user runs it: a scenario against a real server, its record, its report; and a stalled server."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loadtest.load.outcome import headline
from loadtest.load.run import LEAD_S, Target, own_server, play
from loadtest.load.scenario import Scenario, parse_scenario
from loadtest.processes import wait_for
from server.__main__ import main
from server.clock import SystemClock
from server.errors import ConfigError
from tests.app import running_app


def scenario(
    duration_s: float, calls_per_s: float, actions: list[dict[str, Any]] | None = None, **keys: Any
) -> Scenario:
    phase = {
        "name": "all", "duration_s": duration_s, "calls_per_s": calls_per_s, "rank_batch_share": 0.05,
        "check_live_share": 0.1, "batch_viewers": 8, "events_per_s": 100, "regions": {"DE": 1, "": 1},
        "action": actions or [],
    }  # fmt: skip
    return parse_scenario(
        {"name": "test", "fleet": {"streams": 60}, "probe_every_s": 0.5, "phase": [phase], **keys}, "test"
    )


class TimedFromTheFirstCall(Console):
    """Quiet; starts timers when a run says that its calls begin, however long it took until then."""

    def __init__(self, *timers: threading.Timer) -> None:
        super().__init__(quiet=True)
        self._timers = timers

    def print(self, *objects: Any, **options: Any) -> None:
        if "calls within" in str(objects[0]):
            for timer in self._timers:
                timer.start()


def test_a_scenario_with_every_action_runs_and_leaves_a_record_and_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out, report = tmp_path / "all.toml", tmp_path / "run.json", tmp_path / "run.html"
    path.write_text(
        '[fleet]\nstreams = 80\n[[phase]]\nname = "all"\nduration_s = 3.0\ncalls_per_s = 60\nevents_per_s = 100\n'
        "rank_batch_share = 0.05\nbatch_viewers = 8\n"
        '[[phase.action]]\ndo = "raid"\nat_s = 0.2\nplace = 80\njoins = 300\nchats = 200\nover_s = 0.5\n'
        '[[phase.action]]\ndo = "end"\nat_s = 0.5\nshare = 0.5\n'
        '[[phase.action]]\ndo = "start"\nat_s = 1.0\nstreams = 30\n'
        '[[phase.action]]\ndo = "reload_rules"\nat_s = 1.2\n'
        '[[phase.action]]\ndo = "swap_model"\nat_s = 1.4\n'
    )
    command = ["load", str(path), "--self", "--out", str(out), "--report", str(report)]
    status = main(command)
    printed = capsys.readouterr().out
    said = json.loads(printed.splitlines()[-1])
    assert status == 0, said["faults"]
    assert said["ok"] and said["shown_after_end"] == 0 and said["floor"]
    assert [action["do"] for action in said["actions"]] == ["raid", "end", "start", "reload_rules", "swap_model"]
    assert "40 streams ended" in said["actions"][1]["told"] and "version 2" in said["actions"][4]["told"]
    assert set(said["calls"]) == {"Rank", "RankBatch", "CheckLive", "Publish"}
    assert sum(said["calls"][name]["due"] for name in ("Rank", "RankBatch", "CheckLive")) == 180
    assert all(entry["failed"] == 0 and entry["p99_ms"] > 0 for entry in said["calls"].values())
    # 300 by rate, 500 of the raid, 40 ends, 30 starts, and heartbeats.
    assert 870 <= said["events"]["accepted"] == said["events"]["sent"] <= 1_000 and not said["events"]["rejected"]
    assert said["freshness"]["visible"]["n"] >= 1 and said["freshness"]["visible"]["max_ms"] > 0
    record = json.loads(out.read_text())
    assert headline(record) == said and set(record["models"]) <= {"trendiness/1", "trendiness/2"}
    assert record["stages"]["whole_ms"]["rank"] > 0 and record["process"]["rss_mb"]
    assert "version 2 serves" in report.read_text()


def test_a_server_that_stalls_shows_in_every_call_that_was_due_meanwhile() -> None:
    wanted = scenario(2.0, 100, probe_every_s=0.0, expect={"rank_p99_ms": 300.0})
    with own_server(wanted) as target:
        assert target.pid is not None
        stop = threading.Timer(LEAD_S + 0.9, os.kill, (target.pid, signal.SIGSTOP))
        go_on = threading.Timer(LEAD_S + 1.6, os.kill, (target.pid, signal.SIGCONT))
        record = play(wanted, target, TimedFromTheFirstCall(stop, go_on))
        stop.join()
        go_on.join()
    rank = record["calls"]["Rank"]
    # Seven tenths of a second of calls, evenly late from 0.7 s down to nothing: half of them by more than 0.35 s.
    assert rank["failed"] == 0 and rank["max_ms"] > 500
    slow = [ms for q, ms in zip(rank["curve"]["q"], rank["curve"]["ms"], strict=True) if q >= 90]
    assert all(ms > 150 for ms in slow), rank["curve"]
    assert not record["ok"] and any("Rank p99" in fault for fault in record["faults"])


def test_a_server_that_dies_ends_the_run_soon_and_everything_lost_is_told() -> None:
    wanted = scenario(1.5, 60, [{"do": "end", "at_s": 1.3, "share": 0.5}])
    with own_server(wanted) as target:
        assert target.pid is not None
        kill = threading.Timer(LEAD_S + 1.0, os.kill, (target.pid, signal.SIGKILL))
        record = play(wanted, target, TimedFromTheFirstCall(kill))
        kill.join()
    calls = [entry for name, entry in record["calls"].items() if name != "Publish"]
    assert not record["ok"] and sum(entry["errors"].get("UNAVAILABLE", 0) for entry in calls) > 0
    assert sum(entry["due"] for entry in calls) == 90 and record["calls"]["Rank"]["p99_ms"] is None
    assert record["calls"]["Publish"]["p50_ms"] > 0
    told = " ".join(record["faults"])
    assert "Publish: UNAVAILABLE" in told and "end at 1.3 s" in told and "of 90 calls failed" in told


def test_a_running_server_is_loaded_and_left_without_the_loads_streams(tmp_path: Path) -> None:
    with running_app(tmp_path, SystemClock(), table={"capacity": 4_000, "embedding_dim": 64}) as client:
        address = f"127.0.0.1:{client.app.port}"
        record = play(scenario(1.0, 40), Target(address, f"127.0.0.1:{client.app.metrics_port}"))
        assert record["ok"], record["faults"]
        assert "missing" in record["process"] and record["stages"]["whole_ms"]["rank"] > 0
        live = lambda: client.app.engine.call(lambda: client.app.engine.table.count_states()[0]).result(10.0)  # noqa: E731
        wait_for(lambda: live() == 0, 60.0, "all streams of the load ended")


def test_a_target_that_does_not_fit_is_told_before_the_load(tmp_path: Path) -> None:
    wanted = scenario(1.0, 10)
    with pytest.raises(ConfigError, match=r"--target 127\.0\.0\.1:1: "):
        play(wanted, Target("127.0.0.1:1"))
    with running_app(tmp_path, SystemClock()) as client:
        address = f"127.0.0.1:{client.app.port}"
        with pytest.raises(ConfigError, match=r"does not fit this scenario: .*EMBEDDING_SIZE"):
            play(wanted, Target(address))
        swap = scenario(1.0, 10, [{"do": "swap_model", "at_s": 0}])
        with pytest.raises(ConfigError, match="--model-folder wanted"):
            play(swap, Target(address))
