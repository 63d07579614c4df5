"""Impressions of a simulated platform: slates shown by a logging policy, answered by the platform's own truth.

Features are read from the live table at the minute of the reply, by the server's own code, as in `models.dataset`;
what viewers do with a slate is `loadtest.world.viewing`, which also plants the effect of places. What they do does not
flow back into the platform: next to its crowds it is nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from loadtest.world import World, WorldSettings
from loadtest.world.viewing import Responses
from models.dataset import MINUTE_MS, WARM_UP_MINUTES
from models.impressions import Askings, Impressions
from models.replay import apply_events, new_table, table_settings
from server.live.features import FeatureSet
from server.live.table import LiveTable
from server.scoring.ranker_schema import (
    BOUNCE_MS,
    CODE_BUCKETS,
    OUTCOME_VALUES,
    SEQUENCE,
    SEQUENCE_META,
    WATCHED_MS,
    Outcome,
    bucket_of,
    missing_of,
)


@dataclass(frozen=True)
class Policy:
    """How slates are made that are learned from, and who asks.

    The ``places`` best of personal match + size of the crowd + noise are shown, in that order; in ``explored`` of the
    places a random live stream stands instead.
    """

    askings_per_minute: int = 25
    places: int = 20
    viewers: int = 2_000  # who ask; few, so that they come back
    unknown: float = 0.3  # share of viewers whose embedding nobody has
    explored: float = 0.2  # share of places
    match: float = 2.0  # per unit of cosine
    crowd: float = 0.3  # per unit of log viewers
    noise: float = 1.0  # scale of Gumbel noise


def simulate_impressions(
    settings: WorldSettings,
    minutes: int,
    features: FeatureSet,
    policy: Policy | None = None,
    *,
    name: str = "world",
) -> Impressions:
    """Plays a world for ``minutes`` after its warm-up; what its viewers were shown, and did.

    Args:
        name: goes before creators' names: those of different worlds are different people.

    Raises:
        ValueError: the world's steps do not meet full minutes.
    """
    if MINUTE_MS % settings.step_ms:
        raise ValueError(f"step_ms: a divisor of {MINUTE_MS} wanted, got {settings.step_ms}")
    policy = policy or Policy()
    world, table = World(settings), new_table(table_settings(settings))
    audience = _Audience(world, policy, name)
    rng = np.random.default_rng([settings.seed, 77])
    parts: list[Impressions] = []
    for minute in range(WARM_UP_MINUTES + minutes):
        for _ in range(MINUTE_MS // settings.step_ms):
            apply_events(table, world.step())
        if minute >= WARM_UP_MINUTES:
            parts.append(audience.ask(table, features, rng))
    return _renumbered(parts)


class _Audience:
    """Viewers who ask each minute, and remember what they watched."""

    def __init__(self, world: World, policy: Policy, name: str) -> None:
        self._world, self._policy, self._name = world, policy, name
        viewers = [world.viewer(number) for number in range(policy.viewers)]
        self._taste = np.stack([viewer.embedding for viewer in viewers])
        known = np.random.default_rng([world.settings.seed, 78]).random(policy.viewers) >= policy.unknown
        self._told = np.where(known[:, None], self._taste, np.float32(0.0))
        self._visits: list[OrderedDict[int, tuple[int, float, float]]] = [OrderedDict() for _ in viewers]

    def ask(self, table: LiveTable, features: FeatureSet, rng: np.random.Generator) -> Impressions:
        """One minute of askings, at the world's present time."""
        world, policy = self._world, self._policy
        now_ms, streams = world.now_ms, world.streams
        slots = np.flatnonzero(table.live_mask(now_ms)).astype(np.int32)
        rows = streams.rows_of([table.stream_id(int(slot)) for slot in slots])
        found = features.compute(table.columns, slots, now_ms, table.landmark_ms)
        viewer = np.sort(rng.choice(policy.viewers, policy.askings_per_minute, replace=False))
        shown, propensity = self._slates(viewer, rows, rng)  # [Q, places] into rows
        places = np.tile(np.arange(shown.shape[1]), len(viewer))
        who, which = np.repeat(viewer, shown.shape[1]), shown.ravel()
        askings = self._askings(viewer, now_ms)
        answer = world.viewing.respond(self._taste[who], rows[which], places, rng)
        self._remember(who, rows[which], answer, now_ms)
        row = rows[which]
        return Impressions(
            askings=askings,
            at_ms=np.full(len(row), now_ms, np.int64),
            features=found.values[which],
            missing=missing_of(found.states)[which],
            stream_embedding=streams.embedding[row].astype(np.float32),
            codes=self._codes(row),
            stream=row.astype(np.int64),
            creator=streams.creator[row].astype(np.int64),
            asking=np.repeat(np.arange(len(viewer)), shown.shape[1]),
            position=(places + 1).astype(np.float32),
            propensity=propensity.ravel().astype(np.float32),
            by_chance=np.zeros(len(row), np.bool_),
            clicked=answer.clicked,
            watched=answer.watch_s * 1000 >= WATCHED_MS,
            purchased=answer.spent_minor > 0,
            reported=answer.reported,
            watch_s=answer.watch_s.astype(np.float32),
            value=(answer.spent_minor * self._usd(row)).astype(np.float32),
        )

    def _slates(
        self, viewer: NDArray[np.int64], rows: NDArray[np.int64], rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        policy, streams = self._policy, self._world.streams
        crowd = policy.crowd * np.log1p(streams.viewers[rows])
        # What nobody tells the policy it does not know: else places would tell of it.
        score = policy.match * self._told[viewer] @ streams.embedding[rows].T + crowd
        score = score + policy.noise * rng.gumbel(size=score.shape)
        n = min(policy.places, len(rows))
        shown = np.argsort(-score, axis=1, kind="stable")[:, :n]
        # A stream that is not in the slate yet, all with equal chance, takes an explored place.
        others = np.argsort(rng.random(score.shape), axis=1)
        explored = rng.random(shown.shape) < policy.explored
        for q in range(len(viewer)):
            spare = others[q][~np.isin(others[q], shown[q])][: explored[q].sum()]
            explored[q, np.flatnonzero(explored[q])[len(spare) :]] = False
            shown[q, explored[q]] = spare
        return shown, np.where(explored, policy.explored / max(1, len(rows) - n), 0.0)

    def _askings(self, viewer: NDArray[np.int64], now_ms: int) -> Askings:
        dim = self._taste.shape[1]
        embedding = np.zeros((len(viewer), SEQUENCE, dim), np.float16)
        meta = np.zeros((len(viewer), SEQUENCE, len(SEQUENCE_META)), np.float32)
        for q, number in enumerate(viewer.tolist()):
            visits = self._visits[number]
            for place, (row, (seen_ms, watch_s, outcome)) in enumerate(reversed(visits.items())):
                embedding[q, place] = self._world.streams.embedding[row]
                meta[q, place] = np.log1p((now_ms - seen_ms) / 60_000), np.log1p(watch_s), outcome, 1.0
        return Askings(self._told[viewer], embedding, meta, viewer.astype(np.int64))

    def _remember(self, who: NDArray[np.int64], rows: NDArray[np.int64], answer: Responses, now_ms: int) -> None:
        for i in np.flatnonzero(answer.clicked).tolist():
            watch_s, visits = float(answer.watch_s[i]), self._visits[int(who[i])]
            bits = {
                Outcome.CLICKED: True,
                Outcome.WATCHED: watch_s * 1000 >= WATCHED_MS,
                Outcome.ENGAGED: bool(answer.spent_minor[i]),
                Outcome.PURCHASED: bool(answer.spent_minor[i]),
                Outcome.REPORTED: bool(answer.reported[i]),
                Outcome.NEGATIVE: watch_s * 1000 < BOUNCE_MS and not answer.spent_minor[i],
            }
            outcome = sum(OUTCOME_VALUES[bit] for bit, happened in bits.items() if happened)
            visits.pop(int(rows[i]), None)
            visits[int(rows[i])] = (now_ms, watch_s, outcome)
            if len(visits) > SEQUENCE:
                visits.popitem(last=False)

    def _codes(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        streams = self._world.streams
        one, inverse = np.unique(rows, return_inverse=True)
        names = (
            [streams.market_of(int(row)).language for row in one],
            [streams.category_of(int(row)).name for row in one],
            [f"{self._name}/{streams.creator_name(int(row))}" for row in one],
        )
        return np.stack([bucket_of(n, b)[inverse] for n, b in zip(names, CODE_BUCKETS, strict=True)], axis=1)

    def _usd(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        minor = np.array([market.minor_unit_usd for market in self._world.settings.markets])
        return minor[self._world.streams.market[rows]]


def _renumbered(parts: list[Impressions]) -> Impressions:
    """One table of parts of one world: numbers of streams, creators and viewers agree already, askings do not."""
    askings = Askings(**{f.name: np.concatenate([getattr(p.askings, f.name) for p in parts]) for f in fields(Askings)})
    shifts = np.cumsum([0, *(len(p.askings) for p in parts[:-1])])
    shifted = [replace(p, asking=p.asking + shift) for p, shift in zip(parts, shifts, strict=True)]
    columns = [f.name for f in fields(Impressions) if f.name != "askings"]
    return Impressions(
        askings=askings, **{name: np.concatenate([getattr(p, name) for p in shifted]) for name in columns}
    )
