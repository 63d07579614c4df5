"""Trains the trendiness model on simulated platforms and puts it into the model repository.

    python -m models.train [--out model_repository] [--version 1] [--minutes 180] [--streams 300] [--seed 7]

Seeded: the same command writes the same files. The last line of output is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtest.world import WorldSettings
from models import target
from models.dataset import Rows, concatenate, simulate, split_by_time
from models.evaluation import report
from models.export import publish, without_nan
from models.fit import FitSettings, fit
from models.processes import Each, one_after_the_other
from models.telling import Telling, everything, mixed, only
from models.trendiness import Trendiness, predict
from server.config import TableSettings
from server.live.features import FeatureSet

DAY_MS = 86_400_000


@dataclass(frozen=True)
class Platform:
    """What differs between the simulated platforms to learn from.

    Session length and how often the apps tell, in simulated time; how many times slower life is than
    simulated; the crowd of the most popular creator.
    """

    session_minutes: int
    interaction_ms: int
    slowness: int
    top_audience: float


# Platforms differ in pace, in size, and in how often their apps tell; the model should not care.
PLATFORMS = (
    Platform(30, 10_000, 1, 20_000),
    Platform(30, 10_000, 4, 100_000),
    Platform(60, 60_000, 1, 20_000),
    Platform(15, 10_000, 6, 20_000),
    Platform(30, 10_000, 1, 50_000),
    Platform(30, 30_000, 2, 200_000),
    Platform(20, 10_000, 1, 20_000),
    Platform(45, 10_000, 12, 200_000),
    Platform(60, 10_000, 4, 50_000),
    Platform(30, 10_000, 1, 20_000),
    Platform(20, 10_000, 12, 50_000),
    Platform(30, 10_000, 6, 100_000),
)
TEST_SEED_OFFSET = 1_000
UNSEEN = ("unseen", "unseen_slow")
"""Platforms of the first two kinds, with other people on them: what the model is tested on."""
# How the unseen platform is told in the second test.
TEST_TELLINGS: dict[str, Telling] = {
    "everything": everything,
    "viewers_and_likes": only("likes", gauge_every=6),
    "viewers": only(gauge_every=6),
}


@dataclass(frozen=True)
class TrainSettings:
    """minutes (after the warm-up) and streams of every simulated platform; seed of everything."""

    minutes: int = 180
    streams: int = 300
    seed: int = 7
    platforms: int = len(PLATFORMS)
    fit: FitSettings = field(default_factory=FitSettings)


@dataclass(frozen=True)
class Trained:
    """The model, what metrics.json says about it, and some rows to check the export with."""

    model: Trendiness
    facts: dict[str, Any]
    sample: NDArray[np.float32]


def world_settings(settings: TrainSettings, number: int, seed: int) -> WorldSettings:
    """Platform ``number`` of so many, each starting at another time of the day."""
    start_ms = WorldSettings().start_ms + number * DAY_MS // settings.platforms
    platform = PLATFORMS[number % len(PLATFORMS)]
    return WorldSettings(
        seed=seed, target_live=settings.streams, start_ms=start_ms - start_ms % 60_000, step_ms=5_000,
        heartbeat_ms=10_000, embedding_dim=8, n_creators=max(20_000, 4 * settings.streams),
        mean_session_ms=platform.session_minutes * 60_000, interaction_ms=platform.interaction_ms,
        top_audience=platform.top_audience,
    )  # fmt: skip


def play(settings: TrainSettings, features: FeatureSet, number: int) -> list[Rows]:
    """Rows of platform ``number``, told completely and incompletely; of the platforms to learn from there are
    ``settings.platforms``, those after them are the first two again, with other people on them, told in each way of
    TEST_TELLINGS."""
    if number < settings.platforms:
        world = world_settings(settings, number, settings.seed + number)
        tellings, told_as = [everything, mixed(world.seed)], number
    else:
        number, told_as = number - settings.platforms, 0
        world = world_settings(settings, number, settings.seed + TEST_SEED_OFFSET)
        tellings = list(TEST_TELLINGS.values())
    slowness = PLATFORMS[number % len(PLATFORMS)].slowness
    return simulate(world, settings.minutes, features, tellings, slowness=slowness, world=told_as)


def train(
    settings: TrainSettings, features: FeatureSet, say: Callable[[str], None], each: Each = one_after_the_other
) -> Trained:
    """Simulates, fits, calibrates and tests; writes nothing.

    Args:
        each: does the platforms, which know nothing of each other.
    """
    parts: list[Rows] = []
    n_unseen = min(len(UNSEEN), settings.platforms)
    played = each(partial(play, settings, features), range(settings.platforms + n_unseen))
    told_unseen: list[list[Rows]] = []
    for number, told in enumerate(played):
        if number >= settings.platforms:
            told_unseen.append(told)
            continue
        # Both tellings of a platform are at the same minutes, hence in the same part of the split.
        complete, incomplete = told
        parts += told
        say(f"platform {number}: {len(complete)} rows of the complete feed, {len(incomplete)} of mixed ones")
    rows = concatenate(parts)
    split = split_by_time(rows, settings.minutes)
    fitted = fit(split, settings.fit, settings.seed, say)

    tests = {"later_time": concatenate([split_by_time(p, settings.minutes).test for p in parts[::2]])}
    tests["later_time_mixed"] = concatenate([split_by_time(p, settings.minutes).test for p in parts[1::2]])
    for prefix, told in zip(UNSEEN, told_unseen):
        tests |= {f"{prefix}_{name}": one for name, one in zip(TEST_TELLINGS, told)}
    metrics = {name: report(test, predict(fitted.model, test.features), features.names) for name, test in tests.items()}
    facts = {
        "feature_schema": features.schema,
        "features": list(features.names),
        "target": {
            "horizon_minutes": target.HORIZON_MINUTES, "top_share": target.TOP_SHARE,
            "prior_viewers": target.PRIOR_VIEWERS,
        },
        "settings": asdict(settings),
        "platforms": [asdict(PLATFORMS[i % len(PLATFORMS)]) for i in range(settings.platforms)],
        "data_digest": rows.digest(),
        "rows": {"fit": len(split.fit), "stop": len(split.stop), "calibrate": len(split.calibrate)},
        "parameters": sum(p.numel() for p in fitted.model.parameters()),
        "epochs": fitted.course.best,
        "calibration": {"slope": float(fitted.model.slope), "offset": float(fitted.model.offset)},
        "metrics": metrics,
    }  # fmt: skip
    return Trained(fitted.model, facts, tests["unseen_everything"].features[:4096])


def headline(facts: dict[str, Any]) -> dict[str, float]:
    """The few numbers that go into config.pbtxt and the last line: the unseen platform, complete feed."""
    test = facts["metrics"]["unseen_everything"]
    return {
        "auc": test["auc"]["model"],
        "log_loss": test["log_loss"],
        "calibration_error": test["calibration_error"],
        "overlap_at_10.target": test["overlap_at_10"]["model"]["target"],
        "overlap_at_10.absolute": test["overlap_at_10"]["model"]["absolute"],
        "overlap_at_10.relative": test["overlap_at_10"]["model"]["relative"],
    }


def main(arguments: Sequence[str] | None = None, each: Each = one_after_the_other) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m models.train", description="Trains the trendiness model.")
    parser.add_argument("--out", type=Path, default=Path("model_repository"), help="model repository")
    parser.add_argument("--version", type=int, default=1, help="version folder to write")
    parser.add_argument("--minutes", type=int, default=TrainSettings.minutes, help="of each platform")
    parser.add_argument("--streams", type=int, default=TrainSettings.streams, help="live at once on each")
    parser.add_argument("--platforms", type=int, default=TrainSettings.platforms, help="to learn from")
    parser.add_argument("--seed", type=int, default=TrainSettings.seed)
    parser.add_argument("--features", type=Path, default=TableSettings().features_file, help="declaration file")
    given = parser.parse_args(arguments)
    began = time.monotonic()
    features = FeatureSet.load(given.features)
    settings = TrainSettings(given.minutes, given.streams, given.seed, given.platforms)
    trained = train(settings, features, lambda line: print(line, flush=True), each)
    for name, metrics in trained.facts["metrics"].items():
        print_report(name, metrics)
    folder = publish(
        given.out, given.version, trained.model, features.schema, trained.sample, trained.facts,
        headline(trained.facts),
    )  # fmt: skip
    print(f"wrote {folder} in {time.monotonic() - began:.0f} s", flush=True)
    print(json.dumps(without_nan(headline(trained.facts))))
    return 0


def print_report(name: str, metrics: dict[str, Any]) -> None:
    """One test set as text."""
    print(
        f"\n{name}: {metrics['rows']} rows, {metrics['positives']:.1%} positive, "
        f"log loss {metrics['log_loss']:.4f} (base rate {metrics['log_loss_of_base_rate']:.4f}), "
        f"calibration error {metrics['calibration_error']:.4f}"
    )
    print(f"  {'':20s} {'AUC':>6s}   overlap@10 with growth: target  absolute  relative")
    for score, found in metrics["overlap_at_10"].items():
        area = metrics["auc"].get(score, 0.5)
        shares = "  ".join(f"{found[kind]:8.3f}" for kind in ("target", "absolute", "relative"))
        print(f"  {score:20s} {area:6.3f}   {'':22s} {shares}")


if __name__ == "__main__":
    sys.exit(main())
