"""The nets that give an outlook: a stream's own features in, a mixture of logistic distributions over its swing out."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import softplus

from models.growth.net import GrowthNet
from models.growth.outlook import PARTS
from models.growth.score import OUTLOOK

MIXED = 3
"""Logistic distributions of one net."""
LOG_SPREAD = (-4.0, 3.0)
"""Narrower than 1/50 or wider than 20 swings is no distribution that rows can tell."""
STRAIGHT_AT_FIRST = 0.1


class Outlooks(nn.Module):
    """Several nets' mixtures as one: own features float32[n, OWN] → float32[n, PARTS, nets * MIXED]."""

    learns = OUTLOOK

    def __init__(self, nets: list[GrowthNet]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, own: Tensor) -> Tensor:
        parts = [components(net(own)) for net in self.nets]
        log_weight, centre, log_spread = (torch.cat(of, dim=1) for of in zip(*parts))
        return torch.stack([log_weight.exp() / len(parts), centre, log_spread], dim=1)


def outlook_net(mean: NDArray[np.float32], scale: NDArray[np.float32], swings: NDArray[np.float32]) -> GrowthNet:
    """An untrained net whose components begin where the training rows' ``swings`` float32[m] lie."""
    net = GrowthNet(mean, scale, PARTS * MIXED)
    with torch.no_grad():
        net.straight.weight.mul_(STRAIGHT_AT_FIRST)
        _, centre, log_spread = net.last.bias.split(MIXED)
        centre.copy_(torch.from_numpy(np.quantile(swings, np.linspace(0.2, 0.8, MIXED))))
        log_spread.fill_(float(np.log(max(swings.std() / 2.0, np.exp(LOG_SPREAD[0])))))
    return net


def components(answer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one net's float32[n, PARTS * MIXED]: log weights, centres, log spreads, float32[n, MIXED] each."""
    weight, centre, log_spread = answer.split(MIXED, dim=1)
    return torch.log_softmax(weight, dim=1), centre, log_spread.clamp(*LOG_SPREAD)


def surprise(answer: Tensor, swings: Tensor) -> Tensor:
    """Mean of -log density of float32[n] under one net's float32[n, PARTS * MIXED]: what is made small."""
    log_weight, centre, log_spread = components(answer)
    x = (swings[:, None] - centre) * torch.exp(-log_spread)
    return -torch.logsumexp(log_weight - x - log_spread - 2.0 * softplus(-x), dim=1).mean()
