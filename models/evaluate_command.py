"""`liverank model evaluate` and `liverank model train-growth`."""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtest.replay.growth import AHEAD_S
from loadtest.replay.reader import read_history
from models.growth.evaluate import compare, print_outcome, split
from models.growth.rows import TRAIN_SHARE, Rows, cut_s, digest, rows_of
from models.growth.score import features_of, scores_of
from server.errors import ConfigError

NEWEST = "growth-2"


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """The options of one of the two commands."""
    parser.add_argument("--events", type=Path, required=True, metavar="FILE", help="history, CSV or Parquet")
    if name == "evaluate":
        parser.description = (
            f"Orders what is live at each minute of the last {1 - TRAIN_SHARE:.0%} of the file's time by the model and "
            "by every formula, and compares both with what really grew. Prints a table and, last, one line of JSON."
        )
        parser.add_argument(
            "--model",
            required=True,
            metavar="VERSION",
            help=f"a version of the recipe, as {NEWEST}: it is trained here, on the first {TRAIN_SHARE:.0%} of the "
            "file's time; or a folder that train-growth wrote: it is tested as it is, and refused if it learned from "
            "the part of this file that tests",
        )
        return
    parser.description = "Trains a version of the growth recipe and writes it as ONNX with its facts."
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the version's folder, written whole")
    parser.add_argument("--recipe", default=NEWEST, metavar="VERSION", help=f"version of the recipe ({NEWEST})")
    parser.add_argument(
        "--whole-file", action="store_true", help=f"learn from all of it, not from its first {TRAIN_SHARE:.0%} of time"
    )


def run(options: argparse.Namespace) -> int:
    """Raises ConfigError: the file, the version or an option is wrong."""
    return _evaluate(options.events, options.model) if options.action == "evaluate" else _train(options)


def _evaluate(events: Path, version: str) -> int:
    began_s = time.monotonic()
    history = read_history(events)
    cut = cut_s(history)
    train, test = split(rows_of(history), cut)
    facts: dict[str, Any] = {"version": version, "events_sha256": digest(events), "cut_s": cut}
    outcome = compare(test, _scores(version, facts, train, test))
    title = f"{version} on {events.name}: learned from up to second {cut:,} of its clock, tested on the rest"
    print_outcome(outcome, title, {**facts, "seconds": round(time.monotonic() - began_s, 1)})
    return 0


def _scores(version: str, facts: dict[str, Any], train: Rows, test: Rows) -> NDArray[np.float32]:
    """Of test rows, by a version that is in a folder, or trained now; adds to ``facts`` what it learned from."""
    if Path(version).is_dir():
        from models.growth.export import load

        trained = load(Path(version))
        same = trained.facts.get("events_sha256") == facts["events_sha256"]
        if same and trained.facts["known_until_s"] > facts["cut_s"]:
            raise ConfigError(
                f"--model: {version} knows this file up to second {trained.facts['known_until_s']:,}, the test begins "
                f"at {facts['cut_s']:,}; wanted is a version trained on the first {TRAIN_SHARE:.0%}"
            )
        return scores_of(trained.predict, trained.learns, test)
    from models.growth.fit import fit, recipe_of
    from models.growth.net import predict

    model = fit(train, recipe_of(version), _say)
    facts["rows_learned"] = int(np.isfinite(train.then).sum())
    return scores_of(partial(predict, model), model.learns, test)


def _train(options: argparse.Namespace) -> int:
    from models.growth.export import publish
    from models.growth.fit import fit, recipe_of

    recipe = recipe_of(options.recipe)
    history = read_history(options.events)
    until_s = int(history.t_s[-1]) if options.whole_file else cut_s(history)
    rows = rows_of(history)
    rows = rows.take(rows.t_s + AHEAD_S <= until_s)
    facts = {
        "recipe": options.recipe,
        "events_sha256": digest(options.events),
        "known_until_s": until_s,
        "rows": int(np.isfinite(rows.then).sum()),
    }
    folder = publish(options.out, fit(rows, recipe, _say), features_of(rows, recipe.learns)[:4096], facts)
    print(f"{options.recipe}, learned from {facts['rows']:,} rows: {folder}")
    return 0


def _say(what: str) -> None:
    print(f"trained {what}", file=sys.stderr, flush=True)
