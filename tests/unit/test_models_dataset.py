"""Training rows are what the server would have seen, and know nothing of the future but their label."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from loadtest.world import EventKind, World, WorldEvents, WorldSettings
from loadtest.world.events import COLUMN_DTYPES
from models.dataset import WARM_UP_MINUTES, Reading, Rows, join_later, simulate, split_by_time
from models.replay import event_columns, new_table, table_settings
from models.target import HORIZON_MINUTES, TOP_SHARE, growth_score, is_trending
from models.telling import FAMILIES, draw_producers, everything, mixed, only, slowed
from server.config import TableSettings
from server.live.events import decode_batch
from server.live.features import FeatureSet

FEATURES = FeatureSet.load(TableSettings().features_file)
MINUTES = HORIZON_MINUTES + 3
SMALL = WorldSettings(
    seed=4, target_live=30, n_creators=500, n_viewers=5_000, embedding_dim=4, step_ms=5_000, heartbeat_ms=10_000,
    mean_session_ms=600_000,
)  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> Rows:
    return simulate(SMALL, MINUTES, FEATURES, [everything])[0]


def test_columns_equal_those_decoded_from_messages() -> None:
    world = World(SMALL)
    settings = table_settings(SMALL)
    seen: set[int] = set()
    for _ in range(60):
        events = world.step()
        messages = [decode_batch(m.SerializeToString(), settings) for m in events.to_batches()]
        batches = list(event_columns(events, settings))
        assert len(batches) == len(messages)
        for ours, decoded in zip(batches, messages):
            assert not decoded.rejected
            theirs = decoded.events
            assert ours.producer_id == theirs.producer_id and ours.ended_reason == theirs.ended_reason
            for name in ("index", "sequence", "ids", "id_lengths", "kind", "epoch", "time_ms", "media_sequence"):
                assert getattr(ours, name).dtype == getattr(theirs, name).dtype, name
                np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), name)
            np.testing.assert_allclose(ours.value, theirs.value, rtol=1e-12)
            np.testing.assert_array_equal(ours.viewer_hash == 0, theirs.viewer_hash == 0)
            assert ours.started.keys() == theirs.started.keys()
            for i, row in ours.started.items():
                assert replace(row, embedding=None) == replace(theirs.started[i], embedding=None)
                np.testing.assert_array_equal(row.embedding, theirs.started[i].embedding)
            seen |= set(ours.kind.tolist())
    assert seen >= {EventKind.STARTED, EventKind.HEARTBEAT, EventKind.VIEWER_COUNT, EventKind.BID, EventKind.WATCHED}


def test_rows_equal_what_a_server_computes_from_the_same_messages(rows: Rows) -> None:
    world, table = World(SMALL), new_table(table_settings(SMALL))
    for _ in range((WARM_UP_MINUTES + 1) * 12):
        for message in world.step().to_batches():
            table.apply(decode_batch(message.SerializeToString(), table.settings).events, world.now_ms)
    slots = np.flatnonzero(table.live_mask(world.now_ms)).astype(np.int32)
    served = FEATURES.compute(table.columns, slots, world.now_ms, table.landmark_ms).values
    first = rows.take(rows.minute == 0)
    by_name = {table.stream_id(int(slot)): i for i, slot in enumerate(slots)}
    order = [by_name[world.streams.ids[row]] for row in first.stream]
    assert len(first) == len(served)
    same = [i for i, name in enumerate(FEATURES.names) if not name.startswith("unique_")]  # other hashes
    np.testing.assert_allclose(first.features[:, same], served[order][:, same], rtol=1e-6)


def test_what_happens_later_changes_no_earlier_row(rows: Rows) -> None:
    edge_ms = SMALL.start_ms + (WARM_UP_MINUTES + 2) * 60_000

    def altered_later(events: WorldEvents) -> WorldEvents:
        if events.now_ms <= edge_ms:
            return events
        return replace(events, value=np.where(events.kind == EventKind.VIEWER_COUNT, 1e6, events.value))

    altered = simulate(SMALL, MINUTES, FEATURES, [altered_later])[0]
    before = rows.minute < 2
    np.testing.assert_array_equal(altered.features[before], rows.features[before])
    assert not np.array_equal(altered.features[~before], rows.features[~before])


def test_a_planted_leak_would_be_caught(rows: Rows) -> None:
    """The check above is no tautology: with events from a minute ahead the rows do differ."""
    held: list[WorldEvents] = []
    world = World(SMALL)
    ahead = [world.step() for _ in range((WARM_UP_MINUTES + MINUTES + 1) * 12)]

    def from_the_future(events: WorldEvents) -> WorldEvents:
        held.append(events)
        future = ahead[len(held) + 11]
        gauges = np.where(future.kind == EventKind.VIEWER_COUNT, future.value, 0.0)
        leak = {int(s): float(v) for s, v in zip(future.stream, gauges) if v > 0}
        value = [
            leak.get(s, v) if k == EventKind.VIEWER_COUNT else v
            for s, k, v in zip(events.stream.tolist(), events.kind.tolist(), events.value.tolist())
        ]
        return replace(events, value=np.array(value))

    leaking = simulate(SMALL, MINUTES, FEATURES, [from_the_future])[0]
    assert not np.array_equal(leaking.features[leaking.minute < 2], rows.features[rows.minute < 2])


def test_labels_are_joined_from_one_horizon_later() -> None:
    # Stream 0 doubles, 1 stays, 2 ends, 3 begins only at minute 1; a fraud (4) grows most.
    audiences = [np.array([100, 100, 100, 0, 100])] * HORIZON_MINUTES
    audiences += [np.array([200, 100, 0, 7, 900]), np.array([300, 50, 0, 9, 900])]
    streams = [np.array([4, 0, 1, 2])] + [np.array([0, 3])] * (len(audiences) - 1)
    readings = [Reading(s.astype(np.int32), s[:, None].astype(np.float32)) for s in streams]
    honest = np.array([True, True, True, True, False])
    rows = join_later(readings, audiences, honest, world=3)
    assert rows.minute.tolist() == [0, 0, 0, 0, 1, 1] and set(rows.world.tolist()) == {3}
    assert rows.stream.tolist() == [4, 0, 1, 2, 0, 3] == rows.features[:, 0].tolist()
    assert rows.viewers_now.tolist() == [100, 100, 100, 100, 100, 0]
    assert rows.viewers_later.tolist() == [900, 200, 100, 0, 300, 9]
    assert rows.honest.tolist() == [False, True, True, True, True, True]


def test_trending_is_the_honest_top_that_grew() -> None:
    n = 40
    now, later = np.full(n, 80), np.full(n, 80)
    later[:8] = [200, 190, 180, 170, 160, 150, 140, 130]
    honest = np.ones(n, bool)
    honest[0] = False
    wanted = int(TOP_SHARE * (n - 1))
    assert np.flatnonzero(is_trending(now, later, honest)).tolist() == list(range(1, 1 + wanted))
    assert not is_trending(now, now - 1, honest).any()
    assert not is_trending(now[:3], later[:3], honest[:3]).any()
    np.testing.assert_allclose(growth_score(np.array([80, 5]), np.array([100, 0])), [2.0, -1.0])


def test_splits_do_not_see_across_their_borders(rows: Rows) -> None:
    minutes = 100 + HORIZON_MINUTES
    many = replace(rows, minute=np.linspace(0, 99.9, len(rows)).astype(np.int32))
    split = split_by_time(many, minutes)
    assert split.fit.minute.max() + HORIZON_MINUTES < split.stop.minute.min() == 60
    assert split.stop.minute.max() + HORIZON_MINUTES < split.calibrate.minute.min() == 70
    assert split.calibrate.minute.max() + HORIZON_MINUTES < split.test.minute.min() == 85
    assert split.test.minute.max() == 99


def test_hidden_families_leave_their_features_missing_and_the_others_alone(rows: Rows) -> None:
    viewers, with_likes = simulate(SMALL, MINUTES, FEATURES, [only(), only("likes")])
    np.testing.assert_array_equal(viewers.stream, rows.stream)
    names = list(FEATURES.names)
    for word in ("joins", "chats", "bids", "purchases", "follows", "unique", "watch"):
        hidden = [i for i, name in enumerate(names) if word in name and "velocity" not in name]
        assert hidden and rows.features[:, hidden].any() and not viewers.features[:, hidden].any(), word
    gauges = [i for i, name in enumerate(names) if name.startswith("viewers")]
    likes = [i for i, name in enumerate(names) if "likes" in name]
    np.testing.assert_array_equal(viewers.features[:, gauges], rows.features[:, gauges])
    np.testing.assert_array_equal(with_likes.features[:, likes], rows.features[:, likes])
    assert (viewers.features[:, names.index("likes_velocity")] == 1.0).all()
    with pytest.raises(KeyError, match="telepathy"):
        only("telepathy")


def test_a_mixed_telling_is_fixed_per_stream_and_seed() -> None:
    few, many = draw_producers(7, 50), draw_producers(7, 2_000)
    np.testing.assert_array_equal(few.hidden, many.hidden[:50])
    assert not np.array_equal(draw_producers(8, 50).hidden, few.hidden)
    likes = list(FAMILIES).index("likes")
    assert many.hidden[:, likes].mean() < 0.3 < many.hidden.mean() < 0.8
    assert set(many.gauge_every.tolist()) == {1, 3, 6}
    world, told, full = World(SMALL), [], []
    for _ in range(24):
        full.append(world.step())
        told.append(mixed(7)(full[-1]))
        assert told[-1].equals(mixed(7)(full[-1]))
    assert sum(map(len, told)) < sum(map(len, full))
    for events, all_events in zip(told, full):
        kept = events.kind == EventKind.HEARTBEAT  # liveness is always told
        assert kept.sum() == (all_events.kind == EventKind.HEARTBEAT).sum()


def test_slowed_life_is_the_same_life() -> None:
    world = World(SMALL)
    events = [world.step() for _ in range(12)][-1]
    slow = slowed(events, SMALL.start_ms, 4)
    assert slowed(events, SMALL.start_ms, 1) is events
    assert slow.now_ms - SMALL.start_ms == 4 * (events.now_ms - SMALL.start_ms)
    changed = {n for n in COLUMN_DTYPES if not np.array_equal(getattr(slow, n), getattr(events, n))}
    assert changed == {"event_time_ms", "value"}
    watched = events.kind == EventKind.WATCHED
    np.testing.assert_array_equal(slow.value[watched], 4 * events.value[watched])
    np.testing.assert_array_equal(slow.value[~watched], events.value[~watched])
