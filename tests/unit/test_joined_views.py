"""The filters of a tick as columns: each row says what its own view says, whoever asked for what before."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from kernels.eligibility import FilterColumns
from server.retrieval.exact import ExactSearch
from server.retrieval.query import FilterKey
from server.retrieval.view import MOST_JOINED, JoinedViews, Snapshot, View
from tests.assessed import SETTINGS, World
from tests.events import T0, apply, started

EVERYTHING = FilterKey((), (), "", 18)
GERMAN = FilterKey(("de",), (), "", 18)
SECOND = FilterKey((), ("g1",), "", 18)


class Asked:
    """A tick, and how many views were built in it."""

    def __init__(self, world: World) -> None:
        self.snapshot = Snapshot(world.table, world.streams, SETTINGS, T0, world.snapshot.trend_order)
        self.built = 0

    def build(self, filters: FilterColumns, v: int) -> View:
        self.built += 1
        eligible = self.snapshot.eligible(filters, v)
        slots = np.flatnonzero(eligible).astype(np.int32)[:7]
        return View(eligible, slots, np.full(len(slots), self.built, np.uint32))

    def joined(self, *keys: FilterKey) -> JoinedViews:
        return self.snapshot.joined(list(keys), self.build)


@pytest.fixture
def asked() -> Asked:
    return Asked(World())


def list_of(joined: JoinedViews, key: FilterKey) -> NDArray[np.int32]:
    v = joined.places[key]
    return joined.lists.slots[joined.lists.starts[v] : joined.lists.starts[v + 1]]


def check(joined: JoinedViews, asked: Asked, *keys: FilterKey) -> None:
    for key in keys:
        view, v = asked.snapshot.views[key], joined.places[key]
        np.testing.assert_array_equal(joined.eligible[v], view.eligible)
        np.testing.assert_array_equal(list_of(joined, key), view.slots)
        np.testing.assert_array_equal(asked.snapshot.eligible(joined.filters, v), view.eligible)


def test_requests_find_their_filter_whatever_was_joined_before(asked: Asked) -> None:
    check(asked.joined(EVERYTHING), asked, EVERYTHING)
    joined = asked.joined(SECOND, GERMAN)
    check(joined, asked, SECOND, GERMAN, EVERYTHING)
    rows = joined.rows_of([GERMAN, EVERYTHING], np.array([1, 0, 0, 1], np.int32))
    assert [list(joined.places)[v] for v in rows] == [EVERYTHING, GERMAN, GERMAN, EVERYTHING]
    assert asked.joined(GERMAN, EVERYTHING) is joined
    assert asked.built == 3, "each view is built once"


def test_a_name_that_gets_another_number_within_the_tick_is_looked_up_again() -> None:
    world = World()
    asked = Asked(world)
    joined = asked.joined(GERMAN)
    german = world.table.columns.language[2]
    assert np.flatnonzero(joined.filters.languages[0]).tolist() == [german]
    world.table.languages.restore(["", "de", "en"], np.array([1, 2], np.int32))
    again = asked.joined(GERMAN)
    assert np.flatnonzero(again.filters.languages[0]).tolist() == [1]
    assert again.lists is joined.lists, "what was found stays as it was when the tick began"


def test_a_number_that_goes_to_another_language_is_no_longer_let_through() -> None:
    world = World()
    apply(world.table, started("odd", 500, T0, creator_id="c9", language="fi"))
    asked, finnish = Asked(world), FilterKey(("fi",), (), "", 18)
    number = int(np.flatnonzero(asked.joined(finnish).filters.languages[0])[0])
    apply(world.table, started("odd", 501, T0 + 1, creator_id="c9", language="sv"))
    assert world.table.languages.names[number] in ("", "sv") or number not in world.table.columns.language
    assert not asked.joined(finnish).filters.languages[0].any()


def test_many_filters_are_joined_anew_and_still_right(asked: Asked) -> None:
    many = [FilterKey((), (), "", rating) for rating in range(2 * MOST_JOINED)]
    for first in range(0, len(many), 5):
        keys = many[first : first + 5]
        joined = asked.joined(*keys)
        assert len(joined.places) <= MOST_JOINED
        check(joined, asked, *keys)
    check(asked.joined(*many), asked, *many)
    assert asked.built == len(many)


def test_other_scores_make_other_views(asked: Asked) -> None:
    before = asked.joined(EVERYTHING)
    asked.snapshot.rescored(before.lists.slots[::-1].copy())
    assert asked.joined(EVERYTHING) is not before
    assert asked.built == 2


def test_masks_that_may_change_are_read_again_by_every_search() -> None:
    engine, rng = ExactSearch(64, 8, scan="int8"), np.random.default_rng(3)
    engine.write_rows(np.arange(64, dtype=np.int32), rng.normal(size=(64, 8)).astype(np.float32))
    queries, mask_of = rng.normal(size=(2, 8)).astype(np.float32), np.zeros(2, np.int32)
    masks = np.ones((1, 64), np.bool_)
    best = engine.search(queries, masks, mask_of, 1).slots[0, 0]
    masks[0, best] = False
    assert engine.search(queries, masks, mask_of, 1).slots[0, 0] != best
    fixed = np.ones((1, 64), np.bool_)
    fixed.flags.writeable = False
    for _ in range(2):
        assert engine.search(queries, fixed, mask_of, 1).slots[0, 0] == best
    assert engine.search(queries, masks, mask_of, 1).slots[0, 0] != best
