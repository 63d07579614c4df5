"""A real server's log as training rows: no skew against what the server served, and no row that knows its future."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loadtest.record import SHUFFLED, Recorded, RecordSettings, record, recording_settings
from loadtest.replay.player import BASE_MS
from loadtest.world import WorldSettings, examination
from models.rows.audit import audit
from models.rows.base import LeakError, Shard
from models.rows.build import Plan, build, writer_of
from models.rows.cursor import Cursor, Reading
from models.rows.impressions import Block, ImpressionRows, Moment
from models.rows.sharded import SORTED_BY, ShardWorker, Work, build_on_ray, chunks, cluster, decode_all, merged
from models.rows.source import LogSource, open_source
from models.schema import RowTable, read_rows
from server.__main__ import main
from server.clock import ManualClock
from server.config import Settings, parse_settings
from server.errors import LogError
from server.row_log import read_row_log
from tests.app import FEATURES, SMALL, put_current_model, running_app
from tests.events import T0, event, started
from tests.histories import broadcast, in_time, write_csv

WORLD = WorldSettings(
    seed=3, target_live=25, step_ms=10_000, n_creators=200, n_viewers=2_000, embedding_dim=8, top_audience=500.0
)
SHAPES = (("up", 100, 3), ("flat", 200, 0), ("down", 400, -2))
PLAY = RecordSettings(minutes=21, requests_per_s=1.0, places=10, people=60, shuffled=0.3)


@dataclasses.dataclass(frozen=True)
class Logged:
    """A log that a server wrote, and the rows that it logged while it served."""

    folder: Path
    settings: Settings
    done: Recorded

    @property
    def source(self) -> LogSource:
        found = open_source(None, self.folder, self.settings)
        assert isinstance(found, LogSource)
        return found


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Logged:
    """21 minutes of a small platform, with every slate in the row log."""
    folder = tmp_path_factory.mktemp("recorded")
    put_current_model(folder / "models")
    base = parse_settings(
        {
            "scoring": {"mode": "local", "model_repository": str(folder / "models")},
            "telemetry": {"row_log": str(folder / "rows"), "row_log_share": 1.0},
        }
    )
    done = record(folder, WORLD, PLAY, base, lambda line: None)
    return Logged(folder, recording_settings(base, WORLD, folder / "events.sqlite3", PLAY.places), done)


def impressions(logged: Logged, out: Path) -> RowTable:
    build(logged.source, FEATURES, Plan("impressions"), out, lambda line: None)
    return read_rows(out)


@pytest.fixture(scope="module")
def rows(logged: Logged, tmp_path_factory: pytest.TempPathFactory) -> RowTable:
    return impressions(logged, tmp_path_factory.mktemp("rows") / "rows.parquet")


def test_rows_replayed_from_the_log_are_bit_for_bit_those_that_the_running_server_logged(
    logged: Logged, rows: RowTable
) -> None:
    served = read_row_log(logged.folder / "rows")
    where = {key: i for i, key in enumerate(zip(*(served.column(n).to_pylist() for n in ("request_id", "stream_id"))))}
    at = np.array([where[key] for key in zip(rows["request_id"], rows["stream_id"], strict=True)])
    assert len(rows) > 500 and served.schema.metadata[b"feature_schema"].decode() == rows.metadata["feature_schema"]
    for name in ("at_ms", "offset", "epoch", "propensity"):
        assert np.array_equal(served.column(name).to_numpy()[at], rows[name]), name
    assert [served.column("model_version")[int(i)].as_py() for i in at] == rows["model_version"].tolist()
    for name in ("features", "feature_states"):
        column = served.column(name).combine_chunks()
        theirs = np.asarray(column.flatten()).reshape(len(column), -1)[at]
        assert theirs.tobytes() == np.ascontiguousarray(rows[name]).tobytes(), name
    for name in ("recent_meta", "recent_embeddings"):
        column = served.column(name).combine_chunks()
        theirs = np.asarray(column.flatten()).reshape(len(column), -1)[at]
        assert theirs.tobytes() == np.ascontiguousarray(rows[name]).tobytes(), name
    assert 20 < (rows["recent_meta"] != 0).any(axis=1).sum() < len(rows), "some viewers came back, others were new"
    assert (rows["recent_embeddings"] != 0).any()
    assert len(np.unique(rows["offset"])) > 20 and (rows["features"] != 0).any(axis=0).sum() > 20


def test_rows_carry_what_was_served_and_what_followed(logged: Logged, rows: RowTable) -> None:
    assert logged.done.impressions > 5_000 and not {"MISSING_PAYLOAD", "VALUE_OUT_OF_RANGE"} & set(logged.done.refused)
    assert set(rows["position"]) == set(range(PLAY.places)) and set(rows["model_version"]) == {"trendiness/1"}
    assert 0 < (rows["propensity"] > 0).mean() < 0.2
    assert (rows["offset"] < rows["impression_offset"]).all() and (rows["at_ms"] <= rows["impression_ms"]).all()
    made = rows["label_offset"] > 0
    assert (rows["label_offset"][made] > rows["offset"][made]).all()
    assert rows["clicked"].mean() > 0.02 and rows["watched"].sum() > 0 and rows["purchased"].sum() > 0
    assert np.array_equal(rows["watched"], rows["watch_s"] >= 30.0)
    assert not rows["watch_s"][~rows["clicked"]].any() and np.array_equal(rows["purchased"], rows["purchase_value"] > 0)
    assert np.allclose(np.linalg.norm(rows["stream_embedding"], axis=1), 1.0, atol=1e-5)
    keys = list(zip(rows["impression_offset"].tolist(), rows["impression_index"].tolist(), strict=True))
    assert keys == sorted(set(keys))


def test_shuffled_slates_show_the_planted_position_effect(rows: RowTable) -> None:
    """A rough look; a model's recovery of it is measured on a longer log."""
    shuffled = np.array([name.startswith(SHUFFLED) for name in rows["request_id"]])
    place, clicked = rows["position"][shuffled], rows["clicked"][shuffled]
    first, last = clicked[place < 2].mean(), clicked[place >= 5].mean()
    planted = examination(np.arange(5, 10)).mean() / examination(np.arange(2)).mean()
    assert 0.3 * planted < last / first < 2.5 * planted


def test_the_same_log_gives_the_same_file(logged: Logged, rows: RowTable, tmp_path: Path) -> None:
    again = impressions(logged, tmp_path / "again.parquet")
    assert again.metadata == rows.metadata and len(rows.metadata["data_hash"]) == 16


def late_reader(self: ImpressionRows, block: Block, rows: Any, at_ms: int) -> None:
    """The planted leak: nothing is read when the slate was made …"""


def take_late(self: ImpressionRows, block: Block) -> None:
    """… but when the labels are known."""
    slots = self._cursor.lookup(block.ids, block.id_lengths, block.epoch)
    block.alive &= slots >= 0
    kept = np.flatnonzero(block.alive)
    if len(kept):
        reading = self._cursor.read(slots[kept], int(block.at_ms[0]))
        block.filled[kept], block.read_offset[kept] = True, reading.offset
        of_viewers = self._cursor.histories(block.viewer_hash[kept], int(block.at_ms[0]))
        block.readings.append(Moment(kept, reading, np.arange(len(kept)), of_viewers))
    honest_take(self, block)


honest_take = ImpressionRows._take


def test_features_read_after_the_events_of_the_label_are_refused(
    logged: Logged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImpressionRows, "_read", late_reader)
    monkeypatch.setattr(ImpressionRows, "_take", take_late)
    with pytest.raises(LeakError, match="features read after record"):
        impressions(logged, tmp_path / "leaky.parquet")
    assert not list(tmp_path.iterdir()), "a file that leaks is not left behind"


def test_a_reader_that_lies_about_its_state_is_found_by_the_audit(
    logged: Logged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest_read = Cursor.read

    def lying(self: Cursor, slots: Any, at_ms: int) -> Reading:
        found = honest_read(self, slots, at_ms)
        return dataclasses.replace(found, offset=found.offset - 2)

    with monkeypatch.context() as patched:
        patched.setattr(Cursor, "read", lying)
        impressions(logged, tmp_path / "lying.parquet")
    with pytest.raises(LeakError, match="differ from what the log says"):
        audit(tmp_path / "lying.parquet", logged.source, FEATURES, 50)


@pytest.mark.parametrize("kind", ["impressions", "streams"])
def test_the_command_writes_rows_that_pass_the_audit(
    kind: str, logged: Logged, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, config = tmp_path / "rows.parquet", str(logged.folder / "liverank.toml")
    command = ["replay", "--log", str(logged.folder), "--config", config, "--rows", kind, "--every-minutes", "1"]
    assert main([*command, "--out", str(out), "--audit", "40"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    table = read_rows(out)
    assert (
        said["audited"] == 40 and said["rows"] == len(table) > 40 and said["data_hash"] == table.metadata["data_hash"]
    )
    assert table.metadata["rows"] == kind and table.metadata["source"].endswith("events.sqlite3")
    if kind == "streams":
        assert np.isfinite(table["engaged_after_5m"]).all() and table["engaged_after_5m"].mean() > 1.0
        assert (table["at_ms"] % 60_000 == 0).all() and np.isnan(table["value_before_15m"]).any()


def test_a_log_without_its_begin_needs_a_snapshot_that_continues_there(logged: Logged, tmp_path: Path) -> None:
    import sqlite3

    path = tmp_path / "events.sqlite3"
    path.write_bytes((logged.folder / "events.sqlite3").read_bytes())
    with sqlite3.connect(path) as db:
        db.execute("DELETE FROM log WHERE record < 100")
    with pytest.raises(LogError, match=r"records before 100 are gone \(log\.retain_records"):
        open_source(None, tmp_path, logged.settings)


def test_a_shortened_log_is_replayed_from_the_snapshot_that_it_continues(tmp_path: Path) -> None:
    clock = ManualClock(T0)
    sections: dict[str, dict[str, Any]] = {
        "table": {"lease_ms": 10_000_000},
        "snapshot": {"keep": 2},
        "telemetry": {"row_log": str(tmp_path / "rows"), "row_log_share": 1.0},
    }
    with running_app(tmp_path, clock, **sections) as client:
        client.publish(*(started(name, 0) for name in "abc"))
        client.publish(*(event(name, 0, viewer="w", chatted={"count": 3}) for name in "abc"))
        for _ in range(2):
            client.app.snapshots.take()
            clock.advance(1_000)
            client.publish(event("a", 0, clock.now_ms(), viewer_count={"count": 5}))
        client.app.snapshots._trim()
        client.tick()
        reply = client.rank(request_id="r", viewer_id="v", limit=3)
        seen = [
            event(one.stream_id, 0, clock.now_ms(), one.epoch, "v", impression={
                "request_id": "r", "served_ms": reply.as_of_ms, "verify_by_ms": one.verify_by_ms,
                "applied_offset": reply.applied_offset,
            })
            for one in reply.streams
        ]  # fmt: skip
        assert not client.publish(*seen).rejected
        clock.advance(20 * 60_000)
        client.publish(started("z", 0, clock.now_ms()))
    settings = parse_settings({"table": {**SMALL, "lease_ms": 10_000_000}})
    source = open_source(None, tmp_path, settings)
    assert source.start is not None
    assert next(iter(source.records())).offset == source.start.manifest.offset + 1 > 2
    build(source, FEATURES, Plan("impressions"), tmp_path / "rows.parquet", lambda line: None)
    rows = read_rows(tmp_path / "rows.parquet")
    served = {row["stream_id"]: row for row in read_row_log(tmp_path / "rows").to_pylist()}
    assert sorted(rows["stream_id"]) == ["a", "b", "c"] and audit(tmp_path / "rows.parquet", source, FEATURES, 9) == 3
    for name, features in zip(rows["stream_id"], rows["features"]):
        assert features.tolist() == served[name]["features"]
        assert features[FEATURES.names.index("chats_per_minute_1m")] > 0


def test_a_file_of_history_becomes_rows_of_streams(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curves = {name: [start + step * minute for minute in range(61)] for name, start, step in SHAPES}
    history = in_time([one for name, curve in curves.items() for one in broadcast(name, 0, curve, likes_delta=2)])
    out = tmp_path / "rows.parquet"
    command = ["replay", str(write_csv(tmp_path / "h.csv", history)), "--rows", "streams", "--every-minutes", "5"]
    assert main([*command, "--out", str(out), "--audit", "20"]) == 0
    rows = read_rows(out)
    minute = (rows["at_ms"] - BASE_MS) // 60_000
    for name, start, step in SHAPES:
        mine = (rows["stream_id"] == name) & (minute > 0) & (minute < 45)
        assert mine.sum() == 8
        assert np.array_equal(rows["viewers_before_15m"][mine], start + step * minute[mine])
        assert (rows["viewers_gain_15m"][mine] == 15 * step).all() and (rows["viewers_gain_5m"][mine] == 5 * step).all()
    assert np.isnan(rows["engaged_after_5m"]).all() and not (minute % 5).any()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["audited"] == 20


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--rows", "streams"], "FILE wanted"),
        (["--out", "x.parquet"], "not both"),
        (["--out", "x.parquet", "--log", "nowhere"], "nowhere does not exist"),
        (["--out", "x.parquet", "--log", "nowhere", "--every-minutes", "0"], "--every-minutes: at least 1"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", *arguments]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["impressions", "streams"])
def test_shards_together_emit_each_row_once_and_as_one_machine_does(kind: str, logged: Logged, tmp_path: Path) -> None:
    plan = Plan(kind)  # type: ignore[arg-type]
    alone = build(logged.source, FEATURES, plan, tmp_path / "alone.parquet", lambda line: None)
    log = [decode_all(chunk, logged.source.table) for chunk in chunks(logged.source.records())]
    parts, told = [], Counter[str]()
    for number in range(3):
        part, rows = tmp_path / f"{number}.parquet", list[Any]()
        worker = ShardWorker(Work(logged.source.table, logged.source.viewers, None, FEATURES, plan, Shard(number, 3)))
        for chunk in log:
            rows += worker.feed(chunk)
        last, left_out = worker.finish()
        told += left_out
        pq.write_table(pa.concat_tables(rows + last), part, row_group_size=37)
        parts.append(part)
    with writer_of(logged.source, FEATURES, plan, tmp_path / "merged.parquet") as writer:
        for table in merged(parts, SORTED_BY[plan.kind]):
            writer.write(table)
    assert writer.data_hash == alone.data_hash
    assert all(pq.read_metadata(part).num_rows > 10 for part in parts) and dict(told) == alone.told


def test_over_ray_the_file_is_the_same_byte_for_byte(logged: Logged, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra 'ray' is not installed: pip install 'liverank[ray]'")
    with cluster("local", 2):
        plan = Plan("impressions")
        alone = build(logged.source, FEATURES, plan, tmp_path / "alone.parquet", lambda line: None)
        shared = build_on_ray(logged.source, FEATURES, plan, tmp_path / "ray.parquet", "local", 2, lambda line: None)
        assert alone.rows > 50 and dataclasses.replace(shared, path=alone.path) == alone
        assert (tmp_path / "alone.parquet").read_bytes() == (tmp_path / "ray.parquet").read_bytes()
        other = dataclasses.replace(
            logged.source, table=logged.source.table.model_copy(update={"max_events_per_batch": 1})
        )
        with pytest.raises(LogError, match="accepted under other"):
            build_on_ray(other, FEATURES, plan, tmp_path / "no.parquet", "local", 1, lambda line: None)
