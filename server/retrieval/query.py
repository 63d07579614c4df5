"""Requests to be ranked: one `RankQuery` per viewer as decoded, one `QueryBatch` of columns per batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernels.blend import BlendWeights
from kernels.idmap import hash_ids, pack_ids
from server.live.table import LiveTable
from server.rules.rulebook import RuleBook, Surface
from server.viewers.table import ViewerTable


@dataclass(frozen=True)
class RankQuery:
    """A checked request. ``embedding`` float32[D] or None; ``deadline_s`` on the monotonic clock."""

    request_id: str
    viewer_id: str
    embedding: NDArray[np.float32] | None
    surface: str
    limit: int
    limit_clamped: bool
    languages: tuple[str, ...]
    categories: tuple[str, ...]
    region: str
    followed_creator_ids: tuple[str, ...]
    exclude_stream_ids: tuple[str, ...]
    min_offset: int
    deadline_s: float
    received_s: float


@dataclass(frozen=True)
class FilterKey:
    """What a request may see, by names; requests with equal keys share a view."""

    languages: tuple[str, ...]
    categories: tuple[str, ...]
    region: str
    max_age_rating: int


@dataclass(frozen=True)
class QueryBatch:
    """B requests as columns.

    queries float32[B, D] (unit length, zero without embedding), has_embedding bool[B],
    limits int32[B], filter_of int32[B] (index into ``filters``), excluded int32[X] slots and
    followed int32[Y] interned creators, ragged by int64[B + 1] offsets, seeds uint64[B],
    viewer_hash uint64[B] (0: anonymous), seen int32[B]: how many of a request's excluded slots, the last ones, are
    there because of what the viewer did (`ViewerTable.seen`) and not because the request says so,
    slate policy: explore_slots, creator_caps, category_caps int32[B], diversity float32[B].
    """

    requests: list[RankQuery]
    queries: NDArray[np.float32]
    has_embedding: NDArray[np.bool_]
    limits: NDArray[np.int32]
    filters: list[FilterKey]
    filter_of: NDArray[np.int32]
    excluded: NDArray[np.int32]
    excluded_offsets: NDArray[np.int64]
    followed: NDArray[np.int32]
    followed_offsets: NDArray[np.int64]
    seeds: NDArray[np.uint64]
    viewer_hash: NDArray[np.uint64]
    seen: NDArray[np.int32]
    weights: BlendWeights
    explore_slots: NDArray[np.int32]
    creator_caps: NDArray[np.int32]
    category_caps: NDArray[np.int32]
    diversity: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.requests)


NO_CAP = np.iinfo(np.int32).max


def build_batch(requests: list[RankQuery], table: LiveTable, book: RuleBook, now_ms: int = 0) -> QueryBatch:
    """Turns requests into columns: looks names up in the table's interners, applies the surface.

    now_ms: decides what a viewer saw too long ago to matter; 0: nothing is.
    """
    b = len(requests)
    # A surface may have gone with a reload of the rules since the request was checked.
    surfaces = [book.surfaces.get(r.surface, book.surfaces["default"]) for r in requests]
    queries = np.zeros((b, table.settings.embedding_dim), np.float32)
    for i, request in enumerate(requests):
        if request.embedding is not None:
            queries[i] = request.embedding
    keys = [
        FilterKey(r.languages, r.categories, r.region, s.max_age_rating)
        for r, s in zip(requests, surfaces, strict=True)
    ]
    numbers: dict[FilterKey, int] = {}
    filter_of = np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int32)
    asked = [x.encode() for r in requests for x in r.exclude_stream_ids]
    viewer_hash = hash_ids(*pack_ids([r.viewer_id.encode() for r in requests]))
    excluded, excluded_offsets, seen = _with_seen(
        table.map.lookup(*pack_ids(asked)), _offsets([len(r.exclude_stream_ids) for r in requests]),
        table, viewer_hash, now_ms,
    )  # fmt: skip
    followed = [table.creators.find(r.followed_creator_ids) for r in requests]
    seeds = hash_ids(*pack_ids([(r.request_id or r.viewer_id).encode() for r in requests]))
    limits = np.array([r.limit for r in requests], np.int32)
    column = {name: np.array([getattr(s, name) for s in surfaces], np.float32) for name in _WEIGHTS}
    return QueryBatch(
        requests=requests,
        queries=queries,
        has_embedding=(queries != 0).any(axis=1),
        limits=limits,
        filters=list(numbers),
        filter_of=filter_of,
        excluded=excluded,
        excluded_offsets=excluded_offsets,
        followed=np.concatenate(followed) if followed else np.zeros(0, np.int32),
        followed_offsets=_offsets([len(f) for f in followed]),
        seeds=seeds,
        viewer_hash=viewer_hash,
        seen=seen,
        weights=BlendWeights(*(column[name] for name in _WEIGHTS)),
        explore_slots=_explore_slots(surfaces, limits, seeds),
        creator_caps=np.array([s.creator_cap or NO_CAP for s in surfaces], np.int32),
        category_caps=np.array(
            [
                int(np.ceil(s.category_share * r.limit))
                if s.category_share < 1.0 and len(r.categories) != 1
                else NO_CAP
                for s, r in zip(surfaces, requests, strict=True)
            ],
            np.int32,
        ),
        diversity=np.array([s.diversity for s in surfaces], np.float32),
    )


_WEIGHTS = ("trend_weight", "similarity_weight", "followed_bonus", "fresh_bonus", "cold_start_trend", "boost_weight")


def _with_seen(
    asked: NDArray[np.int32],
    offsets: NDArray[np.int64],
    table: LiveTable,
    viewer_hash: NDArray[np.uint64],
    now_ms: int,
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int32]]:
    """What is excluded: what requests ask for, then what their viewers saw; its offsets; how many of the latter."""
    viewers, none = table.follower, np.zeros(len(viewer_hash), np.int32)
    if not isinstance(viewers, ViewerTable):
        return asked, offsets, none
    seen, seen_offsets = viewers.seen(table, viewer_hash, now_ms)
    if not len(seen):
        return asked, offsets, none
    places = np.repeat(offsets[1:], np.diff(seen_offsets))
    return np.insert(asked, places, seen), offsets + seen_offsets, np.diff(seen_offsets).astype(np.int32)


def _explore_slots(surfaces: list[Surface], limits: NDArray[np.int32], seeds: NDArray[np.uint64]) -> NDArray[np.int32]:
    """Exploration slots int32[B]: the share of the limit, its fraction rounded by a seeded coin."""
    wanted = limits * np.array([s.exploration_share for s in surfaces])
    coin = (seeds >> np.uint64(11)).astype(np.float64) / float(1 << 53)
    whole = np.floor(wanted)
    return (whole + (coin < wanted - whole)).astype(np.int32)


def _offsets(lengths: list[int]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
