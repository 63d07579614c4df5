"""How a platform tells what happens on it: which events, how many of them, and at which pace of life.

A model that saw only complete feeds of one simulated platform leans on joins and chats, on how many likes a
viewer gives there, and on how fast crowds turn over there; elsewhere it is lost. So it is trained and tested
on feeds that lack families of events, count fewer of them, or come from slower platforms. Events change
before they reach the table, hence every feature is exactly what the server would compute from such a feed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from loadtest.world import EventKind, WorldEvents, WorldSettings
from loadtest.world.events import COLUMN_DTYPES
from server.live.event_checks import MAX_WATCH_SECONDS

# Hidden together or not at all. Liveness, moderation and the viewer gauge are always told.
FAMILIES: dict[str, tuple[EventKind, ...]] = {
    "visits": (EventKind.JOINED, EventKind.LEFT, EventKind.WATCHED),
    "chats": (EventKind.CHATTED,),
    "likes": (EventKind.LIKED,),
    "follows": (EventKind.FOLLOWED, EventKind.SHARED),
    "money": (EventKind.BID, EventKind.PURCHASED),
    "reports": (EventKind.REPORTED,),
    "identities": (),  # the events are told, but not whose they are
}
_NAMES = tuple(FAMILIES)
_LIKES = _NAMES.index("likes")
_IDENTITIES = _NAMES.index("identities")
_FAMILY_OF = np.full(256, -1, np.int8)
for _f, _kinds in enumerate(FAMILIES.values()):
    _FAMILY_OF[list(_kinds)] = _f
_GAUGE_MS = WorldSettings().viewer_count_ms

# Shares of streams in a mixed telling.
VIEWERS_ONLY = 0.10
VIEWERS_AND_LIKES_ONLY = 0.30
HIDDEN = np.where(np.arange(len(_NAMES)) == _LIKES, 0.1, 0.4)  # of each family, in the other streams
GAUGE_EVERY = np.array([1, 1, 3, 6])  # reports: every one, or each third or sixth
# Likes per viewer differ between platforms by more than a hundred: what counts is how they change.
COUNTED = {EventKind.LIKED: 0.003, EventKind.CHATTED: 0.02, EventKind.FOLLOWED: 0.1, EventKind.SHARED: 0.1}
"""Smallest share of such actions that happen, drawn log-uniformly per stream; the largest is all."""
_COUNTED_FLOOR = np.ones(256)
_COUNTED_FLOOR[list(COUNTED)] = list(COUNTED.values())

Telling = Callable[[WorldEvents], WorldEvents]


def everything(events: WorldEvents) -> WorldEvents:
    """The complete feed."""
    return events


def only(*families: str, gauge_every: int = 1) -> Telling:
    """A platform that tells these families and each ``gauge_every``-th viewer count, for all streams.

    Raises KeyError naming an unknown family.
    """
    unknown = set(families) - set(FAMILIES)
    if unknown:
        raise KeyError(f"families: some of {', '.join(_NAMES)} wanted, got {sorted(unknown)}")
    hidden_row = np.array([name not in families for name in _NAMES])

    def tell(events: WorldEvents) -> WorldEvents:
        n = len(events.streams)
        return _hide(events, np.broadcast_to(hidden_row, (n, len(_NAMES))), np.full(n, gauge_every))

    return tell


def mixed(seed: int) -> Telling:
    """Each stream by a producer of its own: what that one tells is drawn from seed and stream, for good."""

    def tell(events: WorldEvents) -> WorldEvents:
        producers = draw_producers(seed, len(events.streams))
        told = _hide(events, producers.hidden, producers.gauge_every)
        return _thin(told, producers.activity, np.random.default_rng([seed, events.now_ms]))

    return tell


@dataclass(frozen=True)
class ProducerDraw:
    """Per stream: hidden bool[n, families], gauge_every int64[n], activity float64[n] (0 least, 1 all)."""

    hidden: NDArray[np.bool_]
    gauge_every: NDArray[np.int64]
    activity: NDArray[np.float64]


def draw_producers(seed: int, n: int) -> ProducerDraw:
    """How a mixed telling tells streams 0 to n; a stream's draw does not depend on how many there are."""
    width = len(_NAMES) + 3
    # A hash instead of a generator, for that reason.
    numbers = np.arange(n * width, dtype=np.uint64) + np.uint64(seed) * np.uint64(0x1_0000_0000)
    u = ((mix64(numbers) >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(n, width)
    hidden = u[:, 3:] < HIDDEN
    kind = u[:, 0]
    hidden[kind < VIEWERS_ONLY + VIEWERS_AND_LIKES_ONLY] = True
    with_likes = (kind >= VIEWERS_ONLY) & (kind < VIEWERS_ONLY + VIEWERS_AND_LIKES_ONLY)
    hidden[with_likes, _LIKES] = False
    every = GAUGE_EVERY[(u[:, 1] * len(GAUGE_EVERY)).astype(np.int64)]
    return ProducerDraw(hidden, every, u[:, 2])


def slowed(events: WorldEvents, start_ms: int, slowness: int) -> WorldEvents:
    """The same life, ``slowness`` times as slow since ``start_ms``: crowds that take hours, not minutes."""
    if slowness == 1:
        return events
    watched = events.kind == EventKind.WATCHED
    return replace(
        events,
        now_ms=start_ms + (events.now_ms - start_ms) * slowness,
        event_time_ms=start_ms + (events.event_time_ms - start_ms) * slowness,
        value=np.where(watched, np.minimum(events.value * slowness, MAX_WATCH_SECONDS), events.value),
    )


def mix64(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """uint64[n] bijective scramble (finaliser of splitmix64)."""
    z = numbers + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


def _hide(events: WorldEvents, hidden: NDArray[np.bool_], gauge_every: NDArray[np.int64]) -> WorldEvents:
    """Without the families hidden bool[streams, families] and the gauges left out, int64[streams]."""
    stream = events.stream
    family = _FAMILY_OF[events.kind]
    gone = (family >= 0) & hidden[stream, family]
    # Gauges come at a fixed period; this keeps one in so many, whatever its phase.
    turn = events.event_time_ms // _GAUGE_MS
    gone |= (events.kind == EventKind.VIEWER_COUNT) & (turn % gauge_every[stream] != 0)
    kept = {name: getattr(events, name)[~gone] for name in COLUMN_DTYPES}
    kept["viewer"] = np.where(hidden[kept["stream"], _IDENTITIES], -1, kept["viewer"])
    return replace(events, **kept)


def _thin(events: WorldEvents, activity: NDArray[np.float64], rng: np.random.Generator) -> WorldEvents:
    """With fewer of the counted actions; activity float64[streams]."""
    share = _COUNTED_FLOOR[events.kind] ** (1.0 - activity[events.stream])
    thinned = share < 1.0
    value = events.value.copy()
    value[thinned] = rng.binomial(value[thinned].astype(np.int64), share[thinned])
    kept = ~thinned | (value > 0)
    columns = {name: getattr(events, name)[kept] for name in COLUMN_DTYPES}
    return replace(events, **{**columns, "value": value[kept]})
