"""Trains the two towers and puts them into the model repository, each as a model of its own.

    python -m models.train_two_tower [--rows FILE] [--out model_repository] [--version 1] [--checkpoint FILE] …

Arguments as of `models.train_ranker`. The last line of output is JSON.
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
import torch
from numpy.typing import NDArray

from models import experiment
from models.evaluation_ranking import bootstrap_mean
from models.export import without_nan
from models.fit_two_tower import FittedTowers, TwoTowerSettings, fit_two_tower, recall_of_watched
from models.impressions import NEW_MINUTES, Impressions
from models.ranking_data import RankingData, data_hash, take_share
from models.repository import place
from models.train_ranker import add_arguments, load, without_none
from models.training_report import write_report
from models.two_tower_graph import (
    OUTPUT_EMBEDDING,
    STREAM_TOWER,
    VIEWER_TOWER,
    stream_tower_graph,
    viewer_tower_graph,
)
from models.workers import ALONE, Workers, workers
from server.errors import LiverankError
from server.live.features import FeatureSet

NAME = "two_tower"
TOPS = (50, 500)


@dataclass(frozen=True)
class TrainedTowers:
    """fitted: with their weights. facts: the experiment."""

    fitted: FittedTowers
    facts: dict[str, Any]
    sample: Impressions


def train_two_tower(
    data: RankingData,
    features: FeatureSet,
    settings: TwoTowerSettings,
    seed: int,
    say: Callable[[str], None],
    *,
    team: Workers = ALONE,
    checkpoint: Path | None = None,
) -> TrainedTowers:
    """Fits and tests; writes nothing but the checkpoint."""
    fitted = fit_two_tower(data.split, settings, seed, say, workers=team, checkpoint=checkpoint)
    test = data.split.test
    metrics: dict[str, Any] = {"clicks": int(data.split.fit.clicked.sum()), "watched": int(test.watched.sum())}
    for name, which in _kinds(test, features, data.split.fit).items():
        for top in TOPS:
            metrics[f"recall_at_{top}.{name}"] = {
                "towers": asdict(bootstrap_mean(recall_of_watched(fitted.model, test, top, which))),
                "embeddings_as_they_came": asdict(bootstrap_mean(recall_of_watched(None, test, top, which))),
            }
    facts = experiment.record(
        NAME, data_hash=data_hash(data.split), feature_schema=data.feature_schema,
        settings={
            "fit": asdict(settings), "shape": asdict(fitted.model.shape), "seed": seed, "workers": team.size,
            "data": data.source,
        },
        parameters=sum(p.numel() for p in fitted.model.parameters()), course=fitted.course, metrics=metrics,
    )  # fmt: skip
    return TrainedTowers(fitted, facts, take_share(test, 512))


def headline(facts: dict[str, Any]) -> dict[str, float]:
    """The few numbers that go into config.pbtxt and the last line."""
    return {
        f"{name}.{way}": found["value"]
        for name, ways in facts["metrics"].items()
        if name.startswith(f"recall_at_{TOPS[0]}.")
        for way, found in ways.items()
    }


def publish_towers(repository: Path, version: int, trained: TrainedTowers) -> list[Path]:
    """Writes a version of both models; see `models.repository.place`."""
    model, numbers = trained.fitted.model, without_none(headline(trained.facts))
    given = trained.sample.inputs(slice(None)).tensors()
    stream = {name: given[name] for name in ("stream_embedding", "codes")}
    viewer = {name: given[name] for name in ("viewer_embedding", "sequence_embedding", "sequence_meta")}
    written = []
    for name, tower, graph, inputs in (
        (STREAM_TOWER, model.stream, stream_tower_graph(model.stream), stream),
        (VIEWER_TOWER, model.viewer, viewer_tower_graph(model.viewer), viewer),
    ):
        with torch.inference_mode():
            wanted = tower(**{k: torch.from_numpy(np.ascontiguousarray(a)) for k, a in inputs.items()}).numpy()
        written.append(
            place(repository, name, version, graph, inputs, {OUTPUT_EMBEDDING: wanted}, trained.facts, numbers)
        )
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m models.train_two_tower", description="Trains the two towers.")
    add_arguments(parser, "build/models/two_tower.html")
    given = parser.parse_args(arguments)
    began = time.monotonic()
    with workers(given.device) as team:
        say = (lambda line: print(line, flush=True)) if team.leads else (lambda line: None)
        try:
            features, data = load(given, say)
            settings = TwoTowerSettings()
            settings = replace(settings, fit=replace(settings.fit, max_epochs=given.epochs or settings.fit.max_epochs))
            trained = train_two_tower(
                data, features, settings, given.seed, say, team=team, checkpoint=given.checkpoint
            )  # fmt: skip
        except LiverankError as error:
            print(f"train: {error}", file=sys.stderr)
            return 2
        if team.leads:
            folders = publish_towers(given.out, given.version, trained)
            write_report(given.report, trained.facts)
            say(f"wrote {', '.join(map(str, folders))} and {given.report} in {time.monotonic() - began:.0f} s")
            print(json.dumps({**without_nan(headline(trained.facts)), "metrics_hash": trained.facts["metrics_hash"]}))
    return 0


def _kinds(test: Impressions, features: FeatureSet, learned: Impressions) -> dict[str, NDArray[np.bool_]]:
    """What recall is asked of, bool[R] by name."""
    known = (test.askings.embedding**2).sum(1)[test.asking] > 0
    visited = test.askings.sequence_meta[..., -1].any(1)[test.asking]
    new = test.features[:, features.names.index("age_minutes")] < NEW_MINUTES
    return {
        "all": np.ones(len(test), np.bool_), "viewer_embedding": known, "history_only": ~known & visited,
        "new_streams": new & known, "unseen_creators": ~np.isin(test.creator, learned.creator) & known,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
