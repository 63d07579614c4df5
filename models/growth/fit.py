"""Fits the nets to rows: seeded, in one thread, hence the same each time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from models.adam import AdamW
from models.growth.labels import MIN_SET, lessons
from models.growth.net import Ensemble, GrowthNet
from models.growth.outlook import swing
from models.growth.outlook_net import Outlooks, outlook_net, surprise
from models.growth.rows import MOMENT_S, Rows
from models.growth.score import OUTLOOK, PLACES
from server.errors import ConfigError


@dataclass(frozen=True)
class Recipe:
    """What was chosen by cross-validation (`models.growth.validate`), never on a test part.

    learns: PLACES or OUTLOOK (`models.growth.score`). nets: each with a seed of its own, and of places a dealing into
    sets. every: so many minutes of a history are one lesson, each net beginning at another minute; neighbours tell
    nearly the same.
    """

    learns: str = PLACES
    nets: int = 6
    every: int = 3
    epochs: int = 12
    batch_rows: int = 512
    learning_rate: float = 5e-3
    weight_decay: float = 1e-2
    seed: int = 7


RECIPES = {"growth-1": Recipe(), "growth-2": Recipe(OUTLOOK, epochs=24, learning_rate=3e-3)}
"""Versions of the shipped recipe; one that was published is never changed."""


def recipe_of(version: str) -> Recipe:
    """Raises ConfigError naming the versions there are."""
    if version not in RECIPES:
        raise ConfigError(f"--model: one of {', '.join(RECIPES)} or a version's folder wanted, got {version!r}")
    return RECIPES[version]


def fit(rows: Rows, recipe: Recipe, say: Callable[[str], None] = lambda _: None) -> Ensemble | Outlooks:
    """Trains on all rows; their ``then`` must not lie beyond what may be known.

    Raises:
        ConfigError: there is nothing to learn from: of places no moment with enough candidates, of outlooks no truth.
    """
    fit_one = _fit_outlook if recipe.learns == OUTLOOK else _fit_places
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        nets = []
        for i in range(recipe.nets):
            chosen = rows.take(rows.t_s // MOMENT_S % recipe.every == i % recipe.every)
            nets.append(fit_one(chosen, recipe, recipe.seed + 1_000 * i))
            say(f"net {i + 1} of {recipe.nets}")
    finally:
        torch.set_num_threads(threads)
    return (Outlooks(nets) if recipe.learns == OUTLOOK else Ensemble(nets)).eval()


def _fit_places(rows: Rows, recipe: Recipe, seed: int) -> GrowthNet:
    learned = lessons(rows, seed)
    if not len(learned.labels):
        raise ConfigError(f"--events: the training part has no minute with {MIN_SET} candidates")
    mean, scale = _mean_and_scale(learned.features)
    torch.manual_seed(seed)
    net = GrowthNet(mean, scale)
    return _descend(net, learned.features, learned.labels, binary_cross_entropy_with_logits, recipe)


def _fit_outlook(rows: Rows, recipe: Recipe, seed: int) -> GrowthNet:
    rows = rows.take(np.isfinite(rows.then))
    if not len(rows):
        raise ConfigError("--events: the training part has no stream that can be ranked 15 minutes later too")
    swings = swing(rows.then - rows.now, rows.now).astype(np.float32)
    mean, scale = _mean_and_scale(rows.own)
    torch.manual_seed(seed)
    return _descend(outlook_net(mean, scale, swings), rows.own, swings, surprise, recipe)


def _mean_and_scale(features: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    deviation = features.std(axis=0, dtype=np.float64)
    scale = np.where(deviation > 1e-6, deviation, 1.0)
    return features.mean(axis=0, dtype=np.float64).astype(np.float32), scale.astype(np.float32)


def _descend(
    net: GrowthNet,
    features: NDArray[np.float32],
    labels: NDArray[np.float32],
    loss: Callable[[Tensor, Tensor], Tensor],
    recipe: Recipe,
) -> GrowthNet:
    x, y = torch.from_numpy(features), torch.from_numpy(labels)
    n = len(y)
    steps = recipe.epochs * -(-n // recipe.batch_rows)
    optimiser = AdamW(net.parameters(), recipe.learning_rate, recipe.weight_decay, steps)
    for _ in range(recipe.epochs):
        order = torch.randperm(n)
        for first in range(0, n, recipe.batch_rows):
            batch = order[first : first + recipe.batch_rows]
            torch.autograd.backward(loss(net(x[batch]), y[batch]))
            optimiser.step()
    return net.eval()
