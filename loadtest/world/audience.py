"""How crowds come and go. Interest moves first; viewers follow within minutes, so growth can be learned.

Per stream: ``momentum`` (mean-reverting) and ``excitement`` (jumps at bursts, fades) push ``log_pull``, the
log of the factor on the crowd it settles at. Actions per viewer depend on momentum and excitement at once,
the crowd only through joins at rate target / stay and leaves at rate 1 / stay. Hence likes, chats, shares
and joins lead viewers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtest.world.settings import WorldSettings
from loadtest.world.streams import State, StreamColumns

DAY_MS = 86_400_000
_PEAK_HOUR = 19.5  # UTC
_MOMENTUM_S = 360.0  # correlation time
_EXCITEMENT_S = 180.0  # e-folding time
_PULL_S = 900.0  # e-folding time: crowds return to what the creator usually draws
_PULL_PER_MOMENTUM = 0.002  # per second and unit
_PULL_PER_EXCITEMENT = 0.004
_FROZEN_STAY_S = 15.0  # viewers of a frozen picture leave after
_GAP_STAY_S = 30.0


@dataclass(frozen=True, slots=True)
class Burst:
    """What makes a crowd grow suddenly, as factors per unit of excitement on top of 1."""

    name: str
    joins: float
    chats: float
    likes: float
    shares: float
    money: float


BURSTS = (
    Burst("raid", joins=1.2, chats=1.5, likes=1.0, shares=0.5, money=0.2),
    Burst("giveaway", joins=0.5, chats=3.0, likes=2.0, shares=4.0, money=0.2),
    Burst("product drop", joins=0.4, chats=1.0, likes=1.5, shares=1.0, money=4.0),
)
_BURST_JOINS = np.array([b.joins for b in BURSTS])


def daily_factor(time_ms: int, settings: WorldSettings) -> float:
    """Activity of the platform at this time of day; 1 at the mean of the day."""
    if not settings.daily_curve:
        return 1.0
    hours = time_ms % DAY_MS / 3_600_000
    return float(1.0 + 0.6 * np.cos((hours - _PEAK_HOUR) * np.pi / 12))


def target(streams: StreamColumns, rows: NDArray[np.integer[Any]], now_ms: int, daily: float) -> NDArray[np.float64]:
    """float64[R] viewers at which the streams ``rows`` would settle just now."""
    age_ms = now_ms - streams.started_ms[rows]
    share = age_ms / np.maximum(streams.end_ms[rows] - streams.started_ms[rows], 1)
    ramp = 1.0 - np.exp(-np.maximum(age_ms, 0) / (1000.0 * streams.ramp_s[rows]))
    farewell = 1.0 - 2.5 * np.clip(share - 0.85, 0.0, 0.15)
    pull = np.exp(np.clip(streams.log_pull[rows], -2.0, 2.5))
    return np.asarray(streams.peak[rows] * daily * ramp * farewell * pull)


def advance(
    streams: StreamColumns,
    rows: NDArray[np.int32],
    now_ms: int,
    settings: WorldSettings,
    rng: np.random.Generator,
) -> None:
    """Moves the crowds of the streams ``rows`` int32[R] one step on, to ``now_ms``. Changes their columns."""
    dt = settings.step_ms / 1000.0
    n = len(rows)
    state = streams.state[rows]

    keep = np.exp(-dt / _MOMENTUM_S)
    momentum = keep * streams.momentum[rows] + np.sqrt(1.0 - keep * keep) * rng.standard_normal(n)
    streams.momentum[rows] = momentum

    excitement = streams.excitement[rows] * np.exp(-dt / _EXCITEMENT_S)
    onset = rng.random(n) < settings.step_ms / settings.burst_every_mean_ms
    if onset.any():
        k = int(onset.sum())
        excitement[onset] += rng.lognormal(0.0, 0.5, k)
        streams.burst[rows[onset]] = rng.integers(0, len(BURSTS), k)
    streams.excitement[rows] = excitement

    push = _PULL_PER_MOMENTUM * momentum + _PULL_PER_EXCITEMENT * excitement
    streams.log_pull[rows] = streams.log_pull[rows] * np.exp(-dt / _PULL_S) + push * dt

    goal = target(streams, rows, now_ms, daily_factor(now_ms, settings))
    lead = 1.0 + _BURST_JOINS[streams.burst[rows]] * excitement
    stay = streams.stay_s[rows]
    joining = np.where(
        state == State.LIVE, lead, np.where(state == State.GAP, 0.2, 0.0)
    ) * goal / stay  # fmt: skip
    staying = np.where(state >= State.DEAD, _FROZEN_STAY_S, np.where(state == State.GAP, _GAP_STAY_S, stay))

    before = streams.viewers[rows]
    joins = rng.poisson(joining * dt)
    # Poisson instead of binomial: the same mean, and cheaper by far where crowds are large.
    leaves = np.minimum(rng.poisson(before * -np.expm1(-dt / staying)), before)
    streams.viewers[rows] = before + joins - leaves
    streams.joins[rows] += joins
    streams.leaves[rows] += leaves
    streams.unflushed_joins[rows] += joins
    streams.unflushed_leaves[rows] += leaves
    streams.unflushed_viewer_s[rows] += before * dt
