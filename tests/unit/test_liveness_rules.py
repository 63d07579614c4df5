"""What may change a stream, and when it is live: epochs, leases, ends, duplicates (invariants 3 and 5)."""

from __future__ import annotations

import numpy as np
import pytest
from liverank.v1 import ingest_pb2 as pb
from numpy.typing import NDArray

from kernels import fence
from server.live.events import decode_batch
from server.live.table import LiveTable
from tests.events import T0, apply, event, new_table, small_settings, started

LEASE, GRACE, TOMBSTONE = 10_000, 20_000, 700_000


@pytest.fixture
def table() -> LiveTable:
    table = new_table(small_settings())
    apply(table, started("s", 1))
    return table


def state(table: LiveTable, stream_id: str = "s") -> int:
    from kernels.idmap import pack_ids

    slot = int(table.map.lookup(*pack_ids([stream_id.encode()]))[0])
    return int(table.columns.state[slot]) if slot >= 0 else fence.FREE


def heartbeat(sequence: int, media: int, at_ms: int, epoch: int = 1) -> pb.Event:
    return event("s", sequence, at_ms, epoch, heartbeat={"media_sequence": media})


def test_a_start_grants_one_lease(table: LiveTable) -> None:
    assert table.columns.lease_expires_ms[0] == T0 + LEASE
    assert table.live_mask(T0 + LEASE - 1)[0] and not table.live_mask(T0 + LEASE)[0]


def test_a_heartbeat_with_media_progress_renews_the_lease(table: LiveTable) -> None:
    applied = apply(table, heartbeat(2, 7, T0 + 5_000), at_ms=T0 + 5_000)
    assert applied.renewed[0] and table.columns.lease_expires_ms[0] == T0 + 5_000 + LEASE


def test_a_heartbeat_without_media_progress_renews_nothing(table: LiveTable) -> None:
    apply(table, heartbeat(2, 7, T0 + 1_000), at_ms=T0 + 1_000)
    applied = apply(table, heartbeat(3, 7, T0 + 5_000), heartbeat(4, 6, T0 + 5_000), at_ms=T0 + 5_000)
    assert applied.codes.tolist() == [0, 0] and not applied.renewed.any()
    assert table.columns.lease_expires_ms[0] == T0 + 1_000 + LEASE


def test_nothing_but_a_heartbeat_renews_a_lease(table: LiveTable) -> None:
    apply(
        table,
        event("s", 2, T0 + 5_000, chatted={}),
        event("s", 3, T0 + 5_000, viewer_count={"count": 9}),
        started("s", 4, T0 + 5_000),
        at_ms=T0 + 5_000,
    )
    assert table.columns.lease_expires_ms[0] == T0 + LEASE


def test_a_producer_whose_clock_is_ahead_cannot_lengthen_a_lease(table: LiveTable) -> None:
    apply(table, heartbeat(2, 1, T0 + 4_000), at_ms=T0 + 1_000)
    assert table.columns.lease_expires_ms[0] == T0 + 1_000 + LEASE


def test_a_late_heartbeat_renews_only_from_its_own_time(table: LiveTable) -> None:
    apply(table, heartbeat(2, 1, T0 + 2_000), at_ms=T0 + 9_000)
    assert table.columns.lease_expires_ms[0] == T0 + 2_000 + LEASE


def test_a_lapsed_lease_hides_the_stream_and_keeps_its_counters_for_a_reconnect(table: LiveTable) -> None:
    apply(table, event("s", 2, T0, liked={"count": 3}))
    assert table.expire(T0 + LEASE).suspects == 1
    assert state(table) == fence.SUSPECT
    apply(table, heartbeat(3, 1, T0 + LEASE + 5_000), at_ms=T0 + LEASE + 5_000)
    assert state(table) == fence.LIVE and table.columns.counters[0].any()


def test_a_suspect_stream_ends_after_its_grace_and_stays_ended(table: LiveTable) -> None:
    ended = table.expire(T0 + LEASE + GRACE).ends
    assert [(e.stream_id, e.epoch, e.reason) for e in ended] == [("s", 1, "lease_expired")]
    late = apply(table, heartbeat(2, 99, T0 + LEASE + GRACE), at_ms=T0 + LEASE + GRACE)
    assert late.codes.tolist() == [pb.STREAM_ENDED] and state(table) == fence.ENDED


def test_end_is_final_for_its_epoch(table: LiveTable) -> None:
    applied = apply(table, event("s", 2, epoch=1, ended={"reason": "creator"}))
    assert [(e.epoch, e.reason) for e in applied.ends] == [(1, "creator")]
    after = apply(
        table, heartbeat(3, 5, T0 + 1), started("s", 4, T0 + 1, epoch=1), event("s", 5, T0 + 1, chatted={}),
        at_ms=T0 + 1,
    )  # fmt: skip
    assert after.codes.tolist() == [pb.STREAM_ENDED] * 3 and state(table) == fence.ENDED


def test_a_higher_epoch_begins_afresh_and_inherits_nothing(table: LiveTable) -> None:
    apply(table, event("s", 2, viewer="v", chatted={"count": 9}), heartbeat(3, 50, T0))
    applied = apply(table, started("s", 4, T0 + 1_000, epoch=2), at_ms=T0 + 1_000)
    assert [(e.epoch, e.reason) for e in applied.ends] == [(1, "superseded")]
    columns = table.columns
    assert columns.epoch[0] == 2 and columns.media_sequence[0] == -1 and state(table) == fence.LIVE
    assert not columns.counters[0].any() and not columns.viewer_registers[0].any()


def test_a_restart_in_the_same_batch_keeps_only_the_new_sessions_counts(table: LiveTable) -> None:
    apply(
        table, event("s", 2, epoch=1, liked={"count": 100}), started("s", 3, epoch=2),
        event("s", 4, epoch=2, liked={"count": 1}),
    )  # fmt: skip
    fresh = new_table(small_settings())
    apply(fresh, started("s", 1, epoch=2), event("s", 2, epoch=2, liked={"count": 1}))
    assert np.array_equal(table.columns.counters[0], fresh.columns.counters[0])


@pytest.mark.parametrize(
    "payload", [{"heartbeat": {"media_sequence": 9}}, {"ended": {}}, {"chatted": {}}, {"viewer_count": {"count": 1}}]
)
def test_a_lower_epoch_never_changes_a_higher_one(table: LiveTable, payload: dict[str, dict[str, int]]) -> None:
    apply(table, started("s", 2, epoch=3))
    before = {name: getattr(table.columns, name).copy() for name in ("state", "epoch", "lease_expires_ms", "counters")}
    applied = apply(table, event("s", 3, epoch=2, **payload))
    assert applied.codes.tolist() == [pb.EPOCH_BACKWARDS]
    assert all(np.array_equal(getattr(table.columns, name), old) for name, old in before.items())


def test_an_end_that_overtakes_its_own_start_fences_it(table: LiveTable) -> None:
    apply(table, event("s", 2, epoch=2, ended={}))
    late_start = apply(table, started("s", 3, epoch=2))
    assert late_start.codes.tolist() == [pb.STREAM_ENDED] and state(table) == fence.ENDED


def test_an_epoch_whose_start_was_not_seen_is_refused(table: LiveTable) -> None:
    assert apply(table, heartbeat(2, 1, T0, epoch=2)).codes.tolist() == [pb.EPOCH_UNKNOWN]


def test_an_end_is_applied_however_late_it_arrives(table: LiveTable) -> None:
    now = T0 + 650_000
    apply(table, started("s", 2, now, epoch=2), at_ms=now)
    applied = apply(
        table, event("s", 3, T0 + 1, epoch=2, chatted={}), event("s", 4, T0 + 1, epoch=2, ended={}), at_ms=now
    )
    assert applied.codes.tolist() == [pb.TOO_LATE, 0] and state(table) == fence.ENDED


def test_a_conditional_end_counts_only_without_later_proof_of_media(table: LiveTable) -> None:
    def end(sequence: int, since_ms: int, epoch: int = 1) -> pb.Event:
        return event("s", sequence, epoch=epoch, ended={"only_if_not_renewed_since_ms": since_ms})

    apply(table, event("s", 2, T0 + 500, 1, heartbeat={"media_sequence": 5}), at_ms=T0 + 500)
    assert apply(table, end(3, T0 + 499), at_ms=T0 + 600).codes.tolist() == [pb.RENEWED_SINCE]
    stalled = event("s", 4, T0 + 600, 1, heartbeat={"media_sequence": 5})
    assert apply(table, stalled, end(5, T0 + 550, epoch=2), at_ms=T0 + 600).codes.tolist() == [0, pb.EPOCH_UNKNOWN]
    assert state(table) == fence.LIVE
    applied = apply(table, end(6, T0 + 500), at_ms=T0 + 700)
    assert applied.codes.tolist() == [0] and [e.epoch for e in applied.ends] == [1], "no media since: it is over"
    assert apply(table, end(7, T0 + 500), at_ms=T0 + 700).codes.tolist() == [pb.STREAM_ENDED]


def test_an_event_from_the_future_is_refused(table: LiveTable) -> None:
    codes = apply(table, event("s", 2, T0 + 5_001, chatted={}), event("s", 3, T0 + 5_000, chatted={})).codes
    assert codes.tolist() == [pb.TOO_FAR_IN_FUTURE, 0]


def test_a_duplicate_counts_once_but_a_rejected_event_may_be_sent_again(table: LiveTable) -> None:
    like = event("s", 2, liked={})
    assert apply(table, like, like).codes.tolist() == [0, pb.DUPLICATE_SEQUENCE]
    early = event("t", 3, liked={})
    assert apply(table, early).codes.tolist() == [pb.UNKNOWN_STREAM]
    assert apply(table, started("t", 4), early).codes.tolist() == [0, 0]


def test_sequences_are_counted_per_producer(table: LiveTable) -> None:
    apply(table, event("s", 2, liked={}))
    assert apply(table, event("s", 2, liked={}), producer="q").codes.tolist() == [0]


def test_tombstones_outlive_late_events_and_then_free_the_row(table: LiveTable) -> None:
    apply(table, event("s", 2, epoch=1, ended={}))
    assert apply(table, started("s", 3, T0, epoch=1), at_ms=T0 + 600_000).codes.tolist() == [pb.STREAM_ENDED]
    table.expire(T0 + TOMBSTONE - 1)
    assert state(table) == fence.ENDED
    table.expire(T0 + TOMBSTONE)
    assert state(table) == fence.FREE and table.columns.generation[0] == 1


def test_a_freed_row_holds_nothing_of_what_it_held(table: LiveTable) -> None:
    apply(table, event("s", 2, viewer="v", chatted={}), event("s", 3, viewer_count={"count": 7}), heartbeat(4, 5, T0))
    apply(table, event("s", 5, epoch=1, ended={}))
    table.expire(T0 + TOMBSTONE)
    for name, column in vars(table.columns).items():
        assert name == "generation" or not column[0].any(), name


def test_embeddings_are_written_through_the_search_engine_and_a_freed_row_has_none() -> None:
    settings = small_settings()
    written: list[tuple[int, list[float]]] = []

    def write_rows(slots: NDArray[np.int32], rows: NDArray[np.float32]) -> None:
        written.extend(zip(slots.tolist(), rows.tolist(), strict=True))

    table = LiveTable(settings, np.zeros((settings.capacity, settings.embedding_dim), np.float32), write_rows)
    apply(table, started("a", 1, embedding=[0, 2, 0, 0]), event("a", 2, epoch=1, ended={}))
    table.expire(T0 + settings.tombstone_ms)
    assert written == [(0, [0.0, 1.0, 0.0, 0.0]), (0, [0.0] * 4)]
    assert not table.columns.embedding.any()


def test_a_full_table_refuses_a_start_and_evicts_nobody() -> None:
    table = new_table(small_settings(capacity=2))
    codes = apply(table, started("a", 1), started("b", 2), started("c", 3), event("c", 4, chatted={})).codes
    assert codes.tolist() == [0, 0, pb.CAPACITY, pb.UNKNOWN_STREAM]
    assert table.count_states() == (2, 0, 0)


def test_a_refused_start_gives_its_row_back() -> None:
    table = new_table(small_settings(capacity=1))
    assert apply(table, started("late", 1, T0 - 600_001)).codes.tolist() == [pb.TOO_LATE]
    assert apply(table, started("good", 2)).codes.tolist() == [0]
    assert state(table, "late") == fence.FREE and state(table, "good") == fence.LIVE


def test_a_block_outlives_the_session_its_tombstone_and_a_restart_of_the_stream(table: LiveTable) -> None:
    apply(table, event("s", 2, moderated={"action": fence.BLOCK}), event("s", 3, epoch=1, ended={}))
    table.expire(T0 + TOMBSTONE)
    apply(table, started("s", 4, T0 + TOMBSTONE, epoch=2), at_ms=T0 + TOMBSTONE)
    assert table.columns.moderation[0] & fence.MODERATED_BLOCKED


def test_producers_beyond_the_limit_displace_the_longest_silent_one() -> None:
    table = new_table(small_settings(max_producers=2))
    apply(table, started("s", 1), producer="old", at_ms=T0)
    apply(table, event("s", 1, chatted={}), producer="busy", at_ms=T0 + 1)
    apply(table, event("s", 1, chatted={}), producer="new", at_ms=T0 + 2)
    again = apply(table, event("s", 1, chatted={}), producer="busy", at_ms=T0 + 3)
    assert again.codes.tolist() == [pb.DUPLICATE_SEQUENCE]


def owned(table: LiveTable, *events: pb.Event, producer: str, most: int = 0) -> list[int]:
    """Codes of a batch that may change its producer's own streams only."""
    batch = pb.EventBatch(producer_id=producer, events=events, own_streams_only=True, max_streams=most)
    return table.apply(decode_batch(batch.SerializeToString(), table.settings).events, T0).codes.tolist()


def test_a_batch_for_own_streams_changes_no_other_and_uses_up_no_number(table: LiveTable) -> None:
    assert owned(table, started("t", 1), event("t", 2, liked={}), producer="q") == [0, 0]
    end = event("t", 9, epoch=1, ended={})
    assert owned(table, end, started("t", 10, epoch=2), producer="p") == [pb.NOT_OWNER] * 2
    assert state(table, "t") == fence.LIVE
    assert apply(table, end).codes.tolist() == [0], "a batch without the mark may, with the same number"
    assert owned(table, started("t", 11, epoch=2), producer="p") == [pb.NOT_OWNER], "its tombstone is the owner's too"
    assert owned(table, started("t", 3, epoch=2), producer="q") == [0]


def test_a_new_session_of_an_unmarked_batch_moves_the_stream_to_its_producer(table: LiveTable) -> None:
    assert apply(table, started("s", 1, epoch=2), producer="q").codes.tolist() == [0]
    assert owned(table, event("s", 2, liked={}), producer="q") == [0]
    assert owned(table, event("s", 5, liked={}), producer="p") == [pb.NOT_OWNER]


def test_a_freed_row_belongs_to_nobody(table: LiveTable) -> None:
    assert table.columns.owner.any()
    apply(table, event("s", 2, epoch=1, ended={}))
    table.expire(T0 + TOMBSTONE)
    assert not table.columns.owner.any()


def test_a_producers_limit_counts_its_rows_and_leaves_room_for_others() -> None:
    table = new_table(small_settings(capacity=4))
    starts = [started(f"a{i}", i + 1) for i in range(3)]
    assert owned(table, *starts, producer="p", most=2) == [0, 0, pb.TOO_MANY_STREAMS]
    assert owned(table, event("a0", 7, epoch=1, ended={}), started("a2", 8), producer="p", most=2) == [
        0,
        fence.TOO_MANY_STREAMS,
    ]
    assert owned(table, started("a0", 9, epoch=2), producer="p", most=2) == [0], "a row it has already"
    assert owned(table, *[started(f"b{i}", i + 1) for i in range(3)], producer="q", most=9) == [0, 0, pb.CAPACITY]
