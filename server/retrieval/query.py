"""Requests to be ranked: one `RankQuery` per viewer as decoded, one `QueryBatch` of columns per batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels.blend import BlendWeights
from kernels.idmap import hash_ids, pack_ids
from server.live.table import LiveTable
from server.rules.rulebook import SURFACE_FIELDS, RuleBook
from server.viewers.table import ViewerTable


@dataclass(slots=True)
class RankQuery:
    """A checked request; nobody changes it. (Frozen, making one would cost several times as much.)

    ``embedding`` float32[D] or None; ``deadline_s`` on the monotonic clock.
    embedding_problem: why an embedding that should have been looked up is not there; "" where nothing failed.
    """

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
    embedding_problem: str = ""


class FilterKey(NamedTuple):
    """What a request may see, by names; requests with equal keys share a view. (A tuple: hashed per batch.)"""

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
    head_weights float32[B, 4] of the ranker's heads,
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
    head_weights: NDArray[np.float32]
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
    # A surface may have gone with a reload of the rules since the request was checked.
    places, default = book.surface_places, book.surface_places["default"]
    said = _said(book, [places.get(r.surface, default) for r in requests])
    filters, filter_of = _filters(requests, said.max_age_ratings)
    queries, has_embedding = _queries(requests, table.settings.embedding_dim)
    of_requests = [(r.request_id or r.viewer_id).encode() for r in requests]
    hashes = hash_ids(*pack_ids(of_requests + [r.viewer_id.encode() for r in requests]))  # one call for both
    seeds, viewer_hash = hashes[: len(requests)], hashes[len(requests) :]
    limits = np.array([r.limit for r in requests], np.int32)
    asked = [x.encode() for r in requests if r.exclude_stream_ids for x in r.exclude_stream_ids]
    excluded, excluded_offsets, seen = _with_seen(
        table.map.lookup(*pack_ids(asked)) if asked else np.zeros(0, np.int32),
        _offsets(len(r.exclude_stream_ids) for r in requests),
        table, viewer_hash, now_ms,
    )  # fmt: skip
    followed = [table.creators.numbers(r.followed_creator_ids) if r.followed_creator_ids else [] for r in requests]
    return QueryBatch(
        requests=requests,
        queries=queries,
        has_embedding=has_embedding,
        limits=limits,
        filters=filters,
        filter_of=filter_of,
        excluded=excluded,
        excluded_offsets=excluded_offsets,
        followed=np.array(list(chain.from_iterable(followed)), np.int32),
        followed_offsets=_offsets(map(len, followed)),
        seeds=seeds,
        viewer_hash=viewer_hash,
        seen=seen,
        weights=said.weights,
        head_weights=said.head_weights,
        explore_slots=_explore_slots(said, limits, seeds),
        creator_caps=said.creator_caps,
        category_caps=_category_caps(said, limits, requests),
        diversity=said.diversity,
    )


class _Said(NamedTuple):
    """What the surfaces of B requests say; kept and shared by batches, so nobody changes it. The last two: whether any
    request is capped or explores at all."""

    weights: BlendWeights
    head_weights: NDArray[np.float32]
    creator_caps: NDArray[np.int32]
    category_shares: NDArray[np.float64]
    exploration_shares: NDArray[np.float64]
    diversity: NDArray[np.float32]
    max_age_ratings: list[int]
    caps_categories: bool
    explores: bool


def _said(book: RuleBook, surface_of: list[int]) -> _Said:
    """Worked out once for batches of one surface and size: most are."""
    b = len(surface_of)
    if not b or surface_of.count(surface_of[0]) < b:
        return _work_out(book, surface_of)
    kept: dict[tuple[int, int], _Said] = book.kept_columns
    said = kept.get((surface_of[0], b))
    if said is None:
        said = kept[surface_of[0], b] = _work_out(book, surface_of)
    return said


def _work_out(book: RuleBook, surface_of: list[int]) -> _Said:
    said = book.surface_values.take(surface_of, axis=1) if surface_of else np.zeros((len(SURFACE_FIELDS), 0))
    caps, shares, explored = said[_CREATOR_CAP], said[_CATEGORY_SHARE], said[_EXPLORATION_SHARE]
    return _Said(
        weights=BlendWeights(*said[_WEIGHTS].astype(np.float32)),
        head_weights=np.ascontiguousarray((said[_HEADS] * _HEAD_SIGNS).T, np.float32),
        creator_caps=np.where(caps > 0, caps, NO_CAP).astype(np.int32),
        category_shares=shares,
        exploration_shares=explored,
        diversity=said[_DIVERSITY].astype(np.float32),
        max_age_ratings=said[_MAX_AGE_RATING].astype(int).tolist(),
        caps_categories=bool((shares < 1.0).any()),
        explores=bool((explored > 0.0).any()),
    )


_WEIGHTS = [  # as `BlendWeights` has them
    SURFACE_FIELDS.index(name)
    for name in (
        "trend_weight", "similarity_weight", "followed_bonus", "fresh_bonus", "cold_start_trend", "boost_weight",
    )
]  # fmt: skip
_HEADS = [  # as `Surface.head_weights` has them: a report counts against
    SURFACE_FIELDS.index(name) for name in ("click_weight", "watch_weight", "purchase_weight", "report_weight")
]
_HEAD_SIGNS = np.array([[1.0], [1.0], [1.0], [-1.0]])
_CATEGORY_SHARE, _EXPLORATION_SHARE, _DIVERSITY, _CREATOR_CAP, _MAX_AGE_RATING = (
    SURFACE_FIELDS.index(name)
    for name in ("category_share", "exploration_share", "diversity", "creator_cap", "max_age_rating")
)


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


def _filters(requests: list[RankQuery], ratings: list[int]) -> tuple[list[FilterKey], NDArray[np.int32]]:
    """The distinct filters, and int32[B]: which of them every request has."""
    places: dict[FilterKey, int] = {}
    of = [
        places.setdefault(FilterKey(r.languages, r.categories, r.region, rating), len(places))
        for r, rating in zip(requests, ratings, strict=True)
    ]
    return list(places), np.array(of, np.int32)


def _queries(requests: list[RankQuery], dim: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Embeddings float32[B, dim], zero where there is none; bool[B]: who has one."""
    queries = np.zeros((len(requests), dim), np.float32)
    given = [i for i, r in enumerate(requests) if r.embedding is not None]
    if given:
        queries[given] = np.concatenate([r.embedding for r in requests if r.embedding is not None]).reshape(-1, dim)
    return queries, (queries != 0).any(axis=1)


def _explore_slots(said: _Said, limits: NDArray[np.int32], seeds: NDArray[np.uint64]) -> NDArray[np.int32]:
    """Exploration slots int32[B]: the share of the limit, its fraction rounded by a seeded coin."""
    if not said.explores:
        return np.zeros(len(limits), np.int32)
    wanted = limits * said.exploration_shares
    coin = (seeds >> np.uint64(11)).astype(np.float64) / float(1 << 53)
    whole = np.floor(wanted)
    return (whole + (coin < wanted - whole)).astype(np.int32)


def _category_caps(said: _Said, limits: NDArray[np.int32], requests: list[RankQuery]) -> NDArray[np.int32]:
    """Places int32[B] that a category may have: of one category alone a viewer asked for there is no share."""
    if not said.caps_categories:
        return np.full(len(limits), NO_CAP, np.int32)
    several = np.array([len(r.categories) != 1 for r in requests], np.bool_)
    capped = (said.category_shares < 1.0) & several
    return np.where(capped, np.ceil(said.category_shares * limits), NO_CAP).astype(np.int32)


def _offsets(lengths: Iterable[int]) -> NDArray[np.int64]:
    return np.array(list(accumulate(lengths, initial=0)), np.int64)
