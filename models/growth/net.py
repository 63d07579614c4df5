"""The nets: a stream's features in, its chance to be in the next top ten out, per target."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from loadtest.replay.growth import TARGETS
from models.growth.labels import TASKS
from models.growth.score import PLACES

CLAMP = 4.0  # standard deviations
HIDDEN = (96, 32)
INPUT_DROPOUT, DROPOUT = 0.1, 0.2


class GrowthNet(nn.Module):
    """Features float32[n, F] → logits float32[n, TASKS], or ``outputs`` other numbers.

    Standardise → clamp → 96 → 32 → outputs, and beside it straight to the outputs.

    Args:
        mean, scale: float32[F] of the training rows; scale > 0.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: NDArray[np.float32], scale: NDArray[np.float32], outputs: int = len(TASKS)) -> None:
        super().__init__()
        self.register_buffer("mean", torch.from_numpy(mean.copy()))
        self.register_buffer("scale", torch.from_numpy(scale.copy()))
        self.first = nn.Linear(len(mean), HIDDEN[0])
        self.second = nn.Linear(*HIDDEN)
        self.last = nn.Linear(HIDDEN[1], outputs)
        self.straight = nn.Linear(len(mean), outputs, bias=False)
        self.input_dropout, self.dropout = nn.Dropout(INPUT_DROPOUT), nn.Dropout(DROPOUT)

    def forward(self, features: Tensor) -> Tensor:
        x = self.input_dropout(((features - self.mean) / self.scale).clamp(-CLAMP, CLAMP))
        hidden = self.dropout(torch.relu(self.first(x)))
        return self.last(self.dropout(torch.relu(self.second(hidden)))) + self.straight(x)


class Ensemble(nn.Module):
    """The mean of several nets: features float32[n, F] → chances float32[n, TARGETS] in [0, 1]."""

    learns = PLACES

    def __init__(self, nets: list[GrowthNet]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([torch.sigmoid(net(features)[:, : len(TARGETS)]) for net in self.nets]).mean(0)


def predict(model: nn.Module, features: NDArray[np.float32]) -> NDArray[np.float32]:
    """The model's answer to rows float32[n, F]; of an ensemble chances float32[n, TARGETS]."""
    with torch.inference_mode():
        return np.asarray(model(torch.from_numpy(features)).numpy())
