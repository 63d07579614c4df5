"""Fits the trendiness net to rows and calibrates it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from models.calibration import fit_platt
from models.dataset import Rows, Split
from models.training import Course, FitSettings, Objective, descend, one_thread
from models.trendiness import Trendiness, scaling

__all__ = ["FitSettings", "Fitted", "fit"]


@dataclass(frozen=True)
class Fitted:
    """A calibrated model, and how training it went."""

    model: Trendiness
    course: Course


def fit(
    split: Split,
    settings: FitSettings,
    seed: int,
    say: Callable[[str], None] = lambda _: None,
    checkpoint: Path | None = None,
) -> Fitted:
    """Trains on ``split.fit``, stops on ``split.stop``, calibrates on ``split.calibrate``.

    Equal rows, settings and seed give equal weights (`models.training`).
    """
    with one_thread():
        torch.manual_seed(seed)
        model = Trendiness(*scaling(split.fit.features))
        course = descend(_Objective(model, split.fit, split.stop), settings, seed, say, checkpoint=checkpoint)
        x, y = _tensors(model, split.calibrate.features, split.calibrate.label)
        with torch.inference_mode():
            platt = fit_platt(model.logit(x).numpy(), y.numpy() > 0.5)
        model.slope.fill_(platt.slope)
        model.offset.fill_(platt.offset)
    return Fitted(model, course)


class _Objective(Objective):
    model: Trendiness

    def __init__(self, model: Trendiness, learned: Rows, held_out: Rows) -> None:
        super().__init__(model, len(learned))
        self._rows = _tensors(model, learned.features, learned.label)
        self._held_out = _tensors(model, held_out.features, held_out.label)
        self._digest = f"{learned.digest()}-{held_out.digest()}"

    def forward(self, rows: Tensor) -> Tensor:
        x, y = self._rows
        return binary_cross_entropy_with_logits(self.model.logit(x[rows]), y[rows])

    def held_out(self) -> float:
        x, y = self._held_out
        return float(binary_cross_entropy_with_logits(self.model.logit(x), y))

    def digest(self) -> str:
        return self._digest


def _tensors(model: Trendiness, features: NDArray[np.float32], labels: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
    """Standardised rows float32[n, F] and labels float32[n]."""
    with torch.inference_mode():
        x = model.standardised(torch.from_numpy(features))
    return x.clone(), torch.from_numpy(labels.astype(np.float32))
