"""Data frames of events and tables, against plain Python; pandas here, cuDF where there is a GPU."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from liverank.v1 import ingest_pb2 as pb

from kernels.backend import CPU, Backend, choose
from kernels.counters import COUNTERS, decay_factors
from server.errors import ConfigError
from server.live import frames
from server.live.accumulators import FIRST_COUNTER, SECOND_COUNTER
from server.live.arrow_schema import read_batch
from server.live.events import decode_batch
from tests.app import running_app
from tests.arrow_events import payload, to_batch, to_ipc, to_rows
from tests.events import T0, apply, event, new_table, small_settings, started
from tests.unit.test_arrow_events import LARGE, ONE_OF_EACH, PACKED, any_event

SETTINGS = small_settings(max_events_per_batch=100)
LIBRARY: ModuleType = frames.frame_library(choose("auto"))


def host(series: Any) -> list[Any]:
    """The values of a column on the host."""
    return list((series.to_pandas() if LIBRARY.__name__ == "cudf" else series).tolist())


def frame_of(events: list[pb.Event], **how: Any) -> Any:
    batch = read_batch(to_ipc(to_batch(to_rows(events), **how)), 100)
    return frames.events_frame(batch, SETTINGS.currencies, LIBRARY)


@settings(max_examples=60, deadline=None)
@example(ONE_OF_EACH, PACKED, True)
@given(st.lists(any_event(), max_size=6), st.sampled_from([None, LARGE, PACKED]), st.booleans())
def test_a_frame_of_events_says_what_the_decoder_says(events: list[pb.Event], types: Any, sparse: bool) -> None:
    frame = frame_of(events, types=types, sparse=sparse)
    columns = decode_batch(payload(to_ipc(to_batch(to_rows(events)))), SETTINGS).events
    kept = frame[frame["row"].isin(columns.index.tolist())]
    assert host(frame["row"]) == list(range(len(events)))
    assert host(frame["stream_id"]) == [e.stream_id for e in events]
    assert host(kept["kind"]) == columns.kind.tolist()
    assert host(kept["sequence"]) == columns.sequence.tolist()
    assert host(kept["event_time_ms"]) == columns.time_ms.tolist()
    np.testing.assert_array_equal(np.array(host(kept["value"]), np.float64), columns.value)


IDS = st.sampled_from(["a", "b", "ä", "c" * 64, "unknown"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(IDS, st.sampled_from(["liked", "bid", "viewer_count", "watched"]), st.integers(0, 9))))
def test_joining_and_grouping_sum_as_plain_python_does(made: list[tuple[str, str, int]]) -> None:
    events = []
    for place, (stream_id, kind, amount) in enumerate(made):
        fields = {"liked": {"count": amount}, "viewer_count": {"count": amount}, "watched": {"seconds": amount}}
        fields["bid"] = {"amount_minor": amount, "currency": "USD"}
        events.append(event(stream_id, place + 1, **{kind: fields[kind]}))
    slots = {"a": 3, "b": 0, "ä": 7, "c" * 64: 1}
    joined = frames.join_slots(frame_of(events[:100]), list(slots), np.array(list(slots.values()), np.int32), LIBRARY)
    assert host(joined["slot"]) == [slots.get(stream_id, -1) for stream_id, _, _ in made[:100]]
    assert host(joined["row"]) == list(range(len(made[:100])))
    want: Counter[tuple[int, int]] = Counter()
    for row in range(len(joined)):
        slot, kind = host(joined["slot"])[row], host(joined["kind"])[row]
        if slot >= 0:
            want[slot, int(FIRST_COUNTER[kind])] += host(joined["value"])[row]
            if SECOND_COUNTER[kind] >= 0:
                want[slot, int(SECOND_COUNTER[kind])] += 1
    sums = frames.group_by_counter(joined, LIBRARY)
    got = list(zip(host(sums["slot"]), host(sums["counter"]), host(sums["total"])))
    assert [pair[:2] for pair in got] == sorted(want)
    assert [total for *_, total in got] == pytest.approx([want[key] for key in sorted(want)], rel=1e-12)


def test_nothing_joins_to_an_empty_table() -> None:
    joined = frames.join_slots(frame_of([event("a", 1, liked={})]), [], np.zeros(0, np.int32), LIBRARY)
    assert host(joined["slot"]) == [-1] and len(frames.group_by_counter(joined, LIBRARY)) == 0


def test_parquet_brings_back_the_same_columns(tmp_path: Path) -> None:
    frame = frame_of(ONE_OF_EACH)
    frames.to_parquet(frame, tmp_path / "events.parquet")
    again = frames.from_parquet(tmp_path / "events.parquet", LIBRARY)
    assert list(again.columns) == list(frame.columns)
    for name in frame.columns:
        assert host(again[name]) == host(frame[name]) and again[name].dtype == frame[name].dtype, name
    some = frames.from_parquet(tmp_path / "events.parquet", LIBRARY, ["kind", "value"])
    assert list(some.columns) == ["kind", "value"]


def test_the_columns_of_a_table_are_its_used_rows_in_words() -> None:
    table = new_table(SETTINGS)
    apply(
        table,
        started("s", 1, title="Hello", language="en", embedding=[0.0, 3.0, 0.0, 4.0]),
        event("s", 2, epoch=1, heartbeat={"media_sequence": 4}),
        event("s", 3, liked={"count": 8}),
        started("t", 4),
        event("t", 5, epoch=1, ended={}),
    )
    found = frames.table_columns(table, T0 + 5_000).to_pylist()
    assert [(row["stream_id"], row["state"], row["live"]) for row in found] == [
        ("s", "live", True), ("t", "ended", False),
    ]  # fmt: skip
    assert (found[0]["title"], found[0]["creator"], found[0]["language"]) == ("Hello", "creator-s", "en")
    assert found[0]["embedding"] == pytest.approx([0.0, 0.6, 0.0, 0.8]) and found[0]["media_sequence"] == 4
    halved = table.columns.counters[0, COUNTERS.index("liked")] * decay_factors(T0 + 5_000, table.landmark_ms)
    assert [found[0][f"liked_{s}s"] for s in (60, 300, 1800)] == pytest.approx(halved.tolist())
    assert found[0]["liked_60s"] == pytest.approx(8 * 2 ** (-5 / 60), rel=1e-6)


def test_table_export_writes_what_the_running_server_has(tmp_path: Path) -> None:
    with running_app(tmp_path) as client:
        client.publish(started("s", 0), event("s", 0, epoch=1, heartbeat={"media_sequence": 1}))
        client.publish(event("s", 0, liked={}))
        config, out = tmp_path / "liverank.toml", tmp_path / "table.parquet"
        config.write_text(
            f'[table]\ncapacity = 256\nembedding_dim = 4\n[log]\npath = "{tmp_path / "events.sqlite3"}"\n'
        )
        command = [sys.executable, "-m", "server", "table", "export", str(out), "--config", str(config)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("1 rows and ") and "as of offset 2" in done.stdout
        written = pyarrow.parquet.read_table(out)
        table = client.app.engine.table
        assert written["stream_id"].to_pylist() == ["s"] and written.schema.metadata[b"offset"] == b"2"
        assert written["epoch"].to_pylist() == table.columns.epoch[:1].tolist()
        config.write_text(f'[log]\npath = "{tmp_path / "none.sqlite3"}"\n')
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 2 and "log.path" in done.stderr and not (tmp_path / "none.sqlite3").exists()


def test_the_library_follows_the_device_and_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert frames.frame_library(CPU).__name__ == "pandas"
    for backend, name, extra in ((CPU, "pandas", "frames"), (Backend("cuda", "a test", np), "cudf", "gpu")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError, match=rf"data frames need {name}: pip install 'liverank\[{extra}\]'"):
            frames.frame_library(backend)
