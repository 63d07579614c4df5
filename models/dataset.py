"""Training rows: the features of every live stream once a minute, with what happened afterwards beside them.

Features are read from the live table at that minute, by the server's own code, and nothing written later
can change them: the table had not seen it. Labels are joined from the truth one horizon later.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from loadtest.world import Flaw, State, World, WorldSettings
from models.replay import apply_events, new_table, table_settings
from models.target import HORIZON_MINUTES, is_trending
from models.telling import Telling, slowed
from server.live.features import FeatureSet
from server.live.table import LiveTable

MINUTE_MS = 60_000
WARM_UP_MINUTES = 30
"""Streams that were running when the world began are told as new; after this most of them are gone."""


@dataclass(frozen=True)
class Rows:
    """n rows, ordered by world and minute; one per stream that the table held live at that minute.

    features float32[n, F], world int32[n], minute int32[n] (since the warm-up), stream int32[n] (row in
    the world), viewers_now and viewers_later int64[n] (people, later: one horizon), honest bool[n] (no bought
    viewers, no spammed chat), label bool[n] (trending, see `models.target`).
    """

    features: NDArray[np.float32]
    world: NDArray[np.int32]
    minute: NDArray[np.int32]
    stream: NDArray[np.int32]
    viewers_now: NDArray[np.int64]
    viewers_later: NDArray[np.int64]
    honest: NDArray[np.bool_]
    label: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.label)

    def take(self, which: NDArray[np.bool_]) -> Rows:
        """The rows where bool[n] is True."""
        return Rows(**{f.name: getattr(self, f.name)[which] for f in fields(self)})

    def moments(self) -> list[slice]:
        """One slice per world and minute."""
        key = self.world.astype(np.int64) << 32 | self.minute
        edges = np.flatnonzero(np.diff(key, prepend=-1, append=-1)).tolist()
        return [slice(a, b) for a, b in itertools.pairwise(edges)]

    def digest(self) -> str:
        """16 hex digits that identify the data."""
        sha = hashlib.sha256()
        for f in fields(self):
            sha.update(np.ascontiguousarray(getattr(self, f.name)).tobytes())
        return sha.hexdigest()[:16]


def concatenate(parts: Sequence[Rows]) -> Rows:
    """All rows, part after part."""
    return Rows(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Rows)})


@dataclass(frozen=True)
class Reading:
    """What the table said at one minute. stream int32[n], features float32[n, F]."""

    stream: NDArray[np.int32]
    features: NDArray[np.float32]


def simulate(
    settings: WorldSettings,
    minutes: int,
    features: FeatureSet,
    tellings: Sequence[Telling],
    *,
    slowness: int = 1,
    world: int = 0,
) -> list[Rows]:
    """Plays a world for ``minutes`` after its warm-up; its rows as each telling makes the table see them.

    The last HORIZON_MINUTES give no rows: what follows them is not known.

    Args:
        tellings: the same platform, told more or less completely; each feeds a table of its own.
        slowness: how many times slower than simulated life on this platform is (`models.telling.slowed`).
        world: number that goes into the rows.

    Raises:
        ValueError: the world's steps do not meet full minutes, or too few minutes.
    """
    step_ms, start_ms = settings.step_ms * slowness, settings.start_ms
    if MINUTE_MS % step_ms:
        raise ValueError(f"step_ms * slowness: a divisor of {MINUTE_MS} wanted, got {step_ms}")
    if minutes <= HORIZON_MINUTES:
        raise ValueError(f"minutes: more than {HORIZON_MINUTES} wanted, got {minutes}")
    platform = World(settings)
    tables = [new_table(table_settings(settings, slowness)) for _ in tellings]
    readings: list[list[Reading]] = []
    audiences: list[NDArray[np.int64]] = []
    for minute in range(WARM_UP_MINUTES * slowness + minutes):
        for _ in range(MINUTE_MS // step_ms):
            events = platform.step()
            for telling, table in zip(tellings, tables):
                apply_events(table, slowed(telling(events), start_ms, slowness))
        if minute >= WARM_UP_MINUTES * slowness:
            now_ms = start_ms + (platform.now_ms - start_ms) * slowness
            readings.append([_read(platform, table, now_ms, features) for table in tables])
            audiences.append(audience(platform))
    honest = ~np.isin(platform.streams.flaw, (Flaw.VIEW_BOT, Flaw.CHAT_SPAM))
    return [join_later([r[i] for r in readings], audiences, honest, world) for i in range(len(tellings))]


def audience(platform: World) -> NDArray[np.int64]:
    """int64[streams] people watching now; 0 for a stream that is over. A drop-out of the encoder is no end."""
    on_air = np.isin(platform.streams.state, (State.LIVE, State.GAP))
    return np.where(on_air, platform.streams.viewers, 0)


def _read(platform: World, table: LiveTable, now_ms: int, features: FeatureSet) -> Reading:
    slots = np.flatnonzero(table.live_mask(now_ms)).astype(np.int32)
    stream = platform.streams.rows_of([table.stream_id(int(slot)) for slot in slots])
    values = features.compute(table.columns, slots, now_ms, table.landmark_ms).values
    return Reading(stream.astype(np.int32), values)


def join_later(
    readings: Sequence[Reading],
    audiences: Sequence[NDArray[np.int64]],
    honest: NDArray[np.bool_],
    world: int,
) -> Rows:
    """Rows of all minutes whose horizon has passed. audiences: int64[streams so far] per minute."""
    parts = []
    for minute in range(len(readings) - HORIZON_MINUTES):
        stream = readings[minute].stream
        now, later = audiences[minute][stream], audiences[minute + HORIZON_MINUTES][stream]
        n = len(stream)
        parts.append(
            Rows(
                features=readings[minute].features, world=np.full(n, world, np.int32),
                minute=np.full(n, minute, np.int32), stream=stream, viewers_now=now, viewers_later=later,
                honest=honest[stream], label=is_trending(now, later, honest[stream]),
            )
        )  # fmt: skip
    return concatenate(parts)


@dataclass(frozen=True)
class Split:
    """Consecutive times of every world: to fit, to stop early, to calibrate, to test."""

    fit: Rows
    stop: Rows
    calibrate: Rows
    test: Rows


def split_by_time(rows: Rows, minutes: int) -> Split:
    """60 % to fit, 10 % to stop early, 15 % to calibrate, 15 % to test.

    Rows whose label looks across a border are left out, so that no part knows of the next one's time.
    """
    last = minutes - HORIZON_MINUTES
    edges = [round(share * last) for share in (0, 0.6, 0.7, 0.85, 1)]
    parts = [
        rows.take((rows.minute >= a) & (rows.minute < (b if b == last else b - HORIZON_MINUTES)))
        for a, b in itertools.pairwise(edges)
    ]
    return Split(*parts)
