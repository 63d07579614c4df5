"""Each source proposes what it says, inside the filter, best first, never more than its share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from server.config import RankSettings, RetrievalSettings, TableSettings
from server.live.features import FeatureSet
from server.live.table import LiveTable
from server.retrieval.exact import ExactSearch
from server.retrieval.query import RankQuery, build_batch
from server.retrieval.sources import SOURCES, Batch, Proposals, bit_of
from server.retrieval.streams import StreamState
from server.retrieval.view import Snapshot
from server.rules.rulebook import RuleBook
from tests.events import T0, apply, event, small_settings, started

SETTINGS = RetrievalSettings(personal=5, trending=6, trending_per_group=2, followed=3, fresh=4, fresh_age_ms=60_000)


class World:
    """Thirty assessed live streams in two categories and three languages, with known trend scores."""

    def __init__(self) -> None:
        settings = small_settings()
        features = FeatureSet.load(TableSettings().features_file)
        self.search = ExactSearch(settings.capacity, settings.embedding_dim)
        self.table = LiveTable(settings, self.search.embeddings, self.search.write_rows)
        self.book = RuleBook.load(RankSettings().rules_file, features.names)
        self.streams = StreamState(self.table, features, self.book)
        rng = np.random.default_rng(1)
        applied = apply(
            self.table,
            *(
                started(
                    f"s{i:02}", i + 1, T0 - 2_000 * i, creator_id=f"c{i % 4}", category=f"g{i % 2}",
                    language=["", "en", "de"][i % 3], embedding=rng.normal(size=4).tolist(),
                )
                for i in range(30)
            ),
            *(event(f"s{i:02}", 100 + i, T0, epoch=1, heartbeat={"media_sequence": 1}) for i in range(30)),
        )  # fmt: skip
        self.streams.forget_changed_sessions(applied.touched)
        self.streams.assess(applied.touched, T0)
        self.rng = rng
        order = rng.permutation(30).astype(np.int32)
        self.snapshot = Snapshot(self.table, self.streams, SETTINGS, T0, order)

    def view(self, name: str, eligible: np.ndarray[Any, Any] | None = None) -> list[int]:
        source = next(s for s in SOURCES if s.name == name)
        assert source.view is not None
        mask = self.snapshot.showable if eligible is None else eligible
        return source.view(self.snapshot, mask).tolist()

    def ask(self, name: str, mask: np.ndarray[Any, Any], **fields: Any) -> Proposals:
        source = next(s for s in SOURCES if s.name == name)
        assert source.query is not None
        batch = build_batch([query(**fields), query()], self.table, self.book)
        eligible = np.stack([mask] * len(batch.filters))
        return source.query(Batch(batch, self.snapshot, eligible, batch.filter_of, self.search))


def query(**fields: Any) -> RankQuery:
    defaults: dict[str, Any] = {
        "request_id": "r", "viewer_id": "", "embedding": None, "surface": "default", "limit": 10,
        "limit_clamped": False, "languages": (), "categories": (), "region": "", "followed_creator_ids": (),
        "exclude_stream_ids": (), "min_offset": 0, "deadline_s": 1e9, "received_s": 0.0,
    }  # fmt: skip
    return RankQuery(**{**defaults, **fields})


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
