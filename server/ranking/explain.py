"""Why one stream is, or is not, in the slate that one request would get now."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from kernels import fence
from kernels.eligibility import Drop, RowColumns, check_rows
from kernels.idmap import pack_ids
from kernels.slate import Outcome
from server.live.features import Features, FeatureSet
from server.live.table import LiveTable
from server.ranking.liveness import STATE_NAMES, first_reason
from server.ranking.pipeline import Pipeline
from server.ranking.slates import SlateBatch
from server.retrieval.query import RankQuery, build_batch
from server.retrieval.sources import SOURCES
from server.retrieval.streams import StreamState
from server.rules.bits import built_in
from server.rules.rulebook import BUILT_IN, PER_REQUEST
from server.scoring.ranker_schema import HEADS


@dataclass(frozen=True)
class RuleVerdict:
    """A rule's effect on the stream for this request."""

    rule: str
    excluded: bool
    boost: float


@dataclass(frozen=True)
class Explanation:
    """See ExplainResponse in ranking.proto. features: of the one row. scores: name → (value, age ms)."""

    epoch: int
    state: str
    lease_expires_ms: int
    sources: list[str]
    feature_names: tuple[str, ...]
    features: Features
    scores: dict[str, tuple[float, int]]
    rules: list[RuleVerdict]
    position_before_slate: int
    position_in_slate: int
    not_shown_reason: str
    as_of_ms: int


_REQUEST_DROPS = {
    Drop.REGION: "region", Drop.AGE_RATING: "age_rating",
    Drop.LANGUAGE: "language", Drop.CATEGORY: "category",
}  # fmt: skip
_OUTCOME_REASONS = {
    Outcome.CREATOR_CAP: "creator_cap", Outcome.CATEGORY_CAP: "category_cap",
    Outcome.RESERVE: "below_limit", Outcome.BELOW_LIMIT: "below_limit",
}  # fmt: skip


def explain(
    table: LiveTable,
    streams: StreamState,
    features: FeatureSet,
    pipeline: Pipeline,
    query: RankQuery,
    stream_id: str,
    score_age_ms: int,
) -> Explanation | None:
    """Ranks ``query`` as it would be ranked now and follows one stream through it; None when unknown.

    Runs on the engine thread; serves nothing and counts no exposure.
    """
    slot = int(table.map.lookup(*pack_ids([stream_id.encode()]))[0])
    if slot < 0:
        return None
    batch = build_batch([query], table, streams.book, pipeline.snapshot.now_ms)
    slates = pipeline.trace(batch)
    broken = {"excluded"} if stream_id in query.exclude_stream_ids else set()
    if slot in batch.excluded[len(batch.excluded) - batch.seen[0] :]:
        broken.add("seen")
    assert slates.candidates is not None
    now_ms, columns, at = slates.as_of_ms, table.columns, np.array([slot], np.int32)
    candidates = slates.candidates
    place = np.flatnonzero(candidates.slots[0] == slot)
    column = int(place[0]) if len(place) else -1
    in_slate = np.flatnonzero(slates.slots[0, : slates.counts[0]] == slot)
    bits = int(candidates.sources[0, column]) if column >= 0 else 0
    rules = _rules(table, streams, pipeline, slates, slot, broken)
    scores = {"trend": (float(streams.trend[slot]), score_age_ms)}
    if column >= 0:
        scores["similarity"] = (float(candidates.similarity[0, column]), 0)
        scores["utility"] = (float(candidates.utility[0, column]), 0)
        if candidates.heads is not None:
            heads = zip(HEADS, candidates.heads.of(0, column), strict=True)
            scores |= {f"ranker.{name}": (value, 0) for name, value in heads}
    return Explanation(
        epoch=int(columns.epoch[slot]),
        state=STATE_NAMES[int(columns.state[slot])],
        lease_expires_ms=int(columns.lease_expires_ms[slot]),
        sources=[source.name for i, source in enumerate(SOURCES) if bits >> i & 1],
        feature_names=features.names,
        features=table.accumulators.features(features, at, now_ms, table.landmark_ms),
        scores=scores,
        rules=rules,
        position_before_slate=_position(table, slates, column),
        position_in_slate=int(in_slate[0]) + 1 if len(in_slate) else 0,
        not_shown_reason="" if len(in_slate) else _reason(table, streams, slates, rules, slot, column),
        as_of_ms=now_ms,
    )


def _rules(
    table: LiveTable, streams: StreamState, pipeline: Pipeline, slates: SlateBatch, slot: int, broken: set[str]
) -> list[RuleVerdict]:
    """Every rule with its verdict: built-in, from the file, per request; ``broken``: of these, those known already."""
    at = np.array([slot], np.int32)
    bits = int(streams.rule_bits[slot] | built_in(table.columns, at, slates.as_of_ms)[0])
    verdicts = []
    for i, name in enumerate(streams.book.names):
        on = bool(bits >> i & 1)
        rule = None if i < len(BUILT_IN) else streams.book.rules[name]
        excludes = rule is None or rule.exclude
        verdicts.append(RuleVerdict(name, on and excludes, rule.boost if rule is not None and on else 0.0))
    filters = pipeline.snapshot.filter_columns(slates.batch.filters)
    # The one row, live and free of rules, so that only the request's filters can speak.
    columns = streams.row_columns()
    row = RowColumns(
        state=np.array([fence.LIVE], np.uint8),
        lease_expires_ms=np.array([slates.as_of_ms + 1]),
        rule_bits=np.zeros(1, np.uint32),
        region=columns.region[at],
        age_rating=columns.age_rating[at],
        language=columns.language[at],
        category=columns.category[at],
    )
    one = np.zeros(1, np.int32)
    for keep, name in _REQUEST_DROPS.items():
        # One filter at a time: open all the others, so that every broken one is reported.
        single = filters._replace(
            region=filters.region if keep == Drop.REGION else row.region,
            max_age_rating=filters.max_age_rating if keep == Drop.AGE_RATING else row.age_rating,
            any_language=filters.any_language if keep == Drop.LANGUAGE else np.ones(1, np.bool_),
            any_category=filters.any_category if keep == Drop.CATEGORY else np.ones(1, np.bool_),
        )
        if check_rows(row, one, single, 0, 0, slates.as_of_ms)[0] == keep:
            broken.add(name)
    return verdicts + [RuleVerdict(name, name in broken, 0.0) for name in PER_REQUEST]


def _position(table: LiveTable, slates: SlateBatch, column: int) -> int:
    """1-based place by (utility descending, non-finite last, id ascending); 0 when not a candidate."""
    if column < 0:
        return 0
    assert slates.candidates is not None
    n = int(slates.candidates.counts[0])
    slots = slates.candidates.slots[0, :n]

    def key(i: int) -> tuple[float, bytes]:
        value = float(slates.candidates.utility[0, i])  # type: ignore[union-attr]
        return (-value if math.isfinite(value) else math.inf, table.columns.ids[slots[i]].tobytes())

    return sorted(range(n), key=key).index(column) + 1


def _reason(
    table: LiveTable,
    streams: StreamState,
    slates: SlateBatch,
    rules: list[RuleVerdict],
    slot: int,
    column: int,
) -> str:
    """The first thing on the request's way that kept the stream out."""
    reason = first_reason(table, streams, slot, slates.as_of_ms)
    if reason:
        return reason
    for verdict in rules:
        if verdict.excluded:
            return f"rule:{verdict.rule}"
    if column < 0:
        return "not_retrieved"
    assert slates.selected is not None
    return _OUTCOME_REASONS.get(Outcome(int(slates.selected.outcome[0, column])), "removed_by_last_check")
