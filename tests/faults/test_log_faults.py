"""The log under faults that an operator must mend; those that mend themselves are scenarios of the fault matrix."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loadtest.faults.broker import running_broker
from loadtest.faults.log_faults import kafka_sections
from loadtest.faults.own_server import Settings, flip, kill, live, metric, publish, settings_of, starts, status
from loadtest.processes import ROOT, NotStartedError, Server, start_server, to_toml
from server.__main__ import main
from tests.app import put_current_model
from tests.triton_server import eventually


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    put_current_model(tmp_path / "models")
    return settings_of(tmp_path / "models")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    running: list[Server] = []

    def starter(settings: Settings, folder: Path | None = None) -> Server:
        running.append(start_server(folder or tmp_path / "server", settings))
        return running[-1]

    yield starter
    for server in running:
        server.process.kill()
        server.process.wait()


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs `liverank` with arguments in this process; gives its exit status and all it printed."""

    def run(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main(list(arguments))
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def test_a_flipped_byte_in_the_middle_refuses_to_start_until_the_operator_decides(
    tmp_path: Path, settings: Settings, start: Callable[..., Server], command: Callable[..., tuple[int, str]]
) -> None:
    server = start(settings)
    publish(server, *(starts(i, 1) for i in range(5)))
    folder = tmp_path / "server"
    config = str(folder / "liverank.toml")
    truncate = ("log", "truncate", "--config", config, "--from", "3")
    code, said = command(*truncate, "--yes")
    assert code == 2 and "is a server running on it?" in said
    assert server.stop() == 0
    assert command("log", "verify", "--config", config)[0] == 0
    flip(folder / "events.sqlite3", b"stream-00002")
    with pytest.raises(
        NotStartedError, match=r"record 3 is damaged.*liverank log verify.*liverank log truncate --from"
    ):
        start(settings)
    code, said = command("log", "verify", "--config", config)
    assert code == 1 and "DAMAGED: record 3 is damaged" in said
    code, said = command(*truncate)
    assert code == 2 and "--yes" in said
    assert command("log", "verify", "--config", config)[0] == 1, "nothing was changed yet"
    code, said = command(*truncate, "--yes")
    assert code == 0 and "removed 3 records" in said
    assert (folder / "events.sqlite3.before-truncate-3").exists()
    assert command("log", "verify", "--config", config)[0] == 0
    again = start(settings)
    assert live(again, [f"stream-{i:05d}" for i in range(5)]) == ["stream-00000", "stream-00001"]


def test_damage_that_a_snapshot_covers_does_no_harm(
    tmp_path: Path, settings: Settings, start: Callable[..., Server], command: Callable[..., tuple[int, str]]
) -> None:
    # Kept, all of them: the log is cut behind the oldest one, and record 3 is to stay in it.
    server = start({**settings, "snapshot": {"every_ms": 20, "keep": 100}})
    publish(server, *(starts(i, 1) for i in range(5)))
    eventually(lambda: metric(server, "liverank_snapshot_offset") == 5, what="a snapshot of all")
    publish(server, starts(5, 1), starts(6, 1))
    assert server.stop() == 0
    folder = tmp_path / "server"
    flip(folder / "events.sqlite3", b"stream-00002")
    code, said = command("log", "verify", "--config", str(folder / "liverank.toml"))
    assert code == 0 and "covered by a snapshot, so no harm: record 3" in said
    assert len(live(start(settings), [f"stream-{i:05d}" for i in range(7)])) == 7


def test_a_start_without_brokers_waits_not_serving_and_can_be_stopped(tmp_path: Path, settings: Settings) -> None:
    with running_broker("events") as broker:
        about = {**settings, **kafka_sections(broker.servers)}
    config, log = tmp_path / "config.toml", tmp_path / "log"
    about["serve"] = {"port": 0, "metrics_port": 0}
    about["log"]["path"] = str(tmp_path / "events")
    config.write_text(to_toml(about))
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "server", "serve", "--config", str(config)], cwd=ROOT, stdout=out, stderr=out
        )
    try:
        eventually(lambda: "waiting for the brokers" in log.read_text(), what="it says what it waits for")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60.0) == 0
    finally:
        process.kill()
        process.wait()


def test_a_record_deleted_at_the_brokers_before_it_was_read_ends_the_server_and_names_it(
    tmp_path: Path, settings: Settings, start: Callable[..., Server]
) -> None:
    with running_broker("events") as broker:
        about = {**settings, **kafka_sections(broker.servers)}
        about["snapshot"] = {"every_ms": 20}
        server = start(about, tmp_path / "a")
        publish(server, starts(0, 1), starts(1, 1))
        eventually(lambda: metric(server, "liverank_snapshot_offset") >= 2, what="a snapshot")
        kill(server)
        writer = start(about, tmp_path / "b")
        offset = publish(writer, *(starts(i, 1) for i in range(2, 8)))[-1].offset
        broker.delete_before("events", offset - 1)
        with pytest.raises(NotStartedError, match=r"records \d+ to \d+ are gone, and no usable snapshot covers them"):
            start(about, tmp_path / "a")
        assert status(writer).live == 8
