"""AdamW with a cosine schedule, written out.

torch.optim would do, but it imports torch's compiler, which takes the repository's folder ``triton/`` for
the Triton language when that is not installed, and fails. It is also most of the time of a short training.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-8


class AdamW:
    """Changes ``parameters`` in place by their gradients; the rate falls to 0 over ``steps``.

    Source: Loshchilov, Hutter: "Decoupled weight decay regularization" (2019), algorithm 2. Only matrices
    decay.
    """

    def __init__(self, parameters: Iterable[Tensor], learning_rate: float, weight_decay: float, steps: int) -> None:
        self._parameters = list(parameters)
        self._first = [torch.zeros_like(p) for p in self._parameters]
        self._second = [torch.zeros_like(p) for p in self._parameters]
        self._rate, self._decay, self._steps, self._step = learning_rate, weight_decay, steps, 0

    @torch.no_grad()
    def step(self) -> None:
        """One update; clears the gradients."""
        rate = self._rate * 0.5 * (1.0 + math.cos(math.pi * self._step / self._steps))
        self._step += 1
        unbias_1, unbias_2 = 1.0 - _BETA_1**self._step, 1.0 - _BETA_2**self._step
        for p, first, second in zip(self._parameters, self._first, self._second):
            if p.grad is None:
                continue
            first.lerp_(p.grad, 1.0 - _BETA_1)
            second.mul_(_BETA_2).addcmul_(p.grad, p.grad, value=1.0 - _BETA_2)
            if p.ndim > 1:
                p.mul_(1.0 - rate * self._decay)
            p.addcdiv_(first, (second / unbias_2).sqrt_().add_(_EPSILON), value=-rate / unbias_1)
            p.grad = None

    def state(self) -> dict[str, Any]:
        """What a later ``load`` needs to go on as if nothing had happened."""
        return {"first": self._first, "second": self._second, "step": self._step}

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Takes over what ``state`` of an optimiser of the same parameters returned."""
        self._step = int(state["step"])
        for own, given in ((self._first, state["first"]), (self._second, state["second"])):
            for tensor, value in zip(own, given, strict=True):
                tensor.copy_(value)
