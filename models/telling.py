"""Which events a platform tells: hides whole families of events, as platforms that lack them do.

A model that saw only complete feeds leans on joins and chats, and is lost where a producer sends a viewer
gauge and likes. So it is trained and tested on incomplete feeds too. Events are hidden before they reach
the table, hence every feature is exactly what the server would compute from such a feed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from loadtest.world import EventKind, WorldEvents, WorldSettings
from loadtest.world.events import COLUMN_DTYPES

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
        hidden, every = producers(seed, len(events.streams))
        return _hide(events, hidden, every)

    return tell


def producers(seed: int, n: int) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """What a mixed telling hides of streams 0 to n: bool[n, families], and each how-many-th gauge it tells."""
    # A hash of (seed, stream) instead of a generator: a stream's draw must not depend on how many there are.
    width = len(_NAMES) + 2
    numbers = np.arange(n * width, dtype=np.uint64) + np.uint64(seed) * np.uint64(0x1_0000_0000)
    u = ((mix64(numbers) >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(n, width)
    hidden = u[:, 2:] < HIDDEN
    kind = u[:, 0]
    hidden[kind < VIEWERS_ONLY + VIEWERS_AND_LIKES_ONLY] = True
    with_likes = (kind >= VIEWERS_ONLY) & (kind < VIEWERS_ONLY + VIEWERS_AND_LIKES_ONLY)
    hidden[with_likes, _LIKES] = False
    return hidden, GAUGE_EVERY[(u[:, 1] * len(GAUGE_EVERY)).astype(np.int64)]


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
