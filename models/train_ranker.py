"""Trains the ranker and puts it into the model repository.

    python -m models.train_ranker [--rows FILE] [--out model_repository] [--version 1] [--checkpoint FILE] …
    torchrun --standalone --nproc-per-node 2 -m models.train_ranker …      # several processes, or GPUs

Without --rows on simulated platforms, where the truth is known. Seeded: the same command gives the same weights and
metrics. The last line of output is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models import experiment
from models.evaluation_ranker import (
    calibration_curve,
    head_metrics,
    off_policy,
    order_metrics,
    place_errors,
    segment_table,
)
from models.export import without_nan
from models.fit_ranker import FittedRanker, RankerSettings, answers, fit_ranker, known_places, position_effect
from models.impressions import Impressions, segments
from models.ranker import POSITIONS, TASKS, WATCH_CAP_S
from models.ranker_graph import OUTPUT_WATCH_SECONDS, ranker_graph
from models.ranking_data import RankingData, SimulationSettings, data_hash, of_file, simulated, take_share
from models.repository import place
from models.training_report import write_report
from models.workers import ALONE, Workers, workers
from server.config import ScoringSettings, TableSettings
from server.errors import LiverankError
from server.live.features import FeatureSet
from server.scoring.local import LocalScorer
from server.scoring.ranker_schema import CODE_BUCKETS, HEADS, OUTPUT_HEADS, bucket_of

NAME = "ranker"
LABELS = dict(zip(HEADS, ("clicked", "watched", "purchased", "reported"), strict=True))


@dataclass(frozen=True)
class TrainedRanker:
    """fitted: with its weights. facts: the experiment. charts: what the report draws besides."""

    fitted: FittedRanker
    facts: dict[str, Any]
    charts: dict[str, Any]
    sample: Impressions


def train_ranker(
    data: RankingData,
    features: FeatureSet,
    settings: RankerSettings,
    seed: int,
    say: Callable[[str], None],
    trend: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    *,
    team: Workers = ALONE,
    checkpoint: Path | None = None,
) -> TrainedRanker:
    """Fits, calibrates, tests; writes nothing but the checkpoint.

    Args:
        trend: scores float32[R] of feature rows float32[R, F], the order to be beaten.
    """
    fitted = fit_ranker(data.split, settings, seed, say, workers=team, checkpoint=checkpoint)
    model, test = fitted.model, known_places(data.split.test)
    shown, neutral = answers(model, test, neutral=False), answers(model, test)
    effect = position_effect(model)
    # Labels are undone of the planted effect, where there is one: the judge must not be the judged.
    judged = effect if data.planted is None else np.concatenate([data.planted, np.full(POSITIONS, data.planted[-1])])
    examined = judged[np.minimum(test.position, POSITIONS).astype(np.int64) - 1]
    orders = {
        "trendiness": trend(test.features),
        "as_shown": -test.position,
        "viewers": test.features[:, features.names.index("viewers")],
        **{f"ranker_{head}": neutral[:, i] for i, head in enumerate(HEADS[:3])},
    }
    table = segments(test, test.features[:, features.names.index("age_minutes")], _languages())
    metrics: dict[str, Any] = {
        "rows": len(test), "heads": head_metrics(test, shown[:, : len(HEADS)]),
        "orders": order_metrics(test, orders, examined),
        "off_policy_value": off_policy(test, {k: orders[k] for k in ("trendiness", "ranker_purchase")}, test.value),
        "watch_seconds": {
            "mean": float(shown[:, TASKS.index("watch_time")].mean() * WATCH_CAP_S),
            "happened": float(np.minimum(test.watch_s, WATCH_CAP_S).mean()),
        },
    }  # fmt: skip
    places = {"learned": effect[: _deepest(test)].tolist()}
    if data.planted is not None:
        metrics["places"] = place_errors(effect[: len(data.planted)], data.planted)
        places["planted"] = data.planted.tolist()
    segment_rows = segment_table(test, shown[:, : len(HEADS)], table)
    facts = experiment.record(
        NAME, data_hash=data_hash(data.split), feature_schema=data.feature_schema,
        settings={
            "fit": asdict(settings), "shape": asdict(model.shape), "seed": seed, "workers": team.size,
            "data": data.source,
        },
        parameters=sum(p.numel() for p in model.parameters()), course=fitted.course, metrics=metrics,
        segments=segment_rows,
        calibration={h: [float(model.slope[i]), float(model.offset[i])] for i, h in enumerate(HEADS)},
    )  # fmt: skip
    curves = {h: calibration_curve(shown[:, i], getattr(test, LABELS[h])) for i, h in enumerate(HEADS)}
    charts = {"calibration": curves, "segments": segment_rows, "places": places}
    return TrainedRanker(fitted, facts, charts, take_share(test, 512))


def headline(facts: dict[str, Any]) -> dict[str, float]:
    """The few numbers that go into config.pbtxt and the last line."""
    metrics = facts["metrics"]
    found = {f"auc.{head}": metrics["heads"][head]["auc"]["value"] for head in HEADS}
    found |= {f"calibration_error.{head}": metrics["heads"][head]["calibration_error"]["value"] for head in HEADS}
    for name in ("trendiness", "ranker_purchase"):
        found[f"value_per_impression.{name}"] = metrics["orders"][name]["value_per_impression"]["value"]
    if "places" in metrics:
        found["places.mean_relative_error"] = metrics["places"]["mean_relative_error"]
    return found


def publish_ranker(repository: Path, version: int, trained: TrainedRanker) -> Path:
    """Writes the version; see `models.repository.place`."""
    model, sample = trained.fitted.model, trained.sample
    graph = ranker_graph(model, trained.facts["feature_schema"])
    # Neutral and with places: both ways are served from the same graph.
    inputs = sample.inputs(slice(None), neutral=False).tensors()
    inputs["position"][::2] = -1.0
    wanted = _answers_of(model, inputs)
    numbers = without_none(headline(trained.facts))
    ranges = {OUTPUT_WATCH_SECONDS: WATCH_CAP_S}
    return place(repository, NAME, version, graph, inputs, wanted, trained.facts, numbers, ranges)


def without_none(numbers: dict[str, float]) -> dict[str, float]:
    """Those that could be measured."""
    return {name: value for name, value in numbers.items() if np.isfinite(value)}


def trend_of_repository(repository: Path, features: FeatureSet) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """The shipped trendiness model, as the server runs it in process."""
    scorer = LocalScorer(repository, "trendiness", features.schema, len(features))
    return lambda rows: scorer.score(rows, 60.0).values


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m models.train_ranker", description="Trains the ranker.")
    add_arguments(parser, "build/models/ranker.html")
    given = parser.parse_args(arguments)
    began = time.monotonic()
    with workers(given.device) as team:
        say = (lambda line: print(line, flush=True)) if team.leads else (lambda line: None)
        try:
            features, data = load(given, say)
            settings = RankerSettings()
            settings = replace(settings, fit=replace(settings.fit, max_epochs=given.epochs or settings.fit.max_epochs))
            trend = trend_of_repository(given.trend, features)
            trained = train_ranker(
                data, features, settings, given.seed, say, trend, team=team, checkpoint=given.checkpoint
            )  # fmt: skip
        except LiverankError as error:
            print(f"train: {error}", file=sys.stderr)
            return 2
        if team.leads:
            folder = publish_ranker(given.out, given.version, trained)
            write_report(given.report, trained.facts, **trained.charts)
            say(f"wrote {folder} and {given.report} in {time.monotonic() - began:.0f} s")
            print(json.dumps({**without_nan(headline(trained.facts)), "metrics_hash": trained.facts["metrics_hash"]}))
    return 0


def add_arguments(parser: argparse.ArgumentParser, report: str) -> None:
    """What all trainings on impressions are told."""
    defaults = SimulationSettings()
    parser.add_argument("--rows", type=Path, help="Parquet of `liverank replay --rows impressions`; default: simulate")
    parser.add_argument("--out", type=Path, default=Path("model_repository"), help="model repository")
    parser.add_argument("--version", type=int, default=1, help="version folder to write")
    parser.add_argument("--report", type=Path, default=Path(report), help="page to write")
    parser.add_argument("--trend", type=Path, default=ScoringSettings().model_repository, help="of the trend model")
    parser.add_argument("--checkpoint", type=Path, help="written each epoch; training goes on from it if it is there")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--epochs", type=int, help="at most")
    parser.add_argument("--platforms", type=int, default=defaults.platforms, help="to simulate")
    parser.add_argument("--minutes", type=int, default=defaults.minutes, help="of each platform")
    parser.add_argument("--streams", type=int, default=defaults.streams, help="live at once on each")
    parser.add_argument("--askings-per-minute", type=int, default=defaults.askings_per_minute)
    parser.add_argument("--embedding-dim", type=int, default=TableSettings().embedding_dim)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--features", type=Path, default=TableSettings().features_file, help="declaration file")


def load(given: argparse.Namespace, say: Callable[[str], None]) -> tuple[FeatureSet, RankingData]:
    """What the arguments ask for. Raises ConfigError."""
    features = FeatureSet.load(given.features)
    if given.rows is not None:
        return features, of_file(given.rows)
    settings = SimulationSettings(
        given.platforms, given.minutes, given.streams, given.embedding_dim, given.askings_per_minute, given.seed
    )
    return features, simulated(settings, features, say)


def _answers_of(model: Any, inputs: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    import torch

    with torch.inference_mode():
        found = model(**{name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in inputs.items()}).numpy()
    return {OUTPUT_HEADS: found[:, : len(HEADS)], OUTPUT_WATCH_SECONDS: found[:, len(HEADS)] * np.float32(WATCH_CAP_S)}


def _deepest(rows: Impressions) -> int:
    return int(min(rows.position.max(initial=1), POSITIONS))


def _languages() -> dict[int, str]:
    names = ["", "en", "de", "fr", "es", "ja", "id", "pt", "zh", "ko", "it", "nl", "ru", "ar", "hi", "tr", "pl", "vi"]
    return dict(zip(bucket_of(names, CODE_BUCKETS[0]).tolist(), ["unknown", *names[1:]], strict=True))


if __name__ == "__main__":
    sys.exit(main())
