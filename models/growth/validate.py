"""How good a recipe is inside the training part: what recipes are chosen by, so that the test part stays unseen.

    python -m models.growth.validate --events FILE [--recipe growth-2] [--folds 5]

Forward in time: the first 70 % of the file's time are cut into ``folds`` + 1 blocks; each but the first is predicted
from all that was known before it began. Prints the table of `liverank model evaluate` for the predicted blocks.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loadtest.replay.growth import AHEAD_S
from loadtest.replay.reader import read_history
from models.growth.evaluate import compare, print_outcome, split
from models.growth.fit import RECIPES, fit, recipe_of
from models.growth.net import predict
from models.growth.rows import Rows, cut_s, rows_of
from models.growth.score import scores_of
from server.errors import LiverankError

Scorer = Callable[[Rows, Rows], NDArray[np.float32]]
"""Learns from rows, then scores others: float32[n, TARGETS]."""


def forward_chained(train: Rows, scorer: Scorer, folds: int) -> tuple[Rows, NDArray[np.float32]]:
    """The rows of all blocks but the first, each scored by what was learned from the time before its block.

    Args:
        train: of the training part alone. folds: blocks that are predicted.
    """
    edges = np.linspace(train.t_s.min(), train.t_s.max() + 1, folds + 2)
    later = train.take(train.t_s >= edges[1])
    scores = []
    for begin, end in itertools.pairwise(edges[1:].tolist()):
        known = train.take(train.t_s + AHEAD_S <= begin)
        scores.append(scorer(known, train.take((train.t_s >= begin) & (train.t_s < end))))
    return later, np.concatenate(scores)


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m models.growth.validate", description="Cross-validates a recipe.")
    parser.add_argument("--events", type=Path, required=True, help="history, as of `liverank replay`")
    parser.add_argument("--recipe", default=next(reversed(RECIPES)), help="version of the recipe")
    parser.add_argument("--folds", type=int, default=5, help="blocks to predict")
    given = parser.parse_args(arguments)
    try:
        recipe = recipe_of(given.recipe)
        history = read_history(given.events)
        train, _ = split(rows_of(history), cut_s(history))

        def scorer(known: Rows, wanted: Rows) -> NDArray[np.float32]:
            model = fit(known, recipe)
            return scores_of(partial(predict, model), model.learns, wanted)

        later, scores = forward_chained(train, scorer, given.folds)
        print_outcome(
            compare(later, scores), f"{given.recipe}, forward in the training part of {given.events.name}", {}
        )
    except LiverankError as error:
        print(f"validate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
