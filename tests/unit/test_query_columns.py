"""Requests as columns: a request's row is the same whoever else is in its batch, and whatever was asked before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.retrieval.query import NO_CAP, RankQuery, build_batch
from server.rules.rulebook import RuleBook, Surface
from tests.assessed import World, query

SURFACES = {
    "default": Surface(),
    "plain": Surface(exploration_share=0.0, category_share=1.0, creator_cap=0),
    "wild": Surface(exploration_share=0.33, category_share=0.4, creator_cap=3, diversity=0.9, max_age_rating=12),
}
COLUMNS = ("limits", "seeds", "viewer_hash", "seen", "head_weights", "explore_slots", "creator_caps", "category_caps",
           "diversity", "queries", "has_embedding")  # fmt: skip
REQUESTS = st.builds(
    lambda **fields: query(**fields),
    request_id=st.sampled_from(["", "r1", "r2"]),
    viewer_id=st.sampled_from(["", "v1", "v2"]),
    surface=st.sampled_from([*SURFACES, "gone with a reload"]),
    limit=st.integers(1, 50),
    categories=st.sampled_from([(), ("g0",), ("g0", "g1")]),
    languages=st.sampled_from([(), ("de",)]),
    exclude_stream_ids=st.sampled_from([(), ("s01", "unknown"), ("s02",)]),
    followed_creator_ids=st.sampled_from([(), ("c1", "c2")]),
    embedding=st.sampled_from([None, np.array([0.6, 0.8, 0, 0], np.float32)]),
)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def book_of(world: World, **surfaces: Surface) -> RuleBook:
    return RuleBook(world.book.rules, {**SURFACES, **surfaces}, world.book.hash)


def row(batch: Any, b: int) -> dict[str, Any]:
    found = {name: np.asarray(getattr(batch, name)[b]).tolist() for name in COLUMNS}
    found["weights"] = [float(column[b]) for column in batch.weights]
    found["filter"] = batch.filters[batch.filter_of[b]]
    found["excluded"] = batch.excluded[batch.excluded_offsets[b] : batch.excluded_offsets[b + 1]].tolist()
    found["followed"] = batch.followed[batch.followed_offsets[b] : batch.followed_offsets[b + 1]].tolist()
    return found


@given(st.lists(REQUESTS, min_size=1, max_size=6), st.lists(REQUESTS, max_size=3))
def test_a_request_has_the_row_that_it_has_alone(world: World, asked: list[RankQuery], before: list[RankQuery]) -> None:
    used = book_of(world)
    build_batch(before, world.table, used)
    together = build_batch(asked, world.table, used)
    for b, one in enumerate(asked):
        assert row(together, b) == row(build_batch([one], world.table, book_of(world)), 0)


def test_what_a_surface_says_is_read_again_after_a_reload(world: World) -> None:
    asked = [query(surface="plain")] * 2
    assert build_batch(asked, world.table, book_of(world)).creator_caps.tolist() == [NO_CAP] * 2
    reloaded = book_of(world, plain=Surface(creator_cap=7))
    assert build_batch(asked, world.table, reloaded).creator_caps.tolist() == [7, 7]


def test_one_category_alone_has_no_share(world: World) -> None:
    asked = [query(surface="wild", limit=10, categories=names) for names in ((), ("g0",), ("g0", "g1"))]
    assert build_batch(asked, world.table, book_of(world)).category_caps.tolist() == [4, NO_CAP, 4]


def test_no_requests_are_no_rows(world: World) -> None:
    batch = build_batch([], world.table, book_of(world))
    assert len(batch) == 0
    assert batch.head_weights.shape == (0, 4)
