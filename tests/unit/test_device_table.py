"""A live table whose sessions are kept on a device equals one that keeps them itself, column by column."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from liverank.v1 import ingest_pb2 as pb
from numpy.typing import NDArray

from kernels import fence
from kernels.backend import CPU, Backend, choose
from kernels.counters import LANDMARK_STEP_MS, N_COUNTERS, Grown
from kernels.idmap import id_words
from kernels.rules_gpu import UNASSESSED
from loadtest.world import World, WorldSettings
from server.config import RankSettings, TableSettings
from server.live.columns import Columns
from server.live.device import Changes, DeviceTable, Observed
from server.live.events import decode_batch
from server.live.features import FeatureSet
from server.live.queue import DeviceQueue
from server.live.staging import LEAST_BYTES, Staging
from server.live.state import StateBuffer, restore
from server.live.table import LiveTable
from server.rules import bits
from server.rules.rulebook import RuleBook
from tests.device import INTERPRETED
from tests.events import T0, apply, event, new_table, small_settings, started

BACKEND: Backend = CPU if INTERPRETED else choose("cuda")
FEATURES = FeatureSet.load(TableSettings().features_file)
MIRRORED = ("state", "moderation", "lease_expires_ms", "epoch", "started_ms", "creator", "language", "category",
            "region", "age_rating", "id_lengths")  # fmt: skip
SESSION = ("last_event_ms", "viewers", "viewers_ms", "counters", "viewer_registers", "chatter_registers")


def device_table(chosen: TableSettings, **changes: Any) -> tuple[LiveTable, DeviceQueue]:
    device = DeviceTable(BACKEND, chosen.capacity, **changes)
    embedding = np.zeros((chosen.capacity, chosen.embedding_dim), np.float32)
    table = LiveTable(chosen, embedding, accumulators=lambda columns: DeviceQueue(device, columns))
    assert isinstance(table.accumulators, DeviceQueue)
    return table, table.accumulators


def column(queue: DeviceQueue, name: str) -> NDArray[Any]:
    return queue.device.to_host(queue.device.tensors[name])


def assert_mirrors(queue: DeviceQueue, host: Columns) -> None:
    """The device holds, after a flush, what a host table holds that applied the same."""
    queue.flush()
    for name in (*MIRRORED, *SESSION):
        assert column(queue, name).tobytes() == getattr(host, name).tobytes(), name
    assert np.array_equal(column(queue, "id_words"), id_words(host.ids))
    assert (column(queue, "winner") == -1).all()


def test_a_disorderly_platform_leaves_the_same_columns_however_often_they_are_read() -> None:
    chosen = small_settings(
        capacity=80, embedding_dim=64, tombstone_ms=10_000, max_lateness_ms=8_000, grace_ms=4_000, lease_ms=5_000
    )  # fmt: skip
    plain = new_table(chosen)
    queued, queue = device_table(chosen)
    world = World(WorldSettings(seed=3, start_ms=T0, target_live=20, mean_session_ms=15_000))
    rng = np.random.default_rng(5)
    stamp = T0
    for step in range(50):
        stamp = max(stamp, world.now_ms + int(rng.integers(0, 900)))
        for message in world.step().to_batches():
            events = decode_batch(message.SerializeToString(), chosen).events
            ours, theirs = queued.apply(events, stamp), plain.apply(events, stamp)
            assert np.array_equal(ours.codes, theirs.codes) and ours.ends == theirs.ends
        if rng.random() < 0.3:
            queue.flush()
        if step % 24 == 23:
            assert_mirrors(queue, plain.columns)
    assert_mirrors(queue, plain.columns)
    assert queue.device.rows == plain.rows
    assert plain.columns.generation.any(), "rows must have been reused for this to mean anything"
    slots = np.arange(plain.rows, dtype=np.int32)
    ours = queued.accumulators.features(FEATURES, slots, stamp, queued.landmark_ms)
    theirs = plain.accumulators.features(FEATURES, slots, stamp, plain.landmark_ms)
    assert np.array_equal(ours.states, theirs.states)
    np.testing.assert_allclose(ours.values, theirs.values, rtol=1e-6)


_ACTIONS = st.lists(
    st.tuples(
        st.integers(0, 2),  # stream
        st.sampled_from(["start", "again", "view", "join", "chat", "bid", "beat", "end", "block"]),
        st.integers(-500, 500),  # event time against the clock
        st.sampled_from([0, 0, 0, 1, 1_000, 31_000, LANDMARK_STEP_MS]),  # how long nothing happens before
        st.booleans(),  # somebody reads
    ),
    max_size=25,
)


def _event(action: str, name: str, n: int, at_ms: int, epoch: int) -> pb.Event:
    match action:
        case "start":
            vector = [1.0, float(epoch), 0.0, 1e-6]
            return started(
                name, n, at_ms, epoch, age_rating=epoch % 18, language=f"l{epoch}", embedding=vector
            )  # fmt: skip
        case "again":
            return started(name, n, at_ms, epoch, category="c")
        case "view":
            return event(name, n, at_ms, viewer_count={"count": n * 37 % 101})
        case "join":
            return event(name, n, at_ms, viewer=f"v{n % 7}", joined={})
        case "chat":
            return event(name, n, at_ms, viewer=f"v{n % 5}", chatted={"count": 3})
        case "bid":
            return event(name, n, at_ms, bid={"amount_minor": 123 * n, "currency": "USD"})
        case "beat":
            return event(name, n, at_ms, epoch, heartbeat={"media_sequence": n})
        case "end":
            return event(name, n, at_ms, epoch, ended={})
    return event(name, n, at_ms, moderated={"action": fence.BLOCK if n % 2 else fence.UNBLOCK})


@settings(max_examples=30, deadline=None)
@given(_ACTIONS)
def test_any_history_leaves_the_same_columns(actions: list[tuple[int, str, int, int, bool]]) -> None:
    chosen = small_settings(capacity=3, tombstone_ms=40_000, max_lateness_ms=30_000)
    plain = new_table(chosen)
    queued, queue = device_table(chosen)
    now_ms, epochs = T0, [0, 0, 0]
    for i, (stream, action, skew_ms, pause_ms, read) in enumerate(actions):
        now_ms += pause_ms
        name, at_ms = f"s{stream}", now_ms + skew_ms
        epochs[stream] += action == "start"
        epoch = max(1, epochs[stream])
        batch = [_event(action, name, i + 1, at_ms, epoch)]
        if i % 3 == 0:
            batch.append(_event(action, name, i + 1_001, at_ms, epoch))
        for table in (plain, queued):
            apply(table, *batch, at_ms=now_ms)
        if read:
            assert_mirrors(queue, plain.columns)
    for table in (plain, queued):
        table.expire(now_ms + 9_000)
    assert_mirrors(queue, plain.columns)


def test_a_row_given_to_another_session_before_anybody_read_holds_nothing_of_the_first() -> None:
    plain = new_table(small_settings())
    queued, queue = device_table(small_settings())
    for table in (plain, queued):
        apply(table, started("s", 1), event("s", 2, viewer="a", joined={}), event("s", 3, viewer_count={"count": 9}))
        apply(table, started("s", 4, epoch=2), event("s", 5, epoch=2, chatted={}))
    assert column(queue, "counters").max() == 0.0, "nothing is taken over before somebody reads"
    assert_mirrors(queue, plain.columns)
    assert plain.columns.viewers[0] == 0.0 and plain.columns.counters[0].any()


def test_events_that_wait_when_the_landmark_moves_are_counted_for_the_old_one() -> None:
    long = small_settings(lease_ms=10_000_000)
    plain = new_table(long)
    queued, queue = device_table(long)
    for table in (plain, queued):
        apply(table, started("s", 1), event("s", 2, liked={"count": 3}))
        later_ms = T0 + 2 * LANDMARK_STEP_MS + 5
        apply(table, event("s", 3, later_ms, liked={"count": 5}), at_ms=later_ms)
        assert table.landmark_ms == T0 + 2 * LANDMARK_STEP_MS
    assert_mirrors(queue, plain.columns)


def test_many_events_are_taken_over_although_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.live.queue.MOST_EVENTS", 6)
    plain = new_table(small_settings())
    queued, queue = device_table(small_settings())
    for table in (plain, queued):
        for i in range(4):
            apply(table, started("s", 3 * i + 1, epoch=i // 3 + 1), *(event("s", 3 * i + k, liked={}) for k in (2, 3)))
    assert queue.device.staging.copies == 2
    assert_mirrors(queue, plain.columns)


def test_a_flush_is_one_copy_and_nothing_is_sent_for_nothing() -> None:
    table, queue = device_table(small_settings())
    for i in range(5):
        apply(table, started(f"s{i}", 2 * i + 1), event(f"s{i}", 2 * i + 2, liked={}))
    queue.flush()
    assert queue.device.staging.copies == 1
    queue.flush()
    assert queue.device.staging.copies == 1
    record = 32 + 96  # liveness, identity
    assert queue.device.staging.bytes_sent <= 5 * (record + 16) + 10 * 25 + 9 * 64


def test_fast_mode_differs_from_the_order_of_events_by_rounding_only() -> None:
    plain = new_table(small_settings())
    queued, queue = device_table(small_settings(), deterministic=False)
    events = [event("s", i + 2, T0 + i, chatted={"count": i}) for i in range(40)]
    for table in (plain, queued):
        apply(table, started("s", 1), *events)
    queue.flush()
    np.testing.assert_allclose(column(queue, "counters"), plain.columns.counters, rtol=1e-5)


def test_rules_on_the_device_hide_what_they_hide_on_the_host() -> None:
    book = RuleBook.load(RankSettings().rules_file, FEATURES.names)
    plain = new_table(small_settings())
    queued, queue = device_table(small_settings())
    for table in (plain, queued):
        apply(table, *(started(f"s{i}", i + 1) for i in range(3)), event("s2", 9, epoch=1, ended={}))
        apply(table, event("s0", 10, viewer_count={"count": 10}), event("s0", 11, chatted={"count": 5_000}))
        apply(table, event("s1", 12, moderated={"action": fence.BLOCK}))
    device, now_ms, slots = queue.device, T0 + 1_000, np.arange(3, dtype=np.int32)
    tables = device.load_rules(book.program(FEATURES.names), len(FEATURES))
    reported = FEATURES.reported(plain.counters_seen)
    device.set_reported(tables, reported)
    queue.flush()
    assert (column(queue, "rule_bits") == UNASSESSED).all()
    program = device.load_features(FEATURES.program())
    values, _ = device.features(program, None, 3, now_ms, queued.landmark_ms)
    device.assess(values, None, tables, now_ms)
    found = FEATURES.compute(plain.columns, slots, now_ms, plain.landmark_ms)
    expected = bits.assess(book, FEATURES.names, found.values, reported, np.zeros(3, np.uint32))
    expected |= bits.built_in(plain.columns, slots, now_ms)
    assert np.array_equal(column(queue, "rule_bits")[:3].view(np.uint32), expected)
    assert (expected[0] >> 5) & 1, "chat spam"
    assert (column(queue, "rule_bits")[3:] == UNASSESSED).all()
    apply(queued, event("s1", 13, moderated={"action": fence.UNBLOCK}))
    queue.forget(np.array([2], np.int32))
    queue.flush()
    device.refresh_built_in(device.send_slots(np.array([1], np.int32)), now_ms)
    assert not column(queue, "rule_bits")[1] & int(bits.BLOCKED)
    assert column(queue, "rule_bits")[2] == UNASSESSED and np.isnan(column(queue, "trend")[2])


def test_uploaded_rows_are_the_hosts_whatever_they_hold() -> None:
    rng, rows = np.random.default_rng(0), 40
    host = Columns.allocate(rows, np.zeros((rows, 4), np.float32), with_sessions=False)
    host.ids[:], host.id_lengths[:] = rng.integers(0, 256, host.ids.shape), rng.integers(0, 65, rows)
    for name in ("creator", "language", "category", "region", "age_rating"):
        getattr(host, name)[:] = rng.integers(0, 1 << 31, rows)
    for name in ("epoch", "lease_expires_ms", "started_ms"):
        getattr(host, name)[:] = rng.integers(0, (1 << 63) - 1, rows)
    host.state[:], host.moderation[:] = rng.integers(0, 4, rows), rng.integers(0, 256, rows)
    device = DeviceTable(BACKEND, rows)
    slots = np.array([39, 0, 3, 3, 1, 2, 17], np.int32)
    device.upload_rows(slots, host)
    fresh = DeviceTable(BACKEND, rows)
    others = np.setdiff1d(np.arange(rows), slots)
    expected = {name: getattr(host, name) for name in MIRRORED} | {"id_words": id_words(host.ids)}
    for name, column_ in expected.items():
        found = device.to_host(device.tensors[name])
        assert np.array_equal(found[slots], column_[slots]), name
        assert np.array_equal(found[others], fresh.to_host(fresh.tensors[name])[others]), name


def test_the_signed_order_of_id_words_is_the_order_of_the_bytes() -> None:
    ids = np.random.default_rng(0).integers(0, 256, (200, 64)).astype(np.uint8)
    ids[:100, :7] = ids[0, :7]  # many that part late
    words = id_words(ids)
    assert [ids[i].tobytes() for i in np.lexsort(words.T[::-1])] == sorted(row.tobytes() for row in ids)


def test_who_reads_a_session_on_the_host_fails_instead_of_finding_zeros() -> None:
    table, _ = device_table(small_settings())
    apply(table, started("s", 1))
    with pytest.raises(IndexError):
        FEATURES.compute(table.columns, np.zeros(1, np.int32), T0, table.landmark_ms)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (Changes(liveness=np.array([0, 64], np.int32)), "liveness: slots 0 to 63 allowed"),
        (Changes(cleared=np.array([-1], np.int32)), "cleared: slots 0 to 63 allowed"),
        (Changes(grown=Grown(np.array([64 * N_COUNTERS], np.int32), np.ones((1, 3), np.float32))), "grown: keys below"),
        (
            Changes(observed=Observed(np.array([99], np.int32), np.ones(1, np.int64), np.ones(1, np.float32),
                                      np.ones(1, np.uint64), np.ones(1, np.bool_))),
            "observed: slots",
        ),
    ],
)  # fmt: skip
def test_a_slot_outside_the_table_is_refused_before_anything_changes(changes: Changes, told: str) -> None:
    table, queue = device_table(small_settings())
    with pytest.raises(ValueError, match=told):
        queue.device.apply(changes, table.columns)
    assert queue.device.staging.copies == 0


def test_staging_grows_by_doubling_and_keeps_what_it_sends_apart() -> None:
    staging = Staging(BACKEND)
    assert staging.nbytes == LEAST_BYTES
    for n in (3, 5_000, 70_000, 2):
        host = staging.lay_out({"a": (np.uint8, (n,)), "b": (np.int64, (n, 2)), "c": (np.bool_, (1,))})
        host["a"][:], host["b"][:], host["c"][:] = 7, np.arange(2 * n).reshape(n, 2), True
        sent = {name: tensor.cpu().numpy().copy() for name, tensor in staging.send().items()}
        assert (sent["a"] == 7).all() and np.array_equal(sent["b"], host["b"]) and sent["c"].tolist() == [1]
    assert staging.nbytes == 1 << 21 and staging.copies == 4


def test_a_snapshot_of_device_columns_restores_either_kind_of_table() -> None:
    queued, _ = device_table(small_settings())
    plain = new_table(small_settings())
    for table in (plain, queued):
        apply(table, started("s", 1), event("s", 2, viewer="a", chatted={}), event("s", 3, viewer_count={"count": 9}))
        apply(table, started("t", 4, embedding=[1.0, 0.0, 0.0, 0.0]), event("t", 5, liked={"count": 2}))
    state = StateBuffer().capture(queued)
    again, device = device_table(small_settings())
    restore(again, state)
    assert_mirrors(device, plain.columns)
    back = new_table(small_settings())
    restore(back, state)
    for name in (*MIRRORED, *SESSION, "embedding"):
        np.testing.assert_array_equal(getattr(back.columns, name), getattr(plain.columns, name), err_msg=name)
