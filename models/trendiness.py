"""The net: one stream's features in, its calibrated probability of trending out.

Everything between a raw feature row and the probability is inside, so that what is served is what was
trained and no caller has to know about scaling.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

LIMIT = 1e9  # infinities become this; above any real feature
CLAMP = 6.0  # standard deviations: beyond what training saw, more of the same changes nothing
HIDDEN = (64, 32)


class Trendiness(nn.Module):
    """Features float32[n, F] → probability float32[n] in [0, 1]; finite for any input.

    signed log(1 + |x|) → standardise → clamp → 64 → 32 → logit → slope * logit + offset → sigmoid.

    Args:
        mean, scale: float32[F] of the signed logs of the training rows; scale > 0.

    slope and offset are set by calibration, after the weights.
    """

    mean: Tensor
    scale: Tensor
    slope: Tensor
    offset: Tensor

    def __init__(self, mean: NDArray[np.float32], scale: NDArray[np.float32]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.from_numpy(mean.copy()))
        self.register_buffer("scale", torch.from_numpy(scale.copy()))
        self.register_buffer("slope", torch.ones(()))
        self.register_buffer("offset", torch.zeros(()))
        self.first = nn.Linear(len(mean), HIDDEN[0])
        self.second = nn.Linear(*HIDDEN)
        self.last = nn.Linear(HIDDEN[1], 1)

    def standardised(self, features: Tensor) -> Tensor:
        """float32[n, F] → float32[n, F] within ±CLAMP; NaN counts as 0."""
        return standardised(features, self.mean, self.scale)

    def logit(self, standardised: Tensor) -> Tensor:
        """float32[n, F] → float32[n], before calibration."""
        hidden = torch.relu(self.second(torch.relu(self.first(standardised))))
        return self.last(hidden).reshape(-1)

    def forward(self, features: Tensor) -> Tensor:
        return torch.sigmoid(self.slope * self.logit(self.standardised(features)) + self.offset)


def standardised(features: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """float32[n, F] → float32[n, F] within ±CLAMP; NaN counts as 0. mean, scale: float32[F] of the signed logs."""
    clean = torch.where(torch.isnan(features), 0.0, features).clamp(-LIMIT, LIMIT)
    logs = torch.sign(clean) * torch.log(1.0 + torch.abs(clean))
    return ((logs - mean) / scale).clamp(-CLAMP, CLAMP)


def scaling(features: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and scale float32[F] of the signed logs of rows float32[n, F]; a constant column gets scale 1."""
    logs = np.sign(features) * np.log1p(np.abs(features.astype(np.float64)))
    deviation = logs.std(axis=0)
    return logs.mean(axis=0).astype(np.float32), np.where(deviation > 1e-6, deviation, 1.0).astype(np.float32)


def predict(model: Trendiness, features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities float32[n] of rows float32[n, F]."""
    with torch.inference_mode():
        return np.asarray(model(torch.from_numpy(features)).numpy())
