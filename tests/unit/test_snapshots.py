"""A table restored from a snapshot and the log after it is the table that applied the whole log (invariant 6)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies
from liverank.v1 import ingest_pb2 as pb

from server.config import ViewerSettings
from server.errors import SnapshotError
from server.live.columns import Columns
from server.live.events import decode_batch
from server.live.state import LAYOUT, StateBuffer, restore
from server.live.table import End, LiveTable
from server.log import snapshot
from server.log.base import Record
from server.log.snapshot import Contents, SnapshotFolder, manifest_of
from server.viewers.table import ViewerTable
from tests.events import T0, apply, event, new_table, small_settings, started

SETTINGS = small_settings(
    capacity=40, tombstone_ms=4_000, max_lateness_ms=3_000, grace_ms=1_500, lease_ms=2_000, max_producers=5
)

VIEWERS = ViewerSettings(capacity=3, sessions=8)
"""So small that viewers and sessions give way to others all the time."""


def everything(table: LiveTable) -> dict[str, Any]:
    """All that the log determines."""
    producers = {
        name: (table._producer_used_ms[row], table._highest[row], table._window_bits[row].tobytes())
        for name, row in table._producers.items()
    }
    return {
        **{f.name: getattr(table.columns, f.name).tobytes() for f in fields(Columns)},
        "titles": table.titles, "tags": table.tags, "rows": table.rows, "landmark": table.landmark_ms,
        "seen": table.counters_seen.tolist(), "free": sorted(table._free), "producers": producers,
        "producer_rows": dict(table._producers),
        "interned": [(i.names, i._uses, sorted(i._free)) for _, i in table.interned()],
        "map": table.map.lookup(table.columns.ids[: table.rows], table.columns.id_lengths[: table.rows])[
            table.columns.id_lengths[: table.rows] > 0
        ].tolist(),
        "viewers": viewers_of(table),
    }  # fmt: skip


def viewers_of(table: LiveTable) -> dict[str, Any]:
    """All that is known of viewers, and what follows from it."""
    viewers = table.follower
    assert isinstance(viewers, ViewerTable)
    columns = {
        f"{name}.{column}": held.tobytes() for name, part in viewers.columns().items() for column, held in part.items()
    }
    every = viewers.viewers.key[: len(viewers)].copy()
    found = viewers.histories(every, T0 + 100_000)
    ends = (viewers.viewers.ends.tolist(), viewers.sessions.ends.tolist())
    return {**columns, "ends": ends, "embedding": found.embedding.tobytes(), "meta": found.meta.tobytes()}


def manifest(table: LiveTable, ends: list[End], **changes: Any) -> Contents:
    state = StateBuffer().capture(table)
    about: dict[str, Any] = {
        "offset": 7, "stamp_ms": T0, "record_crc": 1, "table_ms": T0, "log": "sqlite", "feature_schema": "f",
        "ends_newest": len(ends),
    }  # fmt: skip
    return Contents(manifest_of(state, **{**about, **changes}), state, ends)


def copied(table: LiveTable, folder: Path) -> LiveTable:
    """A new table, restored from a snapshot file of ``table``."""
    path = SnapshotFolder(folder).write(manifest(table, []))
    again = new_table(table.settings, VIEWERS)
    restore(again, snapshot.read(path).state)
    return again


STREAM = strategies.integers(0, 25)
CASES: dict[str, dict[str, Any]] = {
    "started": {}, "heartbeat": {}, "ended": {"reason": "over"}, "viewer_count": {"count": 9}, "chatted": {"count": 2},
    "liked": {}, "moderated": {"action": 1}, "bid": {"amount_minor": 700, "currency": "USD"},
    "joined": {}, "left": {}, "watched": {"seconds": 12.5}, "reported": {"reason": "r"},
}  # fmt: skip
ACTION = strategies.tuples(
    strategies.sampled_from(["started", "started", "started", *sorted(CASES)]),
    STREAM,
    strategies.integers(1, 3),
    strategies.integers(-500, 100),
)
BATCH = strategies.tuples(
    strategies.integers(0, 3_000), strategies.sampled_from("abcdefg"), strategies.lists(ACTION, max_size=8)
)


def records_of(history: list[tuple[int, str, list[tuple[str, int, int, int]]]]) -> Iterator[Record]:
    now_ms, sequence = T0, 0
    for number, (later_ms, producer, actions) in enumerate(history):
        now_ms += later_ms
        events = []
        for case, stream, epoch, skew_ms in actions:
            sequence += 1
            values = dict(CASES[case])
            if case == "started":
                values = {
                    "creator_id": f"c{stream % 7}-{epoch}", "category": f"g{(stream + epoch) % 4}",
                    "title": "ü" * epoch, "tags": ["t"] * epoch, "embedding": [1.0, float(stream), 0.5, -1.0],
                }  # fmt: skip
            elif case == "heartbeat":
                values = {"media_sequence": sequence}
            events.append(
                event(f"s{stream}", sequence, now_ms + skew_ms, epoch, viewer=f"v{sequence % 5}", **{case: values})
            )
        payload = pb.EventBatch(producer_id=producer, events=events).SerializeToString()
        yield Record(number + 1, now_ms, payload)


def step(table: LiveTable, record: Record) -> list[End]:
    return table.apply(decode_batch(record.payload, SETTINGS).events, record.applied_ms).ends


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(strategies.lists(BATCH, min_size=6, max_size=30), strategies.data())
def test_snapshot_at_any_point_then_the_rest_equals_the_whole_log(
    tmp_path: Path, history: Any, data: strategies.DataObject
) -> None:
    records = list(records_of(history))
    cut = data.draw(strategies.integers(0, len(records)), "snapshot after")
    whole, live = new_table(SETTINGS, VIEWERS), new_table(SETTINGS, VIEWERS)
    ends: list[End] = []
    for record in records:
        ends += step(whole, record)
    told: list[End] = []
    for record in records[:cut]:
        told += step(live, record)
    if cut and cut < len(records):  # table time may have gone on before the snapshot was taken
        gap_ms = records[cut].applied_ms - records[cut - 1].applied_ms
        told += live.expire(records[cut - 1].applied_ms + data.draw(strategies.integers(0, gap_ms), "tick")).ends
    again = copied(live, tmp_path)
    assert everything(again) == everything(live)
    for record in records[cut:]:
        told += step(again, record)
    assert everything(again) == everything(whole) and told == ends


def test_a_number_that_no_row_uses_is_given_to_the_next_name() -> None:
    table = new_table(small_settings(capacity=8, tombstone_ms=20_000, max_lateness_ms=10_000))
    for i in range(100):
        at_ms = T0 + i * 60_000
        apply(table, started(f"s{i}", i + 1, at_ms, category=f"g{i}"), at_ms=at_ms)
    assert len(table.creators) <= 4 and len(table.categories) <= 4, "bounded by rows, not by history"
    (slot,) = table.map.lookup(table.columns.ids[:1], table.columns.id_lengths[:1])
    assert table.creators.names[table.columns.creator[slot]].startswith("creator-s")


def test_a_restarted_stream_keeps_its_names_when_others_let_go_of_them() -> None:
    table = new_table(small_settings())
    apply(table, started("a", 1), event("b", 2, epoch=1, started={"creator_id": "creator-a"}))
    apply(table, event("a", 3, epoch=2, started={"creator_id": "other"}))
    slots = table.map.lookup(table.columns.ids[:2], table.columns.id_lengths[:2])
    assert [table.creators.names[n] for n in table.columns.creator[slots]] == ["other", "creator-a"]
    assert table.creators.find(["creator-a"]).tolist() == [1]


@pytest.fixture
def table() -> LiveTable:
    made = new_table(small_settings())
    apply(made, *(started(f"s{i}", i + 1, title=f"title {i}", tags=["x", "y"]) for i in range(20)))
    return made


def test_every_flipped_byte_and_every_cut_is_noticed(table: LiveTable, tmp_path: Path) -> None:
    path = SnapshotFolder(tmp_path).write(manifest(table, [End("s1", 1, T0, "x")]))
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    for at in [0, 70, len(whole) - 1, *rng.integers(0, len(whole), 40).tolist()]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(SnapshotError, match=r"damaged|not a snapshot"):
            snapshot.read(path)
    for length in (0, 10, 64, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(SnapshotError):
            snapshot.read(path)
    path.write_bytes(whole)
    assert snapshot.read(path).ends == [End("s1", 1, T0, "x")]


def test_the_state_of_another_version_is_refused_and_says_so(table: LiveTable, tmp_path: Path) -> None:
    made = manifest(table, [])
    path = SnapshotFolder(tmp_path).write(replace(made, manifest=replace(made.manifest, layout="older")))
    with pytest.raises(SnapshotError, match=f"written by another version \\(layout older, not {LAYOUT}\\)"):
        snapshot.read(path)
    assert snapshot.read_manifest(path).layout == "older"


def test_a_snapshot_that_cannot_be_written_leaves_no_file(
    table: LiveTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("server.log.snapshot.os.fsync", full)
    with pytest.raises(SnapshotError, match="No space left"):
        SnapshotFolder(tmp_path).write(manifest(table, []))
    assert list(tmp_path.iterdir()) == []


def test_only_the_newest_are_kept_and_half_written_ones_removed(table: LiveTable, tmp_path: Path) -> None:
    folder = SnapshotFolder(tmp_path)
    for offset in (5, 20, 100, 3_000):
        folder.write(manifest(table, [], offset=offset))
    assert folder.oldest_offset(4) == 5 and folder.oldest_offset(5) == 0, "none may be relied on before all are there"
    (tmp_path / "00000000000000003001.tmp").write_bytes(b"half")
    folder.remove_half_written()
    folder.set_aside(folder.paths()[-1])
    folder.prune(2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{n:020d}.snapshot" for n in (100, 3_000)]


def test_a_copy_does_not_change_when_the_table_does(table: LiveTable) -> None:
    buffer = StateBuffer()
    buffer.reserve(table)
    state = buffer.capture(table)
    before = {name: column.tobytes() for name, column in state.columns.items()}
    apply(table, event("s1", 100, epoch=1, ended={}), started("new", 101, title="t"))
    assert {name: column.tobytes() for name, column in state.columns.items()} == before
    assert len(state.titles) == 20
