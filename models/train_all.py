"""Trains every model that is shipped, from nothing: trendiness, then ranker and towers on one simulation.

    python -m models.train_all [--out model_repository] [--reports build/models] [--small]

Platforms are played, and towers and ranker trained, in two processes at a time; each is seeded and on one thread, so
the same command gives the same weights and metrics. The last line of output is JSON: by model, the hash of its metrics.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from models import train as trendiness
from models.experiment import metrics_hash
from models.fit_ranker import RankerSettings
from models.fit_two_tower import TwoTowerSettings
from models.processes import each_in, processes
from models.ranking_data import RankingData, SimulationSettings, simulated
from models.train_ranker import publish_ranker, train_ranker, trend_of_repository
from models.train_two_tower import publish_towers, train_two_tower
from models.training_report import write_report
from server.config import TableSettings
from server.live.features import FeatureSet

PROCESSES = 2
"""That play and train at a time, beside this one, which trains the others."""
SMALL = SimulationSettings(platforms=1, minutes=120, streams=60, embedding_dim=16, askings_per_minute=20)


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m models.train_all", description="Trains all shipped models.")
    parser.add_argument("--out", type=Path, default=Path("model_repository"), help="model repository")
    parser.add_argument("--version", type=int, default=1, help="version folders to write")
    parser.add_argument("--reports", type=Path, default=Path("build/models"), help="folder for the pages")
    parser.add_argument("--seed", type=int, default=SimulationSettings.seed)
    parser.add_argument("--small", action="store_true", help="tiny platforms: minutes, and models of no use")
    given = parser.parse_args(arguments)
    began = time.monotonic()
    out, version = given.out, given.version
    small = ["--minutes", "45", "--streams", "25", "--platforms", "1"] if given.small else []
    features = FeatureSet.load(TableSettings().features_file)
    size = SMALL if given.small else SimulationSettings(seed=given.seed)
    hashes = {}
    with processes(PROCESSES) as pool, ThreadPoolExecutor(1) as meanwhile:
        each = each_in(pool)
        data = meanwhile.submit(simulated, size, features, _say, each)
        trendiness.main(["--out", str(out), "--version", str(version), "--seed", str(given.seed), *small], each)
        facts = json.loads((out / "trendiness" / str(version) / "metrics.json").read_text())
        hashes["trendiness"] = metrics_hash(facts["metrics"])
        towers = pool.submit(_towers, data.result(), features, given)
        ranker = train_ranker(
            data.result(), features, RankerSettings(), given.seed, _say, trend_of_repository(out, features)
        )
        _say(f"wrote {publish_ranker(out, version, ranker)}")
        write_report(given.reports / "ranker.html", ranker.facts, **ranker.charts)
        hashes["ranker"], hashes["two_tower"] = ranker.facts["metrics_hash"], towers.result()
    _say(f"all models in {time.monotonic() - began:.0f} s")
    print(json.dumps(hashes))
    return 0


def _towers(data: RankingData, features: FeatureSet, given: argparse.Namespace) -> str:
    """Trains and writes the towers, in a process of their own; returns the hash of their metrics."""
    trained = train_two_tower(data, features, TwoTowerSettings(), given.seed, lambda line: _say(f"towers: {line}"))
    _say(f"wrote {', '.join(map(str, publish_towers(given.out, given.version, trained)))}")
    write_report(given.reports / "two_tower.html", trained.facts)
    found: str = trained.facts["metrics_hash"]
    return found


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
