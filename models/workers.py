"""Several processes that train one model: started by ``torchrun``, each with its share of every batch.

    torchrun --standalone --nproc-per-node 2 -m models.train_ranker …

Without torchrun there is one worker, and nothing here does anything. Gradients are averaged in one call per step
instead of by DistributedDataParallel: the nets are small, so there is nothing to overlap, and DDP imports torch's
compiler (see `models.adam`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Workers:
    """This worker's number (rank), how many there are (size), and the device it computes on."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def leads(self) -> bool:
        """Whether this one prints and writes."""
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """This worker's part of a batch's rows int64[b]; equally many for all, so up to size - 1 are left out."""
        return rows[self.rank : len(rows) // self.size * self.size : self.size] if self.size > 1 else rows

    @torch.no_grad()
    def begin_alike(self, tensors: Iterable[Tensor]) -> None:
        """All get the first worker's values, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    @torch.no_grad()
    def average(self, parameters: Iterable[Tensor]) -> None:
        """Gradients become their mean over all workers. Those without one must be the same parameters everywhere."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def agreed(self, value: float) -> float:
        """The first worker's value, for all: decisions must not depend on whose rounding is looked at."""
        if self.size == 1:
            return value
        held = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(held, src=0)
        return float(held)


ALONE = Workers()


@contextmanager
def workers(device: str = "cpu") -> Iterator[Workers]:
    """The workers that torchrun started, gathered for as long as the block runs; one, where it started none.

    Args:
        device: "cpu" (gloo between workers) or "cuda" (NCCL; each worker takes the GPU of its local rank).

    Raises:
        ValueError: another device, or no such GPU on this machine.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: cpu or cuda wanted, got {device!r}")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda" and local >= torch.cuda.device_count():
        raise ValueError(f"device: GPU {local} wanted, this machine has {torch.cuda.device_count()}")
    place = torch.device("cuda", local) if device == "cuda" else torch.device("cpu")
    if "WORLD_SIZE" not in os.environ:
        yield Workers(device=place)
        return
    if device == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield Workers(dist.get_rank(), dist.get_world_size(), place)
    finally:
        dist.destroy_process_group()
