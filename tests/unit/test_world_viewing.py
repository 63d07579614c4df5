"""The simulated audience: its planted position effect and affinity, and the events that tell of both."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from liverank.v1 import ranking_pb2

from loadtest.world import EXAMINATION_EXPONENT, Adversity, World, WorldSettings, examination
from loadtest.world.feedback import PRODUCER, Feedback
from server.config import TableSettings
from server.live.events import decode_batch

SETTINGS = WorldSettings(
    seed=5, target_live=60, n_creators=300, n_viewers=5_000, embedding_dim=16, adversity=Adversity.none()
)


@pytest.fixture(scope="module")
def world() -> World:
    made = World(SETTINGS)
    made.step()
    return made


def test_clicks_fall_with_the_place_as_planted_whatever_stands_there(world: World) -> None:
    rng = np.random.default_rng(1)
    n = 400_000
    viewer = world.viewer(3).embedding
    rows, position = rng.integers(0, len(world.streams), n), rng.integers(0, 10, n)
    answer = world.viewing.respond(viewer, rows, position, rng)
    rate = np.array([answer.clicked[position == place].mean() for place in range(10)])
    slope = np.polyfit(np.log1p(np.arange(10)), np.log(rate), 1)[0]
    assert slope == pytest.approx(-EXAMINATION_EXPONENT, abs=0.05)
    assert examination(np.arange(3)) == pytest.approx([1.0, 2**-0.7, 3**-0.7])


def test_affinity_drives_clicks_watching_buying_and_reports(world: World) -> None:
    rng = np.random.default_rng(2)
    n = 400_000
    viewer = world.viewer(3).embedding
    affinity = world.viewing.affinity(viewer, np.arange(len(world.streams)))
    near, far = np.argsort(-affinity)[:10], np.argsort(affinity)[:10]
    assert affinity[near].mean() > affinity[far].mean() + 0.3
    liked, other = (world.viewing.respond(viewer, rng.choice(rows, n), np.zeros(n), rng) for rows in (near, far))
    assert liked.clicked.mean() > 2 * other.clicked.mean()
    assert liked.watch_s[liked.clicked].mean() > 1.5 * other.watch_s[other.clicked].mean()
    assert (liked.spent_minor > 0).mean() > 3 * (other.spent_minor > 0).mean()
    assert liked.reported[liked.clicked].mean() < other.reported[other.clicked].mean()
    for answer in (liked, other):
        silent = ~answer.clicked
        assert not (answer.watch_s[silent].any() or answer.spent_minor[silent].any() or answer.reported[silent].any())


def reply(world: World, n: int, as_of_ms: int, name: str = "r-1") -> ranking_pb2.RankResponse:
    rows = world.live_rows[:n]
    return ranking_pb2.RankResponse(
        request_id=name, as_of_ms=as_of_ms, model_version="trendiness/4", applied_offset=77,
        streams=[
            ranking_pb2.RankedStream(
                stream_id=world.streams.ids[row], epoch=int(world.streams.epoch[row]), verify_by_ms=as_of_ms + 5_000,
                exploration=0.25 if place == 2 else 0.0,
            )
            for place, row in enumerate(rows)
        ],
    )  # fmt: skip


def test_impressions_repeat_what_the_reply_said_and_fit_the_screen(world: World) -> None:
    feedback = Feedback(world.viewing, world.streams, places=4)
    feedback.seen(world.viewer(3), reply(world, 9, world.now_ms), np.random.default_rng(3))
    events = [e for batch in feedback.due(world.now_ms + 3_600_000) for e in batch.events]
    seen = [e for e in events if e.HasField("impression")]
    assert [e.impression.position for e in seen] == [1, 2, 3, 4] and feedback.impressions == 4
    assert [e.impression.propensity for e in seen] == [0.0, 0.0, 0.25, 0.0]
    for event in seen:
        said = event.impression
        assert (said.request_id, said.served_ms, said.verify_by_ms) == ("r-1", world.now_ms, world.now_ms + 5_000)
        assert (said.model_version, said.applied_offset) == ("trendiness/4", 77)
        assert event.viewer_id == world.viewer(3).viewer_id and event.epoch and event.event_time_ms >= said.served_ms
    feedback.seen(world.viewer(3), ranking_pb2.RankResponse(as_of_ms=1), np.random.default_rng(3))
    assert not len(feedback)


def test_what_follows_is_told_in_order_and_well_formed_and_adds_up(world: World) -> None:
    rng = np.random.default_rng(4)
    feedback = Feedback(world.viewing, world.streams, places=20)
    for i in range(300):
        feedback.seen(world.viewer(i), reply(world, 20, world.now_ms + i, f"r-{i}"), rng, shuffled=i % 2 == 0)
    early = feedback.due(world.now_ms)
    late = feedback.due(world.now_ms + 3_600_000)
    assert sum(len(b.events) for b in early) == 1 and not len(feedback)
    events = [e for batch in (*early, *late) for e in batch.events]
    assert [e.sequence for e in events] == list(range(1, len(events) + 1))
    assert all(a.event_time_ms <= b.event_time_ms for a, b in pairwise(events))
    for batch in late:
        assert batch.producer_id == PRODUCER and len(batch.events) <= 2_000
        assert not decode_batch(batch.SerializeToString(), TableSettings(embedding_dim=16)).rejected
    by_kind = {name: [e for e in events if e.WhichOneof("payload") == name] for name in ("joined", "left", "purchased")}
    assert len(by_kind["joined"]) == len(by_kind["left"]) > 100 and by_kind["purchased"]
    together: dict[tuple[str, str], list[float]] = {}
    for event in events:
        key = (event.viewer_id, event.stream_id)
        if event.HasField("joined"):
            together[key] = [event.event_time_ms / 1000, 0.0]
        elif event.HasField("watched"):
            together[key][1] += event.watched.seconds
        elif event.HasField("left"):
            joined_s, watched_s = together[key]
            assert watched_s == pytest.approx(event.event_time_ms / 1000 - joined_s, abs=0.01)
        elif not event.HasField("impression"):
            assert event.event_time_ms / 1000 >= together[key][0]


def test_a_shuffled_slate_shows_the_same_streams_in_an_order_of_chance(world: World) -> None:
    feedback = Feedback(world.viewing, world.streams, places=10)
    rng = np.random.default_rng(5)
    orders = set()
    for i in range(20):
        feedback.seen(world.viewer(1), reply(world, 12, world.now_ms + i * 10_000), rng, shuffled=True)
        batches = feedback.due(world.now_ms + i * 10_000 + 5_000)
        shown = [e for b in batches for e in b.events if e.HasField("impression")]
        orders.add(tuple(e.stream_id for e in sorted(shown, key=lambda e: e.impression.position)))
    assert len(orders) == 20 and len({frozenset(order) for order in orders}) == 1
