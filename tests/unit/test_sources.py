"""Each source proposes what it says, inside the filter, best first, never more than its share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from server.retrieval.sources import SOURCES, bit_of
from server.retrieval.view import Snapshot
from tests.assessed import SETTINGS, World
from tests.events import T0


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def test_trending_is_the_head_of_the_order_inside_the_filter(world: World) -> None:
    order = world.snapshot.trend_order.tolist()
    assert world.view("trending") == order[:6]
    odd = np.arange(30) % 2 == 1
    assert world.view("trending", odd) == [s for s in order if s % 2][:6]


@pytest.mark.parametrize(
    ("name", "group"), [("trending_in_category", lambda i: 1 + i % 2), ("trending_in_language", lambda i: i % 3)]
)
def test_each_group_gets_its_own_best(world: World, name: str, group: Callable[[int], int]) -> None:
    found = world.view(name)
    order = world.snapshot.trend_order.tolist()
    for g in (1, 2):
        assert [s for s in found if group(s) == g] == [s for s in order if group(s) == g][:2]
    assert len(found) == 4, "streams of no language are nobody's group"


def test_fresh_prefers_the_least_exposed_then_the_newest_and_forgets_the_old(world: World) -> None:
    assert world.view("fresh") == [0, 1, 2, 3]
    world.streams.exposures[[0, 1]] = 5
    world.snapshot.__dict__.pop("fresh_order")
    assert world.view("fresh") == [2, 3, 4, 5]
    world.streams.exposures[:] = 0
    world.snapshot.__dict__.pop("fresh_order")
    old = Snapshot(world.table, world.streams, SETTINGS, T0 + 9_000, world.snapshot.trend_order)
    assert len(old.fresh_order) == 26, "started within the last minute"


def test_personal_finds_the_most_similar_eligible_streams(world: World) -> None:
    viewer = world.table.columns.embedding[7]
    mask = np.arange(30) != 7
    found = world.ask("personal", mask, embedding=viewer)
    similarity = world.table.columns.embedding[:30] @ viewer
    similarity[7] = -9
    assert found.slots.tolist() == np.argsort(-similarity)[:5].tolist()
    assert found.offsets.tolist() == [0, 5, 5], "a viewer without an embedding gets none"


def test_followed_creators_streams_are_found_up_to_the_share_and_inside_the_filter(world: World) -> None:
    everything = np.ones(30, bool)
    found = world.ask("followed", everything, followed_creator_ids=("c2", "nobody"))
    assert found.offsets.tolist() == [0, 3, 3] and all(s % 4 == 2 for s in found.slots)
    none = world.ask("followed", np.arange(30) % 4 != 2, followed_creator_ids=("c2",))
    assert len(none.slots) == 0


def test_every_source_has_a_bit_of_its_own() -> None:
    assert sorted(bit_of(s.name) for s in SOURCES) == [1 << i for i in range(len(SOURCES))]
    assert len({s.name for s in SOURCES}) == len(SOURCES) <= 32
