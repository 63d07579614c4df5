"""`liverank replay` as a user runs it, on two synthetic hours with 40 streams."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from loadtest.replay.growth import TARGETS
from server.__main__ import main
from tests.app import put_current_model
from tests.histories import Row, broadcast, in_time, row, write_csv, write_parquet

CAPACITY = 256


def two_hours() -> list[Row]:
    """36 long streams that wax and wane, four that come and go; one that returns, one that falls silent."""
    draw = random.Random(5)
    rows: list[Row] = []
    for i in range(36):
        phase, base = draw.uniform(0, 6), draw.randint(40, 200)
        curve = [int(base * (1.4 + math.sin(phase + minute / 20))) for minute in range(121)]
        rows += broadcast(f"s{i:02d}", 0, curve, likes_delta=draw.randint(0, 4))
    for i in range(36, 38):
        rows += broadcast(f"s{i}", 600 + 60 * i, [30 + i] * 20)
    rows += broadcast("returns", 0, [300] * 30) + broadcast("returns", 3_600, [200] * 30)
    silent = broadcast("silent", 300, [400] * 10)[:-1]
    return in_time([*rows, *silent, row(5_400, "snapshot", "silent", 100), row(5_460, "end", "silent", 100)])


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings of a small server with a small model."""
    folder = tmp_path_factory.mktemp("server")
    put_current_model(folder / "models")
    path = folder / "liverank.toml"
    path.write_text(
        f'[table]\ncapacity = {CAPACITY}\nembedding_dim = 4\n[scoring]\nmode = "local"\n'
        f'model_repository = "{folder / "models"}"\n'
    )
    return path


def replay(capsys: pytest.CaptureFixture[str], file: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, the last line of stdout as JSON, and stderr."""
    status = main(["replay", str(file), *options])
    said = capsys.readouterr()
    lines = said.out.splitlines()
    return status, json.loads(lines[-1]) if lines else {}, said.err


def test_two_hours_of_history_go_through_the_api_and_nothing_ended_is_shown(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said, _ = replay(capsys, write_csv(tmp_path / "h.csv", two_hours()), "--config", str(config))
    assert status == 0, said
    assert said["shown_after_end"] == 0 and said["lost"] == 0 and said["faults"] == []
    assert said["rejected"] == {} and said["accepted"] == said["events"] > len(two_hours())
    assert said["events_per_s"] > 0
    assert (said["streams"], said["sessions"]) == (40, 42)  # one returned, one was silent for too long
    assert 36 <= said["peak_live"] <= 40
    assert said["feeds"] == 25 and said["answered_by"] == {"trendiness/1": 25}
    assert said["bins"] == 21  # every five minutes from 0 to 105 that has a future, but for the last: all end at 120
    assert set(said["overlap10"]) == set(TARGETS)
    for means in (said["overlap10"], *said["formulas"].values()):
        assert all(0.0 <= means[name] <= 1.0 for name in TARGETS)
    assert said["short_feeds"] == 0
    assert said["formulas"]["viewers_now"]["viewers"] > 0.5


def test_csv_and_parquet_and_a_second_run_give_the_same_result(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [r for r in two_hours() if r["t_folded_s"] <= 3_000]
    files = (write_csv(tmp_path / "h.csv", rows), write_parquet(tmp_path / "h.parquet", rows))
    results = [replay(capsys, file, "--config", str(config))[1] for file in (files[0], files[1], files[1])]
    for said in results:
        del said["seconds"], said["events_per_s"]
    assert results[0] == results[1] == results[2]


def test_events_that_the_server_refuses_are_counted_by_reason_and_are_no_failure(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*broadcast("fine", 0, [10, 20]), row(120, "end", "never-began"), row(120, "snapshot", "x" * 65)]
    status, said, _ = replay(capsys, write_csv(tmp_path / "h.csv", rows), "--config", str(config))
    assert status == 0
    assert said["rejected"] == {"UNKNOWN_STREAM": 1, "STREAM_ID_INVALID": 3} and said["lost"] == 0
    assert said["overlap10"] == dict.fromkeys(TARGETS) and said["bins"] == 0


def test_a_paced_replay_takes_as_long_as_the_history_divided_by_the_speed(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_csv(tmp_path / "h.csv", broadcast("a", 0, [10] * 11))
    status, said, told = replay(capsys, file, "--config", str(config), "--speed", "2000")
    assert status == 0 and said["seconds"] >= 0.3
    assert "replay: hour 0 of 0" in told


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--surface", "nowhere"), "--surface: one of chart, default, kids wanted, got 'nowhere'"),
        (("--speed", "-1"), "--speed: a number from 0 on wanted, got -1.0"),
        (("--config", "not-there.toml"), "not-there.toml"),
    ],
)
def test_wrong_usage_is_told_and_exits_with_2(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, str], said: str
) -> None:
    file = write_csv(tmp_path / "h.csv", broadcast("a", 0, [10]))
    status, _, told = replay(capsys, file, "--config", str(config), *options)
    assert status == 2 and said in told


def test_a_bad_file_is_told_with_row_and_column_and_exits_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_csv(tmp_path / "h.csv", [row(0, "snapshot", "a"), row(60, "snapshot", "a", -5)])
    status, _, told = replay(capsys, file)
    assert status == 2 and "row 2, column viewers: a whole number" in told
