"""A small table that was assessed, as a tick sees it, and requests to it."""

from __future__ import annotations

from typing import Any

import numpy as np

from server.config import RankSettings, RetrievalSettings, TableSettings
from server.live.features import FeatureSet
from server.live.table import LiveTable
from server.retrieval.exact import ExactSearch
from server.retrieval.query import RankQuery, build_batch
from server.retrieval.sources import SOURCES, Batch, Proposals
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
