"""The impressions that the ranker and the towers are trained on: of a dataset file, or of simulated platforms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtest.world import WorldSettings
from loadtest.world.audience import DAY_MS
from loadtest.world.viewing import examination
from models.impressions import Impressions, ImpressionSplit, concatenate_impressions, impressions_of, split_impressions
from models.processes import Each, one_after_the_other
from models.schema import read_rows
from models.simulated_impressions import Policy, simulate_impressions
from server.errors import ConfigError
from server.live.features import FeatureSet

LONGEST_VISIT_MS = 600_000
"""Of the simulated audience: labels look no further ahead."""


@dataclass(frozen=True)
class SimulationSettings:
    """platforms: worlds of different people, hours and embeddings. minutes: of each, after its warm-up."""

    platforms: int = 3
    minutes: int = 240
    streams: int = 250
    embedding_dim: int = 64
    askings_per_minute: int = 30
    seed: int = 7


@dataclass(frozen=True)
class RankingData:
    """Split by time. planted: float64[P], the true effect of places where it is known. source: what it is, as JSON."""

    split: ImpressionSplit
    planted: NDArray[np.float64] | None
    feature_schema: str
    source: dict[str, Any]


def play(settings: SimulationSettings, features: FeatureSet, number: int) -> Impressions:
    """The impressions of platform ``number``."""
    # Embeddings of different worlds have nothing in common: what is learned must not lean on their directions.
    world = WorldSettings(
        seed=settings.seed + 100 * (number + 1), target_live=settings.streams, step_ms=5_000, heartbeat_ms=10_000,
        embedding_dim=settings.embedding_dim, n_creators=max(2_000, 4 * settings.streams),
        start_ms=_start_ms(number, settings.platforms),
    )  # fmt: skip
    return simulate_impressions(world, settings.minutes, features, _policy(settings), name=f"platform-{number}")


def simulated(
    settings: SimulationSettings,
    features: FeatureSet,
    say: Callable[[str], None],
    each: Each = one_after_the_other,
) -> RankingData:
    """Plays the platforms; equal settings give equal rows. Raises ValueError: too few minutes for a split.

    Args:
        each: does the platforms, which know nothing of each other.
    """
    policy = _policy(settings)
    splits = []
    for number, rows in enumerate(each(partial(play, settings, features), range(settings.platforms))):
        splits.append(split_impressions(rows, LONGEST_VISIT_MS))
        say(f"platform {number}: {len(rows)} impressions, {int(rows.clicked.sum())} clicks")
    parts = {
        name: concatenate_impressions([getattr(split, name) for split in splits])
        for name in ("fit", "stop", "calibrate", "test")
    }
    source = {"simulated": settings.__dict__, "policy": policy.__dict__}
    return RankingData(ImpressionSplit(**parts), examination(np.arange(policy.places)), features.schema, source)


def _policy(settings: SimulationSettings) -> Policy:
    return Policy(askings_per_minute=settings.askings_per_minute)


def of_file(path: Path) -> RankingData:
    """Rows of `liverank replay --rows impressions`.

    Raises:
        ConfigError: it cannot be read, holds other rows, or too few of them to split by time.
    """
    table = read_rows(path)
    if table.metadata["rows"] != "impressions":
        raise ConfigError(f"{path}: rows of impressions wanted, got {table.metadata['rows']}")
    try:
        split = split_impressions(impressions_of(table))
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    names = ("schema_hash", "data_hash", "source")
    return RankingData(
        split, None, table.metadata["feature_schema"], {name: table.metadata.get(name, "") for name in names}
    )


def data_hash(split: ImpressionSplit) -> str:
    """Of all four parts."""
    return "-".join(part.digest()[:8] for part in (split.fit, split.stop, split.calibrate, split.test))


def take_share(rows: Impressions, n: int) -> Impressions:
    """The first ``n`` rows: a sample to check an export with."""
    return rows.take(np.arange(min(n, len(rows))))


def _start_ms(number: int, platforms: int) -> int:
    start_ms = WorldSettings().start_ms + number * DAY_MS // platforms
    return start_ms - start_ms % 60_000
