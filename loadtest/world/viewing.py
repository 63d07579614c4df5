"""What a viewer does with a slate, and why: the planted truth that a ranker has to find in what is logged.

A place is looked at with probability ``examination(position)``, whatever stands there, and only what was looked at can
be clicked. Whether it is, how long it is watched, bought from and reported, follows from the **affinity** of viewer
and stream, the cosine of their embeddings (about 0.6 for a viewer's favourite category, near 0 for another), and from
what the stream is like. Nothing else enters: who knows embeddings, attributes and places can do as well as is possible.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtest.world.settings import WorldSettings
from loadtest.world.streams import Flaw, StreamColumns

EXAMINATION_EXPONENT = 0.7
"""The planted position effect: see `examination`."""

# Log odds of a click on what was looked at: bias, per unit of affinity, per unit of log engagement of the stream.
_CLICK = (-2.5, 4.5, 0.6)
_WATCH_S, _WATCH_PER_AFFINITY = 20.0, 2.0  # mean seconds at affinity 0; exponent per unit
_MOST_WATCH_S = 600.0
_BUYS_PER_AFFINITY = 2.5  # exponent on the category's purchases per second
_EAGERNESS = 6.0  # who came from the feed buys so many times as often as the crowd
_REPORTS, _REPORTS_PER_AFFINITY = 0.002, -2.0  # per click; exponent
_MOOD = np.array([1.0, 1.0, 0.7, 0.4])  # factor on watching, by flaw
_OUTRAGE = np.array([1.0, 3.0, 60.0, 60.0])  # factor on reports, by flaw


def examination(position: NDArray[Any]) -> NDArray[np.float64]:
    """float64: probability that the place ``position`` (from 0) of a slate is looked at: (1 + position) ** -0.7."""
    return np.asarray((1.0 + np.asarray(position, np.float64)) ** -EXAMINATION_EXPONENT)


@dataclass(frozen=True)
class Responses:
    """What k impressions led to. clicked bool[k]; the others are 0 without a click.

    watch_s float64[k]; spent_minor int64[k] in the stream's currency; reported bool[k].
    """

    clicked: NDArray[np.bool_]
    watch_s: NDArray[np.float64]
    spent_minor: NDArray[np.int64]
    reported: NDArray[np.bool_]


class Viewing:
    """The truth about the audience of one world. Draws from the caller's chance only."""

    def __init__(self, settings: WorldSettings, streams: StreamColumns) -> None:
        self._streams = streams
        self._buys = np.array([c.purchases for c in settings.categories])
        self._median_minor = np.array(
            [[c.median_usd / m.minor_unit_usd for m in settings.markets] for c in settings.categories]
        )

    def affinity(self, viewer: NDArray[np.float32], rows: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
        """float64[k] in [-1, 1]: cosine of a viewer's embedding float32[D] (or [k, D]) and those of the streams."""
        return np.asarray((self._streams.embedding[rows] * viewer).sum(axis=-1, dtype=np.float64))

    def click_probability(self, viewer: NDArray[np.float32], rows: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
        """float64[k]: of a click on streams ``rows`` that were looked at."""
        bias, per_affinity, per_engagement = _CLICK
        appeal = np.log(np.maximum(self._streams.engagement[rows], 1e-3))
        odds = bias + per_affinity * self.affinity(viewer, rows) + per_engagement * appeal
        return np.asarray(1.0 / (1.0 + np.exp(-odds)))

    def respond(
        self,
        viewer: NDArray[np.float32],
        rows: NDArray[np.integer[Any]],
        position: NDArray[np.integer[Any]],
        rng: np.random.Generator,
    ) -> Responses:
        """What a viewer does with the streams ``rows`` [k] at the places ``position`` [k] from 0."""
        k = len(rows)
        clicked = rng.random(k) < examination(position) * self.click_probability(viewer, rows)
        affinity, flaw = self.affinity(viewer, rows), self._streams.flaw[rows]
        mean_s = _WATCH_S * np.exp(_WATCH_PER_AFFINITY * affinity) * _MOOD[flaw]
        watch_s = np.where(clicked, np.minimum(rng.exponential(1.0, k) * mean_s, _MOST_WATCH_S), 0.0)
        category, market = self._streams.category[rows], self._streams.market[rows]
        rate = _EAGERNESS * self._buys[category] * np.exp(_BUYS_PER_AFFINITY * affinity)
        buys = clicked & (rng.random(k) < -np.expm1(-rate * watch_s))
        amount = np.maximum(np.round(self._median_minor[category, market] * rng.lognormal(0.0, 0.6, k)), 1.0)
        report = _REPORTS * np.exp(_REPORTS_PER_AFFINITY * affinity) * _OUTRAGE[flaw]
        reported = clicked & (rng.random(k) < np.minimum(report, 1.0))
        return Responses(clicked, watch_s, np.where(buys, amount, 0.0).astype(np.int64), reported)


assert len(_MOOD) == len(_OUTRAGE) == len(Flaw)
