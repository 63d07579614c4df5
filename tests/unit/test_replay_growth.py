"""Sessions and the truth about growth, by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from loadtest.replay.growth import Overlap, Reports, Truth, bins, highest, truth_at
from loadtest.replay.reader import read_history
from loadtest.replay.sessions import NEVER_S, Sessions, split_sessions
from tests.histories import Row, broadcast, in_time, row, write_csv

SILENCE_S = 1_200


def sessions_of(tmp_path: Path, rows: list[Row]) -> Sessions:
    return split_sessions(read_history(write_csv(tmp_path / "h.csv", rows)), SILENCE_S)


def reports_of(tmp_path: Path, rows: list[Row]) -> Reports:
    history = read_history(write_csv(tmp_path / "h.csv", in_time(rows)))
    return Reports(history, split_sessions(history, SILENCE_S))


def test_a_stream_that_reappears_after_its_end_begins_a_new_session(tmp_path: Path) -> None:
    rows = [row(0, "start", "a"), row(0, "snapshot", "a"), row(60, "end", "a"), row(120, "snapshot", "a")]
    sessions = sessions_of(tmp_path, rows)
    assert sessions.of_row.tolist() == [0, 0, 0, 1]
    assert sessions.epoch.tolist() == [1, 1, 1, 2]
    assert sessions.opens.tolist() == [True, False, False, True]
    assert sessions.media.tolist() == [0, 1, 1, 1]
    assert sessions.end_s.tolist() == [60, NEVER_S]


def test_a_snapshot_without_a_start_begins_a_session(tmp_path: Path) -> None:
    sessions = sessions_of(tmp_path, [row(5, "snapshot", "a"), row(65, "snapshot", "a")])
    assert sessions.opens.tolist() == [True, False]
    assert sessions.start_s.tolist() == [5]
    assert sessions.media.tolist() == [1, 2]


def test_a_second_start_ends_the_session_before_it(tmp_path: Path) -> None:
    sessions = sessions_of(tmp_path, [row(0, "start", "a"), row(300, "start", "a")])
    assert sessions.epoch.tolist() == [1, 2]
    assert sessions.end_s.tolist() == [300, NEVER_S]


@pytest.mark.parametrize(("gap_s", "epochs"), [(1_140, [1, 1, 1]), (1_200, [1, 1, 2])])
def test_a_silence_splits_from_the_moment_on_at_which_the_lease_and_grace_are_over(
    tmp_path: Path, gap_s: int, epochs: list[int]
) -> None:
    rows = [row(0, "start", "a"), row(60, "snapshot", "a"), row(60 + gap_s, "snapshot", "a")]
    assert sessions_of(tmp_path, rows).epoch.tolist() == epochs


def test_an_end_of_a_stream_that_never_began_belongs_to_no_session(tmp_path: Path) -> None:
    sessions = sessions_of(tmp_path, [row(0, "end", "a")])
    assert sessions.of_row.tolist() == [-1] and len(sessions.stream) == 0


def test_a_report_is_known_from_its_moment_on_and_readable_for_ten_minutes(tmp_path: Path) -> None:
    rows = [
        row(60, "start", "a"),
        row(60, "snapshot", "a", 7, likes_delta=2),
        row(120, "snapshot", "a", 9, likes_delta=3),
    ]
    reports = reports_of(tmp_path, [*rows, row(3_000, "snapshot", "b", 1)])
    assert [int(reports.last(t)[0]) for t in (-5, 0, 59, 60, 119, 120, 3_000)] == [-1, -1, -1, 0, 0, 1, 1]
    assert reports.value(reports.viewers, reports.last(119))[0] == 7
    assert reports.value(reports.likes, reports.last(120))[0] == 5
    assert [bool(reports.readable(t, reports.last(t))[0]) for t in (59, 60, 720, 721)] == [False, True, True, False]


def test_likes_of_a_new_session_begin_at_nothing(tmp_path: Path) -> None:
    rows = broadcast("a", 0, [5, 5], likes_delta=4) + broadcast("a", 600, [5, 5], likes_delta=1)
    assert reports_of(tmp_path, rows).likes.tolist() == [4, 8, 1, 2]


def test_an_ended_stream_is_not_readable_at_the_moment_of_its_end(tmp_path: Path) -> None:
    reports = reports_of(tmp_path, broadcast("a", 0, [5, 5, 5]))
    assert [bool(reports.readable(t, reports.last(t))[0]) for t in (119, 120)] == [True, False]


def crowd(n: int, minutes: int = 30) -> list[Row]:
    """Stream i: 100 + i viewers, and from minute 16 on i² more for i < 12 and nothing more for the others."""
    rows: list[Row] = []
    for i in range(n):
        later = 100 + i + (i * i if i < 12 else 0)
        rows += broadcast(f"s{i:02d}", 0, [100 + i] * 16 + [later] * (minutes - 15))
    return rows


def test_the_truth_of_thirty_streams_is_what_one_computes_by_hand(tmp_path: Path) -> None:
    truth = truth_at(reports_of(tmp_path, crowd(30)), 300, 1_800)
    assert truth is not None and truth.streams.tolist() == list(range(30))
    # v15 is 100 + i + i² for i < 12: 110 + 100 = 210, 111 + 121 = 232, 109 + 81 = 190, …; 100 + i for the others.
    assert truth.tops["viewers"] == {11, 10, 9, 8, 7, 6, 5, 29, 28, 27}
    assert truth.tops["absolute_growth"] == {11, 10, 9, 8, 7, 6, 5, 4, 3, 2}
    assert truth.tops["relative_growth"] == {11, 10, 9, 8, 7, 6, 5, 4, 3, 2}


def test_relative_growth_prefers_the_small_stream_with_the_same_gain(tmp_path: Path) -> None:
    rows = [r for i in range(30) for r in broadcast(f"s{i:02d}", 0, [20 + 10 * i] * 16 + [30 + 10 * i] * 15)]
    truth = truth_at(reports_of(tmp_path, rows), 300, 1_800)
    assert truth is not None
    assert truth.tops["relative_growth"] == set(range(10))
    assert truth.tops["viewers"] == set(range(20, 30))


def test_streams_too_small_or_about_to_end_are_no_candidates(tmp_path: Path) -> None:
    rows = crowd(30) + broadcast("small", 0, [19] * 31) + broadcast("ends", 0, [500] * 20)
    reports = reports_of(tmp_path, rows)
    truth = truth_at(reports, 300, 1_800)
    assert truth is not None and truth.streams.tolist() == list(range(30))


def test_a_bin_without_thirty_candidates_or_without_a_future_does_not_count(tmp_path: Path) -> None:
    assert truth_at(reports_of(tmp_path, crowd(29)), 300, 1_800) is None
    reports = reports_of(tmp_path, crowd(30))
    assert truth_at(reports, 600, 1_499) is None
    assert truth_at(reports, 600, 1_500) is not None


def test_bins_are_the_full_five_minutes_inside_the_file() -> None:
    assert list(bins(0, 900)) == [0, 300, 600, 900]
    assert list(bins(1, 899)) == [300, 600]


def test_equal_values_keep_their_order() -> None:
    assert highest(np.array([1.0, 3.0, 2.0, 3.0]), 3).tolist() == [1, 3, 2]


def test_overlap_is_the_mean_share_of_the_truly_highest() -> None:
    top = frozenset(range(10))
    truth = Truth(0, np.arange(30), np.arange(30), {"viewers": top, "absolute_growth": top, "relative_growth": top})
    overlap = Overlap()
    assert overlap.means() == {"viewers": None, "absolute_growth": None, "relative_growth": None}
    overlap.add(truth, np.arange(10))
    overlap.add(truth, np.array([0, 25, 26], np.int32))  # what a short feed leaves out is missed
    assert overlap.means()["viewers"] == 0.55
    with pytest.raises(ValueError, match="at most 10"):
        overlap.add(truth, np.arange(11))
