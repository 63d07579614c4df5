"""Fits the net to rows: seeded, in one thread, stopped when held-out rows no longer gain."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import binary_cross_entropy_with_logits

from models.adam import AdamW
from models.calibration import fit_platt
from models.dataset import Split
from models.trendiness import Trendiness, scaling


@dataclass(frozen=True)
class FitSettings:
    """How long and how fast to learn."""

    max_epochs: int = 15
    patience_epochs: int = 5
    batch_rows: int = 2048
    learning_rate: float = 3e-3
    weight_decay: float = 1e-4


@dataclass(frozen=True)
class Fitted:
    """A calibrated model, and after how many epochs it was best."""

    model: Trendiness
    epochs: int
    stop_loss: float


def fit(split: Split, settings: FitSettings, seed: int, say: Callable[[str], None] = lambda _: None) -> Fitted:
    """Trains on ``split.fit``, stops on ``split.stop``, calibrates on ``split.calibrate``.

    Equal rows, settings and seed give equal weights: one thread, hence one order of every sum.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    try:
        model = Trendiness(*scaling(split.fit.features))
        fitted = _descend(model, split, settings, np.random.default_rng(seed), say)
        x, y = _tensors(model, split.calibrate.features, split.calibrate.label)
        with torch.inference_mode():
            platt = fit_platt(model.logit(x).numpy(), y.numpy() > 0.5)
        model.slope.fill_(platt.slope)
        model.offset.fill_(platt.offset)
    finally:
        torch.set_num_threads(threads)
    return fitted


def _descend(
    model: Trendiness,
    split: Split,
    settings: FitSettings,
    rng: np.random.Generator,
    say: Callable[[str], None],
) -> Fitted:
    x, y = _tensors(model, split.fit.features, split.fit.label)
    x_stop, y_stop = _tensors(model, split.stop.features, split.stop.label)
    steps = settings.max_epochs * -(-len(y) // settings.batch_rows)
    optimiser = AdamW(model.parameters(), settings.learning_rate, settings.weight_decay, steps)
    best, best_loss, best_epoch = copy.deepcopy(model.state_dict()), float("inf"), 0
    for epoch in range(1, settings.max_epochs + 1):
        order = torch.from_numpy(rng.permutation(len(y)))
        for first in range(0, len(y), settings.batch_rows):
            batch = order[first : first + settings.batch_rows]
            loss = binary_cross_entropy_with_logits(model.logit(x[batch]), y[batch])
            torch.autograd.backward(loss)
            optimiser.step()
        with torch.inference_mode():
            stop_loss = float(binary_cross_entropy_with_logits(model.logit(x_stop), y_stop))
        say(f"epoch {epoch}: log loss {stop_loss:.4f}")
        if stop_loss < best_loss:
            best, best_loss, best_epoch = copy.deepcopy(model.state_dict()), stop_loss, epoch
        elif epoch - best_epoch >= settings.patience_epochs:
            break
    model.load_state_dict(best)
    return Fitted(model.eval(), best_epoch, best_loss)


def _tensors(
    model: Trendiness, features: NDArray[np.float32], labels: NDArray[np.bool_]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Standardised rows float32[n, F] and labels float32[n]."""
    with torch.inference_mode():
        x = model.standardised(torch.from_numpy(features))
    return x.clone(), torch.from_numpy(labels.astype(np.float32))
