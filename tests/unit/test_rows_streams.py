"""Rows of every live stream: the state at a full minute, and how its crowd grew afterwards."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from liverank.v1 import ingest_pb2 as pb

from models import labels
from models.rows.cursor import Cursor
from models.rows.streams import MINUTE_MS, StreamRows
from models.schema import RowTable
from tests.app import FEATURES
from tests.events import T0, event, started
from tests.rows import Log, act, table_of

TO_MINUTE = -T0 % MINUTE_MS
"""T0 plus this is a full minute."""
CLOSED = 20


def at(minutes: float) -> int:
    """ms after T0 of so many minutes after the first full minute."""
    return TO_MINUTE + int(minutes * MINUTE_MS)


def tell(log: Log, minutes: float, *events: pb.Event) -> int:
    """One batch stamped at that minute, its events dated then unless they are dated already."""
    return log.add(at(minutes), *events)


def ended(stream_id: str, minutes: float, epoch: int = 1) -> pb.Event:
    return event(stream_id, 0, T0 + at(minutes), epoch, ended={"reason": "x"})


def begun(*ids: str) -> Log:
    log = Log()
    log.add(at(-0.5), *(started(name, 0, T0 + at(-0.5)) for name in ids))
    return log


def rows_of(log: Log, every_minutes: int = 1) -> tuple[RowTable, Counter[str]]:
    emitted: list[Any] = []
    job = StreamRows(Cursor(log.table, FEATURES), emitted.append, every_minutes)
    log.play(job)
    return table_of(emitted), +job.told


def only(rows: RowTable, stream_id: str, minute: int) -> dict[str, Any]:
    (row,) = np.flatnonzero((rows["stream_id"] == stream_id) & (rows["at_ms"] == T0 + at(minute)))
    return {name: values[row] for name, values in rows.columns.items()}


def test_the_state_holds_what_was_stamped_up_to_the_minute_and_nothing_later() -> None:
    log = begun("s")
    tell(log, 0, act("s", at(0), viewer_count={"count": 10}))
    tell(log, 0.001, act("s", at(0), viewer_count={"count": 99}))
    tell(log, 1, act("s", at(1), viewer_count={"count": 20}))
    tell(log, CLOSED, started("z", 0, T0 + at(CLOSED)))
    rows, _ = rows_of(log)
    gauge = FEATURES.names.index("viewers")
    assert [only(rows, "s", m)["features"][gauge] for m in (0, 1)] == [10.0, 20.0]
    assert [only(rows, "s", m)["offset"] for m in (0, 1)] == [2, 4]


def test_growth_is_absolute_and_relative_and_an_end_is_a_fall_to_nothing() -> None:
    log = begun("b", "a")
    tell(log, 0, act("a", at(0), viewer_count={"count": 60}), act("b", at(0), viewer_count={"count": 40}))
    tell(log, 5, act("a", at(5), viewer_count={"count": 100}))
    tell(log, 7, ended("b", 7))
    tell(log, 15, act("a", at(15), viewer_count={"count": 20}))
    tell(log, CLOSED, started("z", 0, T0 + at(CLOSED)))
    rows, _ = rows_of(log)
    assert rows["stream_id"][:2].tolist() == ["a", "b"] and (np.diff(rows["at_ms"]) >= 0).all()
    a, b = only(rows, "a", 0), only(rows, "b", 0)
    assert (a["viewers_before_5m"], a["viewers_after_5m"], a["viewers_gain_5m"], a["viewers_growth_5m"]) == (
        60.0, 100.0, 40.0, 0.5
    )  # fmt: skip
    assert (a["viewers_gain_15m"], a["viewers_growth_15m"], a["live_after_15m"]) == (-40.0, -0.5, True)
    assert (b["live_after_5m"], b["viewers_after_5m"], b["viewers_gain_5m"]) == (True, 40.0, 0.0)
    assert (b["live_after_15m"], b["viewers_after_15m"], b["viewers_gain_15m"]) == (False, 0.0, -40.0)
    assert not len(np.flatnonzero((rows["stream_id"] == "b") & (rows["at_ms"] >= T0 + at(7))))
    assert np.isnan([a["engaged_after_5m"], a["value_gain_15m"]]).all(), "nobody tells of watching or buying here"


def test_engagement_and_value_are_sums_of_events_by_their_own_time_in_windows_that_touch() -> None:
    log = begun("s")
    for minute in range(15):  # 60 s watched by two people in every minute
        tell(log, minute + 0.5, act("s", at(minute + 0.5), watched={"seconds": 120.0}))
    bought = {"amount_minor": 1_000, "currency": "USD"}
    tell(log, 16, act("s", at(15), purchased=bought))  # exactly then: before
    tell(log, 16.5, act("s", at(15) + 1, purchased=bought))
    tell(log, 20, act("s", at(20), watched={"seconds": 300.0}))
    tell(log, 21.9, act("s", at(20), purchased=bought))  # late, and still in time
    tell(log, 32.1, act("s", at(20), purchased=bought))  # the labels are closed
    tell(log, 40, started("z", 0, T0 + at(40)))
    row = only(rows_of(log)[0], "s", 15)
    assert (row["engaged_before_5m"], row["engaged_before_15m"], row["engaged_after_5m"]) == (2.0, 2.0, 1.0)
    assert (row["value_before_5m"], row["value_after_5m"]) == (10.0, 20.0)
    assert (row["value_gain_5m"], row["value_growth_5m"]) == (10.0, pytest.approx(10 / 30))
    early = only(rows_of(log)[0], "s", 14)
    assert np.isnan(early["engaged_before_15m"]) and early["engaged_before_5m"] == 2.0, "the log begins too late"


def test_a_row_that_becomes_another_stream_takes_no_labels_along() -> None:
    log = Log(log_table := begun().table.model_copy(update={"capacity": 1}))
    assert log_table.tombstone_ms < 12 * MINUTE_MS
    log.add(at(-0.5), started("old", 0, T0 + at(-0.5)))
    tell(log, 0, act("old", at(0), viewer_count={"count": 50}, viewer="v"))
    tell(log, 4.5, act("old", at(4.5), watched={"seconds": 9_000.0}), ended("old", 4.5))
    tell(log, 17, started("new", 0, T0 + at(17)), act("new", at(17), viewer_count={"count": 70}))
    tell(log, 17.5, act("new", at(17.5), watched={"seconds": 600.0}))
    tell(log, 40, started("z", 0, T0 + at(40)))
    rows, _ = rows_of(log)
    old, new = only(rows, "old", 4), only(rows, "new", 18)
    assert (old["live_after_15m"], old["viewers_after_15m"]) == (False, 0.0)
    assert new["engaged_before_15m"] == pytest.approx(600 / 900) and new["viewers_before_5m"] == 70.0


def test_moments_are_at_full_multiples_and_open_ones_are_not_emitted() -> None:
    log = begun("s")
    close_ms = at(0) + (max(labels.HORIZONS_MINUTES) * MINUTE_MS + labels.LATE_MS)
    log.add(close_ms + 1, started("z", 0, T0 + close_ms + 1))
    rows, told = rows_of(log)
    assert rows["at_ms"].tolist() == [T0 + at(0)] and told["labels not closed"] > 10
    log = begun("s")
    log.add(close_ms, started("z", 0, T0 + close_ms))
    assert len(rows_of(log)[0]) == 0
    log = begun("s")
    tell(log, 60, started("z", 0, T0 + at(60)))
    minutes = rows_of(log, every_minutes=7)[0]["at_ms"] // MINUTE_MS
    assert len(minutes) > 4 and not (minutes % 7).any() and set(np.diff(minutes)) == {7}


def test_growth_of_labels_names_the_measure() -> None:
    gain, growth = labels.growth(np.array([20.0, np.nan]), np.array([60.0, 1.0]), "viewers")
    assert gain[0] == 40.0 and growth[0] == 1.0 and np.isnan(growth[1])
    with pytest.raises(KeyError):
        labels.growth(gain, gain, "likes")
