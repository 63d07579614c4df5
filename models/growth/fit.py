"""Fits the nets to rows: seeded, in one thread, hence the same each time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from models.adam import AdamW
from models.growth.labels import MIN_SET, lessons
from models.growth.net import Ensemble, GrowthNet
from models.growth.rows import MOMENT_S, Rows
from server.errors import ConfigError


@dataclass(frozen=True)
class Recipe:
    """What was chosen by cross-validation (`models.growth.validate`), never on a test part.

    nets: each with a seed and a dealing into sets of its own. every: so many minutes of a history are one lesson, each
    net beginning at another minute; neighbours tell nearly the same.
    """

    nets: int = 6
    every: int = 3
    epochs: int = 12
    batch_rows: int = 512
    learning_rate: float = 5e-3
    weight_decay: float = 1e-2
    seed: int = 7


RECIPES = {"growth-1": Recipe()}
"""Versions of the shipped recipe; one that was published is never changed."""


def recipe_of(version: str) -> Recipe:
    """Raises ConfigError naming the versions there are."""
    if version not in RECIPES:
        raise ConfigError(f"--model: one of {', '.join(RECIPES)} or a version's folder wanted, got {version!r}")
    return RECIPES[version]


def fit(rows: Rows, recipe: Recipe, say: Callable[[str], None] = lambda _: None) -> Ensemble:
    """Trains on all rows; their ``then`` must not lie beyond what may be known.

    Raises:
        ConfigError: no moment has enough candidates to learn from.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        nets = []
        for i in range(recipe.nets):
            nets.append(_fit_one(rows, recipe, i))
            say(f"net {i + 1} of {recipe.nets}")
    finally:
        torch.set_num_threads(threads)
    return Ensemble(nets).eval()


def _fit_one(rows: Rows, recipe: Recipe, number: int) -> GrowthNet:
    seed = recipe.seed + 1_000 * number
    chosen = rows.take(rows.t_s // MOMENT_S % recipe.every == number % recipe.every)
    learned = lessons(chosen, seed)
    if not len(learned.labels):
        raise ConfigError(f"--events: the training part has no minute with {MIN_SET} candidates")
    features = learned.features
    deviation = features.std(axis=0, dtype=np.float64)
    scale = np.where(deviation > 1e-6, deviation, 1.0)
    torch.manual_seed(seed)
    net = GrowthNet(features.mean(axis=0, dtype=np.float64).astype(np.float32), scale.astype(np.float32))
    x, y = torch.from_numpy(features), torch.from_numpy(learned.labels)
    n = len(y)
    steps = recipe.epochs * -(-n // recipe.batch_rows)
    optimiser = AdamW(net.parameters(), recipe.learning_rate, recipe.weight_decay, steps)
    for _ in range(recipe.epochs):
        order = torch.randperm(n)
        for first in range(0, n, recipe.batch_rows):
            batch = order[first : first + recipe.batch_rows]
            torch.autograd.backward(binary_cross_entropy_with_logits(net(x[batch]), y[batch]))
            optimiser.step()
    return net.eval()
