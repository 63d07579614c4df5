"""Creators and viewers: who they are, how popular, and where their embeddings lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtest.world.events import viewer_name
from loadtest.world.settings import WorldSettings

# Share of a viewer's attention that goes to the category they like best.
_LOYALTY = 0.6
# Viewers are drawn as floor(n * u ** this): a few are online all the time, most rarely.
_VIEWER_SKEW = 2.5


@dataclass(frozen=True, slots=True)
class Viewer:
    """Someone who asks for a ranking."""

    viewer_id: str
    embedding: NDArray[np.float32]  # [D] unit norm, in the space of the streams' embeddings
    languages: tuple[str, ...]  # first the one they like best
    region: str
    followed: tuple[str, ...]  # creator ids
    age: int  # years


class Population:
    """All creators (rank 0 is the most popular) and viewers. Fixed once built; equal for equal settings."""

    def __init__(self, settings: WorldSettings) -> None:
        self._settings = settings
        rng = np.random.default_rng([settings.seed, 1])
        n, dim, n_categories = settings.n_creators, settings.embedding_dim, len(settings.categories)
        self.category_centre = _unit(rng.standard_normal((n_categories, dim), dtype=np.float32))
        shares = np.array([c.share for c in settings.categories])
        self.creator_category = rng.choice(n_categories, n, p=shares / shares.sum()).astype(np.int16)
        self._market_share = np.cumsum([m.share for m in settings.markets])
        self.creator_market = self._markets(rng.random(n))
        # People of one market watch each other: a little of the market is in the embedding too.
        self.market_centre = _unit(rng.standard_normal((len(settings.markets), dim), dtype=np.float32))
        self.creator_embedding = _unit(
            self.category_centre[self.creator_category]
            + 0.3 * self.market_centre[self.creator_market]
            + 0.6 * _unit(rng.standard_normal((n, dim), dtype=np.float32))
        )
        rank = np.arange(1, n + 1, dtype=np.float64)
        self.creator_audience = settings.top_audience / rank**settings.popularity_exponent  # float64[n]
        # Creators of each category, most popular first; an empty category falls back to everyone.
        self._creators_of = [
            own if len(own := np.flatnonzero(self.creator_category == c)) else np.arange(n) for c in range(n_categories)
        ]

    def creator_id(self, creator: int) -> str:
        return f"creator-{creator:06d}"

    def stream_embeddings(self, creators: NDArray[np.integer[Any]], rng: np.random.Generator) -> NDArray[np.float32]:
        """float32[k, D], unit norm: near the creator, each stream a little different."""
        noise = _unit(rng.standard_normal((len(creators), self._settings.embedding_dim), dtype=np.float32))
        return _unit(self.creator_embedding[creators] + np.float32(0.35) * noise)

    def sample_viewers(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """int64[n] numbers of viewers as they are online: some often, most rarely."""
        return (rng.random(n) ** _VIEWER_SKEW * self._settings.n_viewers).astype(np.int64)

    def audience_of(self, categories: NDArray[np.integer[Any]], rng: np.random.Generator) -> NDArray[np.int64]:
        """int64[k] viewers, one per category given: most of them fond of it."""
        viewers = self.sample_viewers(len(categories), rng)
        # Viewer i likes category i % C best, so the nearest fan is at most C − 1 numbers away.
        n_categories = len(self._settings.categories)
        fans = viewers - viewers % n_categories + categories
        fond = (rng.random(len(categories)) < _LOYALTY) & (fans < self._settings.n_viewers)
        return np.where(fond, fans, viewers)

    def viewer(self, number: int) -> Viewer:
        """Viewer ``number`` (0 <= number < n_viewers), the same whenever asked."""
        s = self._settings
        if not 0 <= number < s.n_viewers:
            raise ValueError(f"viewer number must be within 0 to {s.n_viewers - 1}, not {number}")
        rng = np.random.default_rng([s.seed, 2, number])
        favourite = number % len(s.categories)
        second = int(rng.integers(len(s.categories)))
        home = int(self._markets(rng.random(1))[0])
        embedding = _unit(
            self.category_centre[favourite]
            + np.float32(0.5) * self.category_centre[second]
            + np.float32(0.3) * self.market_centre[home]
            + np.float32(0.5) * _unit(rng.standard_normal(s.embedding_dim, dtype=np.float32))
        )
        market = s.markets[home]
        speaks_english = market.language != "en" and rng.random() < 0.5
        followed: dict[str, None] = {}
        for category, most in ((favourite, 12), (second, 4)):
            pool = self._creators_of[category]
            # Squared: the popular ones are followed by many.
            picks = (rng.random(int(rng.integers(0, most + 1))) ** 2 * len(pool)).astype(np.int64)
            followed |= dict.fromkeys(self.creator_id(int(c)) for c in pool[picks])
        return Viewer(
            viewer_id=viewer_name(number),
            embedding=embedding,
            languages=(market.language, "en") if speaks_english else (market.language,),
            region=market.region,
            followed=tuple(followed),
            age=int(rng.integers(14, 66)),
        )

    def _markets(self, u: NDArray[np.float64]) -> NDArray[np.int16]:
        place = np.searchsorted(self._market_share, u * self._market_share[-1], side="right")
        return np.asarray(np.minimum(place, len(self._market_share) - 1), np.int16)


def _unit(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """``x`` [..., D] scaled to length 1 along its last axis."""
    return np.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), np.float32)
