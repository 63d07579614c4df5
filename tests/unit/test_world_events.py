"""What the simulated platform emits: repeatable, valid, numbered, and the same as messages."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.world import (
    END_REASONS,
    REPORT_REASONS,
    Adversity,
    EventKind,
    World,
    WorldEvents,
    WorldSettings,
    viewer_name,
)
from server.config import TableSettings

SMALL = WorldSettings(seed=3, target_live=30, n_creators=500, n_viewers=5_000, mean_session_ms=90_000, embedding_dim=16)
PERFECT = Adversity.none()


def run(world_settings: WorldSettings, steps: int) -> Iterator[WorldEvents]:
    world = World(world_settings)
    return (world.step() for _ in range(steps))


def column(events: list[WorldEvents], name: str) -> np.ndarray:
    return np.concatenate([getattr(e, name) for e in events])


def variant(**changes: object) -> WorldSettings:
    return WorldSettings(**{**{f: getattr(SMALL, f) for f in SMALL.__dataclass_fields__}, **changes})


@given(seed=st.integers(0, 2**32), step_ms=st.sampled_from([250, 1_000, 7_000]), warm=st.booleans())
@settings(max_examples=8, deadline=None)
def test_equal_settings_give_equal_events(seed: int, step_ms: int, warm: bool) -> None:
    chosen = variant(seed=seed, step_ms=step_ms, warm_start=warm)
    assert all(a.equals(b) for a, b in zip(run(chosen, 40), run(chosen, 40)))


def test_another_seed_gives_other_events() -> None:
    assert not any(a.equals(b) for a, b in zip(run(variant(seed=1), 20), run(variant(seed=2), 20)))


@given(seed=st.integers(0, 2**32), step_ms=st.sampled_from([500, 1_000, 5_000]))
@settings(max_examples=8, deadline=None)
def test_every_event_keeps_to_the_contract(seed: int, step_ms: int) -> None:
    currencies = TableSettings().currencies
    for events in run(variant(seed=seed, step_ms=step_ms), 30):
        assert (events.event_time_ms > 0).all()
        assert (events.event_time_ms <= events.now_ms).all()
        assert (events.epoch >= 0).all()
        lifecycle = events.kind <= EventKind.ENDED
        assert (events.epoch[lifecycle] >= 1).all()
        assert np.isfinite(events.value).all()
        assert (events.value >= 0).all()
        assert (events.value[events.kind == EventKind.WATCHED] <= 86_400).all()
        for batch in events.to_batches():
            assert 1 <= len(batch.producer_id.encode()) <= 64
            for event in batch.events:
                assert event.sequence >= 1
                assert 1 <= len(event.stream_id.encode()) <= 64
                assert len(event.viewer_id.encode()) <= 64
                kind = event.WhichOneof("payload")
                if kind == "started":
                    embedding = np.array(event.started.embedding)
                    assert len(embedding) == 16
                    assert np.linalg.norm(embedding) == pytest.approx(1.0, abs=1e-4)
                    assert 1 <= len(event.started.creator_id.encode()) <= 64
                    assert 1 <= len(event.started.title.encode()) <= 256
                    assert len(event.started.category.encode()) <= 64
                    assert len(event.started.tags) <= 16
                elif kind in ("bid", "purchased"):
                    money = getattr(event, kind)
                    assert money.currency in currencies
                    assert 1 <= money.amount_minor <= 1e12


def test_sequences_count_from_one_without_holes_on_a_perfect_network() -> None:
    events = list(run(variant(adversity=PERFECT), 60))
    producer, sequence = column(events, "producer"), column(events, "sequence")
    for p in np.unique(producer):
        own = sequence[producer == p]
        np.testing.assert_array_equal(own, np.arange(1, len(own) + 1))


def test_a_sequence_comes_twice_only_as_a_resend_of_the_same_event() -> None:
    events = list(run(variant(adversity=Adversity(duplicate=0.2)), 60))
    names = ("producer", "sequence", "stream", "epoch", "event_time_ms", "kind", "viewer", "value", "detail")
    rows = list(zip(*(column(events, name).tolist() for name in names)))
    numbers = {row[:2] for row in rows}
    assert len(numbers) == len(set(rows))
    assert len(rows) > 1.1 * len(numbers)


def test_each_producer_delivers_its_events_together_and_starts_come_before_ends() -> None:
    world = World(SMALL)
    for _ in range(30):
        events = world.step()
        assert (np.diff(events.producer) >= 0).all()
        assert events.producer_ids[0] == "media-0"
        assert events.producer_ids[-1] == "control-0"


def test_a_warm_world_tells_all_starts_before_anything_else_happens() -> None:
    world = World(variant(adversity=PERFECT, daily_curve=False))
    first = world.step()
    started = first.stream[first.kind == EventKind.STARTED]
    assert len(started) >= 30
    assert set(first.stream.tolist()) <= set(started.tolist())
    assert World(variant(warm_start=False, target_live=1, mean_session_ms=10**9)).step().to_batches() == []


def test_heartbeats_of_a_live_stream_show_progress() -> None:
    events = list(run(variant(adversity=PERFECT, mean_session_ms=600_000), 60))
    kind, stream = column(events, "kind"), column(events, "stream")
    beats = kind == EventKind.HEARTBEAT
    for row in np.unique(stream):
        mine = beats & (stream == row)
        assert (np.diff(column(events, "value")[mine]) > 0).all()
        assert (np.diff(column(events, "event_time_ms")[mine]) == 2_000).all()


def test_messages_say_what_the_columns_say() -> None:
    world = World(variant(mean_session_ms=60_000, adversity=Adversity(moderated_per_minute=1.0, view_bot=0.3)))
    seen: set[str] = set()
    for _ in range(90):
        events = world.step()
        batches = events.to_batches(max_events=50)
        assert all(1 <= len(b.events) <= 50 for b in batches)
        flat = [(b.producer_id, e) for b in batches for e in b.events]
        assert len(flat) == len(events)
        for i, (producer_id, event) in enumerate(flat):
            name = event.WhichOneof("payload")
            payload = getattr(event, name)
            seen.add(name)
            assert producer_id == events.producer_ids[events.producer[i]]
            assert EventKind(int(events.kind[i])).name.lower() == name
            assert event.sequence == events.sequence[i]
            assert event.stream_id == world.streams.ids[events.stream[i]]
            assert event.epoch == events.epoch[i]
            assert event.event_time_ms == events.event_time_ms[i]
            assert event.viewer_id == viewer_name(int(events.viewer[i]))
            value, detail = events.value[i], int(events.detail[i])
            if name == "heartbeat":
                assert payload.media_sequence == value
            elif name == "watched":
                assert payload.seconds == pytest.approx(value)
            elif name in ("bid", "purchased"):
                assert payload.amount_minor == value
                assert payload.currency == world.streams.market_of(int(events.stream[i])).currency
            elif name == "ended":
                assert payload.reason == END_REASONS[detail]
            elif name == "reported":
                assert payload.reason == REPORT_REASONS[detail]
            elif name == "moderated":
                assert payload.action == value
            elif name == "started":
                assert payload.title == world.streams.titles[events.stream[i]]
                np.testing.assert_array_equal(np.float32(payload.embedding), world.streams.embedding[events.stream[i]])
            else:
                assert payload.count == value
    assert seen == {kind.name.lower() for kind in EventKind}


def test_the_number_of_events_stays_bounded_however_large_the_crowds() -> None:
    world = World(variant(top_audience=500_000.0, mean_session_ms=600_000, daily_curve=False))
    total = sum(len(world.step()) for _ in range(60))
    assert world.streams.viewers.max() > 5_000
    assert total / 30 / 6 < 40  # per stream and ten seconds


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"target_live": 0}, "target_live"),
        ({"n_creators": 10}, "n_creators"),
        ({"region_locked": 1.5}, "region_locked"),
        ({"categories": ()}, "categories"),
    ],
)
def test_impossible_settings_are_refused_by_name(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        variant(**changes)


@pytest.mark.parametrize("wrong", [{"late": -0.1}, {"late_mean_ms": 0}, {"silent_death": 0.7, "lost_end": 0.7}])
def test_impossible_adversity_is_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Adversity(**wrong)  # type: ignore[arg-type]


def test_viewers_are_the_same_whenever_asked_and_some_ask_often() -> None:
    world, again = World(SMALL), World(SMALL)
    asked = world.sample_viewers(2_000, np.random.default_rng(0))
    assert asked.min() >= 0
    assert asked.max() < SMALL.n_viewers
    assert (asked < SMALL.n_viewers / 10).mean() > 0.3
    for number in asked[:50].tolist():
        a, b = world.viewer(number), again.viewer(number)
        assert (a.viewer_id, a.languages, a.region, a.followed) == (
            b.viewer_id, b.languages, b.region, b.followed,
        )  # fmt: skip
        np.testing.assert_array_equal(a.embedding, b.embedding)
        assert np.linalg.norm(a.embedding) == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(ValueError, match="viewer number"):
        world.viewer(SMALL.n_viewers)


def test_viewers_are_closest_to_streams_of_the_category_they_like() -> None:
    world = World(variant(target_live=150, embedding_dim=64))
    n_categories = len(SMALL.categories)
    closer = 0
    for number in range(100):
        likeness = world.streams.embedding @ world.viewer(number).embedding
        own = world.streams.category == number % n_categories
        closer += bool(own.any() and likeness[own].mean() > likeness[~own].mean())
    assert closer > 90
