"""What kind of platform is simulated: its size, its markets, its categories, and how badly it behaves."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Self


@dataclass(frozen=True, slots=True)
class Category:
    """A kind of stream. Rates are per viewer and second for an average crowd.

    ``bids`` and ``purchases`` saturate with the size of the crowd: one lot takes one bid at a time.
    """

    name: str
    share: float  # of creators
    chats: float = 0.010
    likes: float = 0.050
    bids: float = 0.0
    purchases: float = 0.0
    median_usd: float = 20.0  # of one purchase; bids are around it
    age_rating: int = 0  # minimum age of viewers, years


@dataclass(frozen=True, slots=True)
class Market:
    """Where people live: one region, the language most of them speak, the money they pay with."""

    region: str  # ISO 3166-1 alpha-2
    language: str  # BCP 47
    currency: str  # ISO 4217
    share: float  # of people
    minor_unit_usd: float  # value of one minor unit; only sizes amounts sensibly


CATEGORIES = (
    Category("fashion", 0.22, purchases=0.0006, median_usd=28),
    Category("beauty", 0.16, purchases=0.0008, median_usd=19, likes=0.07),
    Category("electronics", 0.10, purchases=0.0003, median_usd=85, chats=0.014),
    Category("collectibles", 0.12, bids=0.0040, purchases=0.0001, median_usd=45, chats=0.016),
    Category("jewellery", 0.07, bids=0.0025, purchases=0.0002, median_usd=140),
    Category("sneakers", 0.08, bids=0.0030, purchases=0.0004, median_usd=110, likes=0.06),
    Category("home", 0.08, purchases=0.0005, median_usd=34),
    Category("food", 0.07, purchases=0.0007, median_usd=14, chats=0.012),
    Category("wine", 0.03, bids=0.0015, purchases=0.0003, median_usd=38, age_rating=18),
    Category("music", 0.07, likes=0.10, chats=0.020, purchases=0.00005, median_usd=9),
)
MARKETS = (
    Market("US", "en", "USD", 0.34, 0.01),
    Market("GB", "en", "GBP", 0.08, 0.0127),
    Market("DE", "de", "EUR", 0.12, 0.0108),
    Market("FR", "fr", "EUR", 0.10, 0.0108),
    Market("ES", "es", "EUR", 0.08, 0.0108),
    Market("JP", "ja", "JPY", 0.12, 0.0067),
    Market("ID", "id", "IDR", 0.16, 0.00000062),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adversity:
    """How badly the platform behaves. All zeros is a perfect one: see ``none``."""

    # How streams end, shares of all ends; what is left over ends with a prompt event.
    silent_death: float = 0.04  # heartbeats stop, nobody says anything
    hung_encoder: float = 0.02  # heartbeats go on, the media sequence does not
    lost_end: float = 0.03  # the event is sent and never arrives
    delayed_end: float = 0.10  # it arrives seconds to minutes later
    delayed_end_mean_ms: int = 40_000
    restart: float = 0.06  # ends after which the same stream comes back with the next epoch
    # Encoders that drop out and come back, share of streams.
    flapping: float = 0.06
    flap_every_mean_ms: int = 60_000
    flap_gap_mean_ms: int = 12_000
    new_epoch_after_gap: float = 0.4  # else the old session goes on
    # Delivery, shares of events.
    late: float = 0.005
    late_mean_ms: int = 20_000
    duplicate: float = 0.005
    reorder: float = 0.01  # overtaken by up to three seconds' worth of later events
    # Fraud and junk, shares of streams; a stream is at most one of them.
    view_bot: float = 0.02
    chat_spam: float = 0.02
    low_quality: float = 0.03
    moderated_per_minute: float = 0.05  # chance that trust & safety notices such a stream

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name.endswith("_ms"):
                if value < 1:
                    raise ValueError(f"{f.name} must be at least 1, not {value}")
            elif not 0.0 <= value <= 1.0:
                raise ValueError(f"{f.name} is a share and must be within 0 to 1, not {value}")
        for names in (
            ("silent_death", "hung_encoder", "lost_end", "delayed_end"),
            ("late", "duplicate", "reorder"),
            ("view_bot", "chat_spam", "low_quality"),
        ):
            if sum(getattr(self, name) for name in names) > 1.0:
                raise ValueError(f"{', '.join(names)} exclude each other: their sum must not exceed 1")

    @classmethod
    def none(cls) -> Self:
        """A platform on which nothing goes wrong."""
        return cls(**{f.name: 0.0 for f in fields(cls) if not f.name.endswith("_ms")})  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldSettings:
    """One simulated platform. Equal settings give equal worlds.

    Raises ValueError, naming the field, for values that make no world.
    """

    seed: int = 0
    start_ms: int = 1_767_225_600_000  # simulated clock at the beginning, Unix epoch
    step_ms: int = 1_000
    target_live: int = 300  # streams live at once, at the mean of the day
    warm_start: bool = True  # begin with target_live streams of random ages
    daily_curve: bool = True  # fewer streams and viewers at night (UTC)
    mean_session_ms: int = 1_800_000
    session_spread: float = 0.8  # sigma of the log-normal session length; 0: all equal
    embedding_dim: int = 64
    n_creators: int = 20_000
    n_viewers: int = 1_000_000
    categories: tuple[Category, ...] = CATEGORIES
    markets: tuple[Market, ...] = MARKETS
    region_locked: float = 0.05  # share of streams shown in their own region only
    # Crowd of the most popular creator; the r-th has this / r ** popularity_exponent.
    top_audience: float = 20_000.0
    popularity_exponent: float = 0.75
    burst_every_mean_ms: int = 1_200_000  # raids, giveaways, product drops, per stream
    # How often, and into how many events, a stream's actions are packed.
    heartbeat_ms: int = 2_000
    viewer_count_ms: int = 10_000
    interaction_ms: int = 10_000
    attributed_per_flush: int = 2  # joins, likewise chats, that carry a viewer id; the others are one count
    money_per_flush: int = 8  # bids, likewise purchases, at most
    media_producers: int = 4
    app_producers: int = 4
    record_viewers_ms: int = 0  # keep true viewers this often for Truth.viewers_at; 0: never
    adversity: Adversity = field(default_factory=Adversity)

    def __post_init__(self) -> None:
        positive = (
            "start_ms", "step_ms", "target_live", "mean_session_ms", "embedding_dim", "n_viewers",
            "burst_every_mean_ms", "heartbeat_ms", "viewer_count_ms", "interaction_ms",
            "media_producers", "app_producers", "money_per_flush",
        )  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("session_spread", "attributed_per_flush", "record_viewers_ms", "top_audience"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if not 0.0 <= self.region_locked <= 1.0:
            raise ValueError(f"region_locked is a share and must be within 0 to 1, not {self.region_locked}")
        if self.n_creators < 3 * self.target_live:
            raise ValueError(
                f"n_creators ({self.n_creators}) must be at least 3 x target_live ({self.target_live}): "
                "a creator has one stream at a time"
            )
        if not self.categories or not self.markets:
            raise ValueError("categories and markets must not be empty")
