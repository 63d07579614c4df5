"""The row log of a running server: bounded, off the way of replies, and readable whatever ended it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from server.config import parse_settings
from server.errors import ConfigError
from server.row_log import PATTERN, read_row_log
from tests.app import FEATURES, Client, running_app
from tests.events import event, started
from tests.triton_server import eventually


def telemetry(folder: Path, **more: Any) -> dict[str, Any]:
    return {"row_log": str(folder / "rows"), "row_log_share": 1.0, **more}


def publish_three(client: Client) -> None:
    client.publish(*(started(name, 0) for name in "abc"), *(event(n, 0, viewer_count={"count": 9}) for n in "abc"))
    client.tick()


def dropped(client: Client, reason: str) -> float:
    return client.app.metrics.row_log_dropped.labels(reason)._value.get()


def test_every_stream_of_a_logged_reply_has_a_row_with_what_the_reply_said(tmp_path: Path) -> None:
    with running_app(tmp_path, telemetry=telemetry(tmp_path)) as client:
        publish_three(client)
        reply = client.rank(request_id="r", viewer_id="v", limit=3)
        assert len(reply.streams) == 3
    rows = read_row_log(tmp_path / "rows").to_pylist()
    assert [row["stream_id"] for row in rows] == [s.stream_id for s in reply.streams]
    for place, (row, stream) in enumerate(zip(rows, reply.streams)):
        assert (row["at_ms"], row["offset"], row["position"]) == (reply.as_of_ms, reply.applied_offset, place)
        assert (row["request_id"], row["viewer_id"], row["epoch"]) == ("r", "v", stream.epoch)
        assert (row["score"], row["propensity"]) == (pytest.approx(stream.score), pytest.approx(stream.exploration))
        assert row["model_version"] == reply.model_version and row["features"][FEATURES.names.index("viewers")] == 9.0


def test_files_are_bounded_in_size_and_number_and_a_torn_one_gives_what_is_whole(tmp_path: Path) -> None:
    small = telemetry(tmp_path, row_log_file_bytes=1_024, row_log_files=3)
    with running_app(tmp_path, telemetry=small) as client:
        publish_three(client)
        for i in range(12):
            client.rank(request_id=f"r-{i}")
    paths = sorted((tmp_path / "rows").glob(PATTERN))
    assert len(paths) == 3 and int(paths[-1].stem.removeprefix("rows-")) > 3
    before = read_row_log(tmp_path / "rows").num_rows
    paths[-1].write_bytes(paths[-1].read_bytes()[:-700])
    paths[0].write_bytes(b"")
    assert 0 < read_row_log(tmp_path / "rows").num_rows < before
    with running_app(tmp_path, telemetry=small) as client:
        client.tick()
    assert sorted((tmp_path / "rows").glob(PATTERN))[-1] > paths[-1], "a start begins a file of its own"


def test_rows_that_cannot_be_written_are_counted_and_replies_go_on(tmp_path: Path) -> None:
    with running_app(tmp_path, telemetry=telemetry(tmp_path, row_log_file_bytes=1_024)) as client:
        publish_three(client)
        client.rank()
        (tmp_path / "rows").rename(tmp_path / "elsewhere")
        for _ in range(6):
            assert len(client.rank().streams) == 3
        eventually(lambda: dropped(client, "write") > 0)
        (tmp_path / "elsewhere").rename(tmp_path / "rows")
        written = client.app.metrics.row_log_rows._value.get()
        client.rank()
        eventually(lambda: client.app.metrics.row_log_rows._value.get() > written)


def test_when_the_writer_is_behind_rows_are_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_app(tmp_path, telemetry=telemetry(tmp_path)) as client:
        publish_three(client)
        monkeypatch.setattr(client.app._row_log._waiting, "full", lambda: True)
        assert len(client.rank().streams) == 3
        assert dropped(client, "busy") == 3


def test_a_share_of_the_replies_is_logged(tmp_path: Path) -> None:
    with running_app(tmp_path, telemetry=telemetry(tmp_path, row_log_share=0.3)) as client:
        publish_three(client)
        for i in range(60):
            client.rank(request_id=f"r-{i}")
    logged = set(read_row_log(tmp_path / "rows").column("request_id").to_pylist())
    assert 4 < len(logged) < 40


def test_it_is_off_unless_configured_and_a_bad_folder_is_named(tmp_path: Path) -> None:
    assert parse_settings({}).telemetry.row_log is None
    with running_app(tmp_path) as client:
        assert client.app._row_log is None
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=r"telemetry\.row_log: .* cannot be written to"),
        running_app(tmp_path, telemetry={"row_log": str(tmp_path / "file" / "rows")}),
    ):
        pass
    with pytest.raises(ConfigError, match="no row log there"):
        read_row_log(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="row_log_share"):
        parse_settings({"telemetry": {"row_log_share": 0.0}})
