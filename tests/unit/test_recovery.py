"""Same events, same table (invariant 6): however ticks fell, and after a restart from the log."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from loadtest.world import World, WorldSettings
from server.errors import LogError
from server.live.columns import Columns
from server.live.events import decode_batch
from server.live.table import LiveTable
from server.log.base import Record
from server.log.sqlite import SqliteLog
from tests.events import T0, batch, event, new_table, small_settings, started

SETTINGS = small_settings(capacity=600, embedding_dim=64, tombstone_ms=30_000, max_lateness_ms=20_000, grace_ms=8_000)


@pytest.fixture(scope="module")
def records() -> list[Record]:
    """Three simulated minutes of a disorderly platform whose streams are short, with irregular stamps."""
    world = World(WorldSettings(seed=3, start_ms=T0, target_live=60, mean_session_ms=40_000))
    made: list[Record] = []
    rng = np.random.default_rng(5)
    for _ in range(180):
        stamp = world.now_ms + int(rng.integers(0, 900))
        for message in world.step().to_batches():
            stamp = max(stamp, made[-1].applied_ms if made else 0)
            made.append(Record(len(made) + 1, stamp, message.SerializeToString()))
    return made


def replay(records: list[Record], tick_ms: int | None) -> tuple[LiveTable, list[str]]:
    """Applies records; with ``tick_ms``, expires that often in between, never past the next stamp."""
    table, ends = new_table(SETTINGS), []
    for record in records:
        while tick_ms and table_time(table) + tick_ms <= record.applied_ms:
            table.time_ms = table_time(table) + tick_ms  # type: ignore[attr-defined]
            ends += [f"{e.stream_id}/{e.epoch}/{e.reason}" for e in table.expire(table_time(table)).ends]
        events = decode_batch(record.payload, SETTINGS).events
        ends += [f"{e.stream_id}/{e.epoch}/{e.reason}" for e in table.apply(events, record.applied_ms).ends]
    return table, ends


def table_time(table: LiveTable) -> int:
    return getattr(table, "time_ms", T0)


def assert_identical(a: Columns, b: Columns) -> None:
    for field in fields(Columns):
        left, right = getattr(a, field.name), getattr(b, field.name)
        assert left.tobytes() == right.tobytes(), field.name


@pytest.mark.parametrize("tick_ms", [37, 100, 5_000])
def test_columns_and_ends_do_not_depend_on_when_ticks_ran(records: list[Record], tick_ms: int) -> None:
    plain, plain_ends = replay(records, None)
    ticked, ticked_ends = replay(records, tick_ms)
    assert len(plain_ends) > 100 and any("lease_expired" in end for end in plain_ends)
    assert plain.columns.generation.any(), "rows must have been reused for this to mean anything"
    assert plain_ends == ticked_ends
    assert_identical(plain.columns, ticked.columns)
    assert plain.rows == ticked.rows and plain.landmark_ms == ticked.landmark_ms


def test_a_table_rebuilt_from_the_log_file_is_bit_identical(records: list[Record], tmp_path: Path) -> None:
    path = tmp_path / "log.sqlite3"
    log = SqliteLog(path)
    for start in range(0, len(records), 50):
        log.append(records[start : start + 50])
    log.close()
    live, _ = replay(records, 100)
    reread = SqliteLog(path)
    rebuilt, _ = replay(list(reread.read(0)), None)
    assert_identical(live.columns, rebuilt.columns)
    assert reread.last is not None and reread.last.offset == len(records)


@pytest.mark.parametrize("damaged", ["x'00'", "'text'", "17"])
def test_a_damaged_record_is_named_and_refused(tmp_path: Path, damaged: str) -> None:
    path = tmp_path / "log.sqlite3"
    log = SqliteLog(path)
    log.append([Record(i, T0, batch(started(f"s{i}", i))) for i in (1, 2, 3)])
    log._db.execute(f"UPDATE log SET payload = {damaged} WHERE record = 3")
    with pytest.raises(LogError, match="record 3 is damaged"):
        SqliteLog(path, read_only=True)
    again = SqliteLog(path)
    assert (again.truncated, again.last) == (3, Record(2, T0, b"")), "a start removes the last one"
    again.close()
    log._db.execute("INSERT INTO log VALUES (3, ?, 0, x'')", (T0,))
    log._db.execute(f"UPDATE log SET payload = {damaged} WHERE record = 2")
    with pytest.raises(LogError, match="record 2 is damaged"):
        list(log.read(0))
    log._db.execute("DELETE FROM log WHERE record = 2")
    with pytest.raises(LogError, match="record 2 is missing"):
        list(log.read(0))


def test_a_group_is_written_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path / "log.sqlite3")
    log.append([Record(1, T0, batch(event("s", 1, liked={})))])
    with pytest.raises(LogError, match="offset 2 expected, got 3"):
        log.append([Record(3, T0, b"")])
    log._db.execute("INSERT INTO log VALUES (3, 0, 0, x'')")  # a fault in the middle of the next group
    with pytest.raises(LogError, match="cannot write"):
        log.append([Record(2, T0, b"x"), Record(3, T0, b"y")])
    log._db.execute("DELETE FROM log WHERE record = 3")
    assert [r.offset for r in log.read(0)] == [1]


def test_a_file_that_is_no_log_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.sqlite3"
    path.write_bytes(b"not a database, but long enough to look at" * 100)
    with pytest.raises(LogError, match="cannot open"):
        SqliteLog(path)
