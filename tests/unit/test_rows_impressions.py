"""Which state an impression's features come from, and which events are its labels."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from kernels.idmap import pack_ids
from models import labels
from models.rows.base import LeakError
from models.rows.cursor import Cursor
from models.rows.impressions import ImpressionRows, check_no_leak
from models.schema import RowTable
from server.config import ViewerSettings
from server.scoring.ranker_schema import SEQUENCE
from tests.app import FEATURES
from tests.events import T0, started
from tests.rows import Log, act, impression, table_of

CLOSED_MS = labels.WINDOW_MS + labels.LATE_MS + 60_000
MINUTE = 60_000


def beginning() -> Log:
    """Stream s is live, and so is t; offset 1."""
    log = Log()
    t = started("t", 0, embedding=[0.6, 0.8, 0.0, 0.0])
    log.add(0, started("s", 0, creator_id="ann", category="art", language="en"), t)
    return log


def rows_of(log: Log, **options: Any) -> tuple[RowTable, Counter[str]]:
    emitted: list[Any] = []
    job = ImpressionRows(Cursor(log.table, FEATURES), emitted.append, **options)
    log.play(job)
    return table_of(emitted), +job.told


def viewers_at(log: Log, offset: int, at_ms: int) -> np.ndarray[Any, Any]:
    """All features of stream s after record ``offset``, the plain way."""
    cursor = Cursor(log.table, FEATURES)
    for committed in log.records[:offset]:
        cursor.apply(committed)
    return cursor.read(np.zeros(1, np.int32), at_ms).features[0]


def counted(log: Log, times: int) -> None:
    """A viewer count per second: every state differs from the one before."""
    for second in range(1, times + 1):
        log.add(1_000 * second, act("s", 1_000 * second, viewer_count={"count": 10 * second}))


def test_features_are_those_of_the_offset_and_moment_at_which_the_slate_was_made() -> None:
    log = beginning()
    counted(log, 8)  # offsets 2 to 9
    log.add(9_000, impression("s", 8_500, served_ms=T0 + 4_500, applied_offset=5, position=3, propensity=0.25,
                              model_version="m/1", request_id="r"))  # fmt: skip
    log.add(CLOSED_MS, started("u", 0))
    rows, told = rows_of(log)
    assert len(rows) == 1 and not told
    assert rows["features"][0].tobytes() == viewers_at(log, 5, T0 + 4_500).tobytes()
    assert rows.features[0][FEATURES.names.index("viewers")] == 40.0
    expected = {
        "at_ms": T0 + 4_500, "offset": 5, "impression_ms": T0 + 8_500, "impression_offset": 10, "impression_index": 0,
        "viewer_id": "v", "request_id": "r", "stream_id": "s", "epoch": 1, "position": 2, "propensity": 0.25,
        "model_version": "m/1", "creator": "ann", "category": "art", "language": "en", "label_offset": 0,
    }  # fmt: skip
    assert {name: rows[name][0] for name in expected} == expected


def test_a_log_of_columns_gives_the_rows_of_one_of_messages() -> None:
    log = beginning()
    counted(log, 8)
    told = {"applied_offset": 5, "position": 3, "propensity": 0.25, "model_version": "m/1", "request_id": "r"}
    log.add(9_000, act("s", 8_400, liked={}), impression("s", 8_500, served_ms=T0 + 4_500, **told),
            impression("ghost", 8_500), impression("t", 8_600, viewer="w", position=2))  # fmt: skip
    log.add(10_000, act("s", 9_500, "v", joined={}))
    log.add(CLOSED_MS, started("u", 0))
    (ours, left_out), (theirs, also_left_out) = rows_of(log.in_columns()), rows_of(log)
    assert len(ours) == 2 and ours["clicked"].any() and left_out == also_left_out
    for name, column in theirs.columns.items():
        np.testing.assert_array_equal(ours[name], column, name)


def test_without_an_offset_it_is_the_state_of_all_records_stamped_before_the_reply() -> None:
    log = beginning()
    counted(log, 8)
    log.add(9_000, impression("s", 8_500, served_ms=T0 + 4_000))  # of that very stamp: not before
    log.add(9_000, impression("s", 8_500, served_ms=T0 + 4_001, position=1))
    log.add(CLOSED_MS, started("u", 0))
    rows, _ = rows_of(log)
    assert rows["offset"].tolist() == [4, 5] and rows["position"].tolist() == [-1, 0]


@pytest.mark.parametrize("claimed", [0, 2, 3, 99])
def test_whatever_a_client_claims_its_own_record_is_not_in_the_state(claimed: int) -> None:
    log = beginning()
    chat = act("s", 900, "v", chatted={})
    own = log.add(1_000, chat, impression("s", 500, served_ms=T0 + 9_999, applied_offset=claimed))
    log.add(CLOSED_MS, started("u", 0))
    rows, told = rows_of(log)
    assert rows["offset"].tolist() == [own - 1] and rows["at_ms"].tolist() == [T0 + 1_000] and not told


def test_an_impression_told_long_after_its_slate_was_made_is_left_out_and_counted() -> None:
    log = beginning()
    log.add(20_000, act("s", 20_000, liked={}))
    log.add(90_000, act("s", 90_000, liked={}))
    log.add(100_001, impression("s", 100_000, served_ms=T0 + 10, applied_offset=1), impression("s", 100_000))
    log.add(CLOSED_MS + 100_000, started("u", 0))
    rows, told = rows_of(log, look_ahead_ms=50_000)
    assert rows["offset"].tolist() == [3] and told == {"served too long before it was told": 1}
    rows, told = rows_of(log, look_ahead_ms=120_000)
    assert rows["offset"].tolist() == [1, 3] and not told


def test_refused_impressions_and_those_of_unknown_sessions_are_left_out() -> None:
    log = beginning()
    first = impression("s", 1_000)
    log.add(1_000, first)
    log.add(2_000, first, impression("s", 1_500, applied_offset=1, served_ms=T0 - 10))
    log.add(3_000, impression("ghost", 2_500))
    log.add(CLOSED_MS, started("u", 0))
    rows, told = rows_of(log)
    assert rows["impression_offset"].tolist() == [2, 3]
    assert told == {"refused": 1, "no such session in that state": 1}


def labelled(*events: Any) -> RowTable:
    """Rows of an impression of s at 1 s, then single events, each in a record of its own at its time."""
    log = beginning()
    for one in (impression("s", 1_000), *events):
        log.add(one.event_time_ms - T0, one)
    log.add(3 * CLOSED_MS, started("u", 0))
    return rows_of(log)[0]


def test_what_the_viewer_does_with_the_stream_is_the_label() -> None:
    rows = labelled(
        act("s", 2_000, "v", joined={}),
        act("s", 12_000, "v", watched={"seconds": 10.0}),
        act("s", 34_000, "v", watched={"seconds": 22.0}),
        act("s", 35_000, "v", purchased={"amount_minor": 250, "currency": "USD"}),
        act("s", 36_000, "v", reported={"reason": "spam"}),
    )
    got = [rows[name][0] for name in ("clicked", "watch_s", "watched", "purchased", "purchase_value", "reported")]
    assert got == [True, 32.0, True, True, 2.5, True] and rows["label_offset"].tolist() == [3]


def test_nobody_elses_deeds_and_no_other_streams_are() -> None:
    rows = labelled(
        impression("s", 1_000, viewer=""),
        act("s", 2_000, "w", joined={}),
        act("s", 2_000, joined={}),
        act("t", 2_000, "v", joined={}),
        act("s", 900, "v", joined={}),
        act("s", 2_000, "v", chatted={}),
        act("s", 9_000, watched={"seconds": 99.0}),
    )
    assert not rows["clicked"].any() and not rows["watch_s"].any() and not rows["label_offset"].any()


@pytest.mark.parametrize(
    ("after_ms", "counts"),
    [
        (labels.CLICK_WITHIN_MS, (True, True)),
        (labels.CLICK_WITHIN_MS + 1, (False, True)),
        (labels.WINDOW_MS, (False, True)),
        (labels.WINDOW_MS + 1, (False, False)),
    ],
)
def test_windows_end_to_the_millisecond(after_ms: int, counts: tuple[bool, bool]) -> None:
    at_ms = 1_000 + after_ms
    rows = labelled(act("s", at_ms, "v", joined={}), act("s", at_ms, "v", reported={"reason": ""}))
    assert (rows["clicked"][0], rows["reported"][0]) == counts


def test_an_event_counts_for_the_last_impression_before_it_and_watching_for_the_one_that_was_clicked() -> None:
    rows = labelled(
        act("s", 2_000, "v", joined={}),
        impression("s", 5_000),
        act("s", 9_000, "v", watched={"seconds": 7.0}),
        impression("s", 20_000),
        act("s", 21_000, "v", joined={}),
        act("s", 30_000, "v", watched={"seconds": 9.0}),
        act("s", 31_000, "v", purchased={"amount_minor": 100, "currency": "USD"}),
    )
    assert rows["clicked"].tolist() == [True, False, True] and rows["watch_s"].tolist() == [7.0, 0.0, 9.0]
    assert rows["purchase_value"].tolist() == [0.0, 0.0, 1.0]


def test_a_resent_impression_keeps_its_labels_on_the_one_that_was_accepted() -> None:
    first = impression("s", 1_000)
    log = beginning()
    log.add(1_000, first)
    log.add(2_000, act("s", 2_000, "v", joined={}))
    log.add(3_000, first)
    log.add(CLOSED_MS, started("u", 0))
    rows, told = rows_of(log)
    assert rows["clicked"].tolist() == [True] and told == {"refused": 1}


def test_late_events_count_until_the_labels_are_closed_by_the_stamps_of_the_log() -> None:
    close_ms = 1_000 + labels.WINDOW_MS + labels.LATE_MS
    for stamp_ms, counts in ((close_ms, True), (close_ms + 1, False)):
        log = beginning()
        log.add(1_000, impression("s", 1_000))
        log.add(stamp_ms, act("s", 600_000, "v", reported={"reason": ""}))
        log.add(stamp_ms + 100_000, started("u", 0))
        assert rows_of(log)[0]["reported"].tolist() == [counts]


def test_an_impression_that_is_told_after_its_click_gets_it_all_the_same() -> None:
    log = beginning()
    log.add(1_500, act("s", 1_500, "v", joined={}), producer="app")
    log.add(4_000, impression("s", 1_000, applied_offset=1))
    log.add(CLOSED_MS, started("u", 0))
    rows, _ = rows_of(log)
    assert rows["clicked"].tolist() == [True]
    assert (rows["offset"][0], rows["label_offset"][0], rows["impression_offset"][0]) == (1, 2, 3)


def test_an_event_that_is_in_the_state_already_is_no_consequence_of_it() -> None:
    """Its producer's clock is ahead: it says it came after the slate that was ranked knowing it."""
    log = beginning()
    log.add(1_500, act("s", 3_000, "v", joined={}))
    log.add(2_000, impression("s", 2_000, applied_offset=2))
    log.add(CLOSED_MS, started("u", 0))
    assert rows_of(log)[0]["clicked"].tolist() == [False]


def test_rows_whose_window_is_open_when_the_log_ends_are_not_emitted() -> None:
    close_ms = 1_000 + labels.WINDOW_MS + labels.LATE_MS
    for stamp_ms, emitted in ((close_ms, 0), (close_ms + 1, 1)):
        log = beginning()
        log.add(1_000, impression("s", 1_000))
        log.add(stamp_ms, started("u", 0))
        rows, told = rows_of(log)
        assert len(rows) == emitted and told == ({} if emitted else {"labels not closed": 1})


def test_a_viewers_history_is_that_of_the_state_in_which_the_slate_was_made() -> None:
    log = beginning()
    log.add(1_000, act("t", 1_000, "v", joined={}))
    log.add(2_000, act("t", 2_000, "v", watched={"seconds": 40}), act("s", 2_000, "w", liked={}))
    log.add(3_000, act("t", 3_000, "v", purchased={"amount_minor": 100, "currency": "USD"}))
    served = ((1, 500), (2, 1_500), (3, 62_000))
    log.add(
        62_000,
        *(impression("s", 62_000, served_ms=T0 + at, applied_offset=offset) for offset, at in served),
        impression("s", 62_500, "", served_ms=T0 + 62_000),
        impression("s", 62_500, "x"),
    )
    log.add(CLOSED_MS + 62_000, started("u", 0))
    emitted: list[Any] = []
    job = ImpressionRows(Cursor(log.table, FEATURES, viewers=ViewerSettings(capacity=10, sessions=10)), emitted.append)
    log.play(job)
    rows = table_of(emitted)
    meta = rows["recent_meta"].reshape(len(rows), SEQUENCE, 4)
    assert meta[:, 0].tolist() == [
        [0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, pytest.approx(0.1), 1.0],
        [np.float32(np.log1p(1.0)), np.float32(np.log1p(40.0)), pytest.approx(0.5), 1.0],  # not yet bought
        [0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0],
    ]
    assert not meta[:, 1:].any() and rows["recent_embeddings"].dtype == np.float16
    table = Cursor(log.table, FEATURES).table
    for committed in log.records[:1]:
        assert committed.batch is not None
        table.apply(committed.batch.events, committed.record.applied_ms)
    of_t = table.columns.embedding[int(table.map.lookup(*pack_ids([b"t"]))[0])]
    np.testing.assert_array_equal(rows["recent_embeddings"][2][: len(of_t)], of_t.astype(np.float16))
    assert of_t.any()


@pytest.mark.parametrize(("offset", "label", "own"), [(5, 5, 9), (5, 4, 9), (5, 0, 5), (5, 7, 5)])
def test_a_row_that_knows_its_future_is_refused(offset: int, label: int, own: int) -> None:
    with pytest.raises(LeakError):
        check_no_leak(*(np.array([1, value]) for value in (offset,)), np.array([0, label]), np.array([2, own]))
    check_no_leak(np.array([5, 5]), np.array([6, 0]), np.array([6, 6]))
