"""Impressions of a simulated platform: slates shown by a logging policy, answered by the platform's own truth.

Features are read from the live table at the minute of the reply, by the server's own code, as in `models.dataset`;
what viewers do with a slate is `loadtest.world.viewing`, which also plants the effect of places. What they do does not
flow back into the platform: next to its crowds it is nothing. It goes, as events, into a table of viewers like the
server's (`server.viewers.table`), when it is over, and so into what is known of a viewer who asks again.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from kernels import fence
from kernels.idmap import pack_ids
from loadtest.world import World, WorldSettings
from loadtest.world.viewing import Responses
from models.dataset import MINUTE_MS, WARM_UP_MINUTES
from models.impressions import Askings, Impressions
from models.replay import apply_events, new_table, table_settings
from models.telling import mix64
from server.config import ViewerSettings
from server.live.events import EventColumns
from server.live.features import FeatureSet
from server.live.table import LiveTable
from server.scoring.ranker_schema import CODE_BUCKETS, WATCHED_MS, bucket_of, missing_of
from server.viewers.table import ViewerTable


@dataclass(frozen=True)
class Policy:
    """How slates are made that are learned from, and who asks.

    The ``places`` best of personal match + size of the crowd + noise are shown, in that order or, in ``shuffled`` of
    the slates, in an order of chance; in ``explored`` of the places a random live stream stands instead.
    """

    askings_per_minute: int = 25
    places: int = 20
    viewers: int = 2_000  # who ask; few, so that they come back
    unknown: float = 0.3  # share of viewers whose embedding nobody has
    explored: float = 0.2  # share of places
    shuffled: float = 0.3  # share of slates
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


_SESSIONS_PER_STREAM = 50


@dataclass(frozen=True)
class _Doing:
    """Events of visits, n of them, told when the visit is over: until_ms int64[n]."""

    events: EventColumns
    until_ms: NDArray[np.int64]

    def take(self, which: NDArray[np.bool_]) -> _Doing:
        """Those where bool[n] is True."""
        columns = {
            f.name: getattr(self.events, f.name)[which]
            for f in fields(EventColumns)
            if isinstance(getattr(self.events, f.name), np.ndarray) and len(getattr(self.events, f.name)) == len(which)
        }
        return _Doing(replace(self.events, **columns), self.until_ms[which])


class _Audience:
    """Viewers who ask each minute, and remember what they watched."""

    def __init__(self, world: World, policy: Policy, name: str) -> None:
        self._world, self._policy, self._name = world, policy, name
        viewers = [world.viewer(number) for number in range(policy.viewers)]
        self._taste = np.stack([viewer.embedding for viewer in viewers])
        known = np.random.default_rng([world.settings.seed, 78]).random(policy.viewers) >= policy.unknown
        self._told = np.where(known[:, None], self._taste, np.float32(0.0))
        self._hash = mix64(np.arange(policy.viewers, dtype=np.uint64)) | np.uint64(1 << 63)
        settings = ViewerSettings(capacity=policy.viewers, sessions=_SESSIONS_PER_STREAM * world.settings.target_live)
        self._remembered = ViewerTable(settings, world.settings.embedding_dim)
        self._doing: list[_Doing] = []  # visits that are not over

    def ask(self, table: LiveTable, features: FeatureSet, rng: np.random.Generator) -> Impressions:
        """One minute of askings, at the world's present time."""
        world, policy = self._world, self._policy
        now_ms, streams = world.now_ms, world.streams
        slots = np.flatnonzero(table.live_mask(now_ms)).astype(np.int32)
        rows = streams.rows_of([table.stream_id(int(slot)) for slot in slots])
        found = features.compute(table.columns, slots, now_ms, table.landmark_ms)
        viewer = np.sort(rng.choice(policy.viewers, policy.askings_per_minute, replace=False))
        self._tell_what_is_over(table, now_ms)
        shown, propensity, by_chance = self._slates(viewer, rows, rng)  # [Q, places] into rows; the last bool[Q]
        places = np.tile(np.arange(shown.shape[1]), len(viewer))
        who, which = np.repeat(viewer, shown.shape[1]), shown.ravel()
        answer = world.viewing.respond(self._taste[who], rows[which], places, rng)
        row = rows[which]
        self._doing.append(self._visits(who, row, table.columns.epoch[slots[which]], answer, now_ms))
        known = self._remembered.histories(self._hash[viewer], now_ms)
        told = self._told[viewer], known.embedding.astype(np.float16), known.meta, viewer.astype(np.int64)
        return Impressions(
            askings=Askings(*told),
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
            by_chance=np.repeat(by_chance, shown.shape[1]),
            clicked=answer.clicked,
            watched=answer.watch_s * 1000 >= WATCHED_MS,
            purchased=answer.spent_minor > 0,
            reported=answer.reported,
            watch_s=answer.watch_s.astype(np.float32),
            value=(answer.spent_minor * self._usd(row)).astype(np.float32),
        )

    def _slates(
        self, viewer: NDArray[np.int64], rows: NDArray[np.int64], rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_]]:
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
        propensity = np.where(explored, policy.explored / max(1, len(rows) - n), 0.0)
        by_chance = rng.random(len(viewer)) < policy.shuffled
        order = np.where(by_chance[:, None], np.argsort(rng.random(shown.shape), axis=1), np.arange(n))
        return np.take_along_axis(shown, order, axis=1), np.take_along_axis(propensity, order, axis=1), by_chance

    def _visits(
        self,
        who: NDArray[np.int64],
        rows: NDArray[np.int64],
        epochs: NDArray[np.int64],
        answer: Responses,
        now_ms: int,
    ) -> _Doing:
        """What was clicked, as the events that clients would send of it, in the order in which they happen."""
        of: list[NDArray[np.int64]] = []
        kinds: list[NDArray[np.uint8]] = []
        for kind, happens in (
            (fence.JOINED, answer.clicked), (fence.WATCHED, answer.clicked), (fence.PURCHASED, answer.spent_minor > 0),
            (fence.REPORTED, answer.reported), (fence.LEFT, answer.clicked),
        ):  # fmt: skip
            of.append(np.flatnonzero(happens))
            kinds.append(np.full(len(of[-1]), kind, np.uint8))
        i, kind = np.concatenate(of), np.concatenate(kinds)
        i, kind = i[order := np.argsort(i, kind="stable")], kind[order]
        lasted_ms = (answer.watch_s[i] * 1000).astype(np.int64)
        ids, lengths = pack_ids([self._world.streams.ids[row].encode() for row in rows[i]])
        n = len(i)
        events = EventColumns(
            producer_id="viewers", index=np.arange(n, dtype=np.int32), sequence=np.zeros(n, np.uint64), ids=ids,
            id_lengths=lengths, kind=kind, epoch=epochs[i],
            time_ms=now_ms + np.where(kind == fence.JOINED, 0, lasted_ms),
            value=np.where(kind == fence.WATCHED, answer.watch_s[i], 1.0), media_sequence=np.zeros(n, np.int64),
            viewer_hash=self._hash[who[i]],
        )  # fmt: skip
        return _Doing(events, now_ms + lasted_ms)

    def _tell_what_is_over(self, table: LiveTable, now_ms: int) -> None:
        """Visits that ended by now go into the table of viewers; where the session is over meanwhile, they are lost,
        as events of an ended session are."""
        going_on = []
        for doing in self._doing:
            over = doing.until_ms <= now_ms
            events = doing.events
            slots = table.map.lookup(events.ids, events.id_lengths)
            current = over & (slots >= 0) & (table.columns.epoch[slots] == events.epoch)
            current &= table.live_mask(now_ms)[slots]
            self._remembered.applied(table, events, slots, current)
            if not over.all():
                going_on.append(doing.take(~over))
        self._doing = going_on

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
