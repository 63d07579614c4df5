"""Dead impressions: counted by cause, and without any effect on the table."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from liverank.v1 import ingest_pb2 as pb

from kernels import fence
from server.clock import ManualClock
from server.live.columns import Columns
from server.live.impressions import Cause, EndTime, EndTimes, cause_of
from server.live.table import End, LiveTable
from tests.app import Client, running_app
from tests.events import T0, apply, event, new_table, small_settings, started

END = EndTime(ended_ms=1_000, gone_ms=1_010)
TIMES = st.integers(0, 3_000)


@pytest.mark.parametrize(
    ("shown_ms", "served_ms", "verify_by_ms", "cause"),
    [
        (1_000, 900, 1_500, None),  # seen in the very millisecond
        (1_200, 900, 1_500, Cause.CLIENT),  # on its way when it ended
        (1_600, 900, 1_500, Cause.CACHE),  # not asked again
        (1_200, 1_010, 1_500, Cause.CLIENT),  # replied while the end was on its way to the disk
        (1_200, 1_011, 1_500, Cause.US),
        (1_600, 1_011, 1_500, Cause.US),  # whatever the cache did, we must not have served it
    ],
)
def test_a_dead_impression_has_one_cause(shown_ms: int, served_ms: int, verify_by_ms: int, cause: Cause | None) -> None:
    assert cause_of(shown_ms, served_ms, verify_by_ms, END) is cause
    assert cause_of(shown_ms, served_ms, verify_by_ms, None) is None, "a session that has not ended is not dead"


@given(TIMES, TIMES, TIMES)
def test_we_are_never_blamed_for_a_reply_made_before_the_end(shown: int, served: int, verify_by: int) -> None:
    cause = cause_of(shown, served, verify_by, END)
    assert (cause is None) == (shown <= END.ended_ms)
    assert cause is not Cause.US or served > END.gone_ms


def test_the_memory_of_ends_is_bounded_and_tells_sessions_apart() -> None:
    ends = EndTimes(2)
    ends.remember([End("s", 1, 0, "x")], 10, 11)
    ends.remember([End("s", 2, 0, "x")], 20, 21)
    ends.remember([End("s", 1, 0, "again")], 30, 31)
    assert ends.of("s", 1) == EndTime(10, 11) and ends.of("s", 2) == EndTime(20, 21) and ends.of("s", 3) is None
    ends.remember([End("t", 1, 0, "x")], 40, 41)
    assert ends.of("s", 1) is None and ends.of("t", 1) is not None


def impression(stream_id: str, sequence: int, at_ms: int = T0, epoch: int = 1, **more: int) -> pb.Event:
    return event(
        stream_id, sequence, at_ms, epoch, "v", impression={"served_ms": T0, "verify_by_ms": T0 + 10_000, **more}
    )


def snapshot(table: LiveTable) -> list[bytes]:
    return [getattr(table.columns, f.name).tobytes() for f in fields(Columns)]


def test_an_impression_changes_nothing_whatever_the_state_of_its_stream() -> None:
    table = new_table(small_settings())
    apply(table, started("live", 1), started("over", 2), event("over", 3, epoch=1, ended={}), started("suspect", 4))
    apply(table, event("live", 5, T0 + 9_000, 1, heartbeat={"media_sequence": 1}), at_ms=T0 + 9_000)
    table.expire(T0 + 11_000)
    before = snapshot(table)
    made = [impression(s, 10 + i, T0 + 11_000) for i, s in enumerate(("live", "over", "suspect"))]
    assert apply(table, *made, at_ms=T0 + 11_000).codes.tolist() == [0, 0, 0]
    assert snapshot(table) == before
    assert table.columns.state[:3].tolist() == [fence.LIVE, fence.ENDED, fence.SUSPECT]
    codes = apply(table, impression("ghost", 20), impression("live", 21, epoch=2), made[0], at_ms=T0 + 11_000).codes
    assert codes.tolist() == [pb.UNKNOWN_STREAM, pb.EPOCH_UNKNOWN, pb.DUPLICATE_SEQUENCE]


def counted(client: Client) -> dict[str, float]:
    metrics = client.app.metrics
    causes = {cause.value: metrics.dead_impressions.labels(cause.value)._value.get() for cause in Cause}
    return {"all": metrics.impressions._value.get(), **causes}


def test_impressions_after_an_end_are_counted_by_cause_across_sessions_and_a_restart(tmp_path: Path) -> None:
    clock = ManualClock(T0)
    with running_app(tmp_path, clock) as client:
        client.publish(started("s", 0))
        client.tick()
        reply = client.rank()
        (seen,) = reply.streams
        served = {"served_ms": reply.as_of_ms, "verify_by_ms": seen.verify_by_ms}
        clock.advance(1_000)
        client.publish(event("s", 0, T0 + 1_000, epoch=1, ended={}))
        clock.advance(1_000)
        client.publish(started("s", 0, T0 + 2_000, epoch=2))  # the first session stays over
        clock.advance(20_000)
        assert counted(client) == {"all": 0, "us": 0, "cache": 0, "client": 0}
        client.publish(
            impression("s", 0, T0 + 500, **served),
            impression("s", 0, T0 + 1_500, **served),
            impression("s", 0, T0 + 15_000, **served),
            impression("s", 0, T0 + 2_500, 2, **served),
        )
        assert counted(client) == {"all": 4, "us": 0, "cache": 1, "client": 1}
        client.publish(impression("s", 0, T0 + 1_500, **{**served, "served_ms": T0 + 1_200}))
        assert counted(client)["us"] == 1, "a reply that we should not have made"
        bad = client.publish(impression("s", 0, served_ms=0))
        assert bad.rejected[0].message == "impression.served_ms: 1 to 4102444799999 allowed, got 0"
    with running_app(tmp_path, clock) as client:
        client.publish(impression("s", 0, T0 + 1_500, **served), producer="again")
        assert counted(client) == {"all": 1, "us": 0, "cache": 0, "client": 1}
        client.app.snapshots.take()
    with running_app(tmp_path, clock) as client:  # the end is in the snapshot, and in no record that is replayed
        client.publish(impression("s", 0, T0 + 1_500, **served), producer="third")
        client.publish(impression("s", 0, T0 + 900, **served), producer="third")
        assert counted(client) == {"all": 2, "us": 0, "cache": 0, "client": 1}


def test_columns_of_a_batch_with_impressions_line_up() -> None:
    table = new_table(small_settings())
    apply(table, started("s", 1))
    codes = apply(table, event("s", 2, liked={}), impression("s", 3), event("s", 4, chatted={})).codes
    assert codes.tolist() == [0, 0, 0] and np.count_nonzero(table.counters_seen) == 2
