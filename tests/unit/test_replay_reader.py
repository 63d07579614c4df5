"""History files: what is read, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.replay.reader import History, Kind, increases, read_history
from server.errors import ConfigError
from tests.histories import broadcast, in_time, row, write_csv, write_parquet

REQUIRED = ("t_folded_s", "event", "video_id", "viewers")


def same(a: History, b: History) -> bool:
    arrays = all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for name in ("t_s", "kind", "stream", "viewers", "likes", "chats")
    )
    return arrays and (a.ids, a.creators, a.categories, a.has_likes) == (b.ids, b.creators, b.categories, b.has_likes)


def test_rows_become_columns_and_streams_are_numbered_as_they_appear(tmp_path: Path) -> None:
    rows = [
        row(0, "start", "b", 7, channel='うさぎ, "quoted"', org="x"),
        row(0, "snapshot", "b", 7, likes_delta=3),
        row(61, "snapshot", "a", 9, comments=4),
        row(122, "end", "b", 0),
    ]
    history = read_history(write_csv(tmp_path / "h.csv", rows))
    assert history.t_s.tolist() == [0, 0, 61, 122]
    assert history.kind.tolist() == [Kind.START, Kind.SNAPSHOT, Kind.SNAPSHOT, Kind.END]
    assert history.ids == ("b", "a")
    assert history.stream.tolist() == [0, 0, 1, 0]
    assert history.viewers.tolist() == [7, 7, 9, 0]
    assert history.likes.tolist() == [0, 3, 0, 0]
    assert history.creators == ('うさぎ, "quoted"', "channel of a")
    assert history.categories == ("x", "org")
    assert history.has_likes


def test_only_four_columns_are_needed_and_others_are_ignored(tmp_path: Path) -> None:
    rows = [row(0, "snapshot", "a", 5, mood="happy")]
    history = read_history(write_csv(tmp_path / "h.csv", rows, (*REQUIRED, "mood")))
    assert history.creators == ("a",) and history.categories == ("",)
    assert not history.has_likes and history.likes.tolist() == [0]


def test_running_totals_become_increases_per_stream(tmp_path: Path) -> None:
    rows = [row(0, "snapshot", "a", likes=10, comments=1), row(0, "snapshot", "b", likes=500, comments=0)]
    rows += [row(60, "snapshot", "a", likes=14, comments=3), row(120, "snapshot", "a", likes=12, comments=3)]
    history = read_history(write_csv(tmp_path / "h.csv", rows, (*REQUIRED, "likes", "comments")))
    assert history.likes.tolist() == [0, 0, 4, 0]
    assert history.chats.tolist() == [0, 0, 2, 0]
    assert history.has_likes


def test_increases_never_fall_and_begin_at_nothing() -> None:
    total = np.array([5, 9, 7, 8, 20], np.int64)
    stream = np.array([0, 1, 0, 1, 1], np.int32)
    assert increases(total, stream).tolist() == [0, 0, 2, 0, 12]


def test_csv_and_parquet_give_the_same_history(tmp_path: Path) -> None:
    rows = in_time(broadcast("a", 0, [5, 6, 7], likes_delta=2) + broadcast("b", 30, [50, 40]))
    assert same(
        read_history(write_csv(tmp_path / "h.csv", rows)), read_history(write_parquet(tmp_path / "h.parquet", rows))
    )


def test_parquet_may_hold_dictionaries_and_whole_floats(tmp_path: Path) -> None:
    table = pa.table(
        {
            "t_folded_s": [0.0, 60.0],
            "event": pa.array(["live_start", "snapshot"]).dictionary_encode(),
            "video_id": pa.array(["a", "a"]).dictionary_encode(),
            "viewers": pa.array([5, 6], pa.uint16()),
        }
    )
    pa.parquet.write_table(table, tmp_path / "h.parquet")
    assert read_history(tmp_path / "h.parquet").viewers.tolist() == [5, 6]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"viewers": -1}, "row 2, column viewers: a whole number from 0 to 4294967295 wanted, got '-1'"),
        ({"viewers": "many"}, "row 2, column viewers: a whole number from 0 to 4294967295 wanted, got 'many'"),
        ({"viewers": ""}, "row 2, column viewers: a whole number from 0 to 4294967295 wanted, got ''"),
        ({"viewers": "1.5"}, "row 2, column viewers: a whole number from 0 to 4294967295 wanted, got '1.5'"),
        ({"viewers": "nan"}, "row 2, column viewers: a whole number from 0 to 4294967295 wanted, got 'nan'"),
        ({"viewers": 2**32}, "row 2, column viewers: a whole number from 0 to 4294967295 wanted, got '4294967296'"),
        ({"likes_delta": -3}, "row 2, column likes_delta: a whole number from 0"),
        ({"comments": "x"}, "row 2, column comments: a whole number from 0"),
        ({"t_folded_s": 59}, "row 2, column t_folded_s: rows must be sorted by it, got 59 after 60"),
        ({"event": "pause"}, "row 2, column event: one of live_start, snapshot, live_end wanted, got 'pause'"),
        ({"video_id": ""}, "row 2, column video_id: a name wanted, got nothing"),
    ],
)
def test_a_bad_cell_is_named_with_file_row_and_column(tmp_path: Path, change: dict[str, object], said: str) -> None:
    path = write_csv(tmp_path / "bad.csv", [row(60, "start", "a"), {**row(60, "snapshot", "a"), **change}])
    with pytest.raises(ConfigError) as caught:
        read_history(path)
    assert str(caught.value).startswith(f"{path}: {said}")


def test_a_bad_cell_of_parquet_is_named_too(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "bad.parquet", [row(0, "snapshot", "a", 3), row(0, "snapshot", "a", -4)])
    with pytest.raises(ConfigError, match=r"row 2, column viewers: a whole number .* got -4"):
        read_history(path)


@pytest.mark.parametrize("wrong", [[True, False], [None, None], [[1], [2]]])
def test_a_parquet_column_of_another_type_is_refused(tmp_path: Path, wrong: list[object]) -> None:
    table = pa.table({"t_folded_s": [0, 1], "event": ["snapshot"] * 2, "video_id": ["a", "a"], "viewers": wrong})
    pa.parquet.write_table(table, tmp_path / "bad.parquet")
    with pytest.raises(ConfigError, match="column viewers: a whole number"):
        read_history(tmp_path / "bad.parquet")


def test_missing_columns_are_named_beside_those_found(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "h.csv", [row(0, "snapshot", "a")], ("t_folded_s", "event", "org"))
    with pytest.raises(ConfigError, match="column video_id, viewers is missing, found t_folded_s, event, org"):
        read_history(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "cannot be read as CSV or Parquet"),
        ("t_folded_s,event,video_id,viewers\n", "no rows"),
        ("t_folded_s,event,video_id,viewers\n0,snapshot,a,1\n0,snapshot,a\n", "Row #3: Expected 4 columns, got 3"),
        ("t_folded_s,event,video_id,viewers,viewers\n0,snapshot,a,1,2\n", "column viewers is there twice"),
        ("PAR1 and then nonsense", "cannot be read as CSV or Parquet"),
    ],
)
def test_a_broken_file_is_refused_with_its_fault(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "h.csv"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_history(path)
    assert said in str(caught.value) and str(path) in str(caught.value)


def test_a_file_that_is_not_there_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        read_history(tmp_path / "nowhere.csv")


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=8)
CELLS = st.builds(
    row,
    t_s=st.integers(0, 10**6),
    event=st.sampled_from(["start", "snapshot", "end"]),
    video_id=NAMES,
    viewers=st.integers(0, 2**32 - 1),
    channel=st.one_of(st.just(""), NAMES),
    likes_delta=st.integers(0, 2**32 - 1),
    comments=st.integers(0, 2**53),
)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(CELLS, min_size=1, max_size=20))
def test_whatever_is_written_is_read_back_from_both_formats(
    rows: list[dict[str, object]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, rows = tmp_path_factory.mktemp("history"), in_time(rows)
    from_csv = read_history(write_csv(folder / "h.csv", rows))
    assert same(from_csv, read_history(write_parquet(folder / "h.parquet", rows)))
    assert [from_csv.ids[i] for i in from_csv.stream] == [r["video_id"] for r in rows]
    assert from_csv.viewers.tolist() == [r["viewers"] for r in rows]
    assert from_csv.likes.tolist() == [r["likes_delta"] for r in rows]
