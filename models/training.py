"""The one training loop: seeded, stopped when held-out rows no longer gain, resumable, on one worker or several.

Equal objective, settings and seed give equal weights on one machine: one thread per worker, hence one order of
every sum, and everything drawn at random depends on the seed, the epoch and the worker's number only.
"""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.adam import AdamW
from models.progress import Progress
from models.workers import ALONE, Workers


@dataclass(frozen=True)
class FitSettings:
    """How long and how fast to learn. The learning rate falls to 0 over ``max_epochs`` by a cosine."""

    max_epochs: int = 15
    patience_epochs: int = 5
    batch_rows: int = 2048
    learning_rate: float = 3e-3
    weight_decay: float = 1e-4


class Objective(nn.Module, ABC):
    """A model with the rows to learn from. ``forward(rows int64[b])`` is the mean loss of these rows.

    Args:
        model: what is learned; its weights are all that is trained and kept.
        n_rows: rows to learn from.
    """

    def __init__(self, model: nn.Module, n_rows: int) -> None:
        super().__init__()
        self.model = model
        self.n_rows = n_rows

    @abstractmethod
    def held_out(self) -> float:
        """Loss of rows that are not learned from; training stops by it. Called in inference mode."""

    @abstractmethod
    def digest(self) -> str:
        """Identifies the data, so that a checkpoint is not continued on other rows."""


@dataclass(frozen=True)
class Epoch:
    """Mean losses of one pass: of what was learned from (while learning), and of the held-out rows after it."""

    train_loss: float
    held_out_loss: float


@dataclass(frozen=True)
class Course:
    """How training went; the model has the weights of epoch ``best`` (1 is the first)."""

    epochs: tuple[Epoch, ...]
    best: int

    @property
    def held_out_loss(self) -> float:
        """Of the weights that were kept."""
        return self.epochs[self.best - 1].held_out_loss


class OtherTraining(Exception):
    """The checkpoint belongs to other data, settings or seed; it is left as it is."""


def descend(
    objective: Objective,
    settings: FitSettings,
    seed: int,
    say: Callable[[str], None] = lambda _: None,
    *,
    workers: Workers = ALONE,
    checkpoint: Path | None = None,
) -> Course:
    """Trains ``objective.model`` and leaves its best weights in it.

    Args:
        checkpoint: written after every epoch; if it is there, training goes on where it stopped, and ends with
            the weights that it would have had without the stop.

    Raises:
        OtherTraining: see there.
    """
    identity = {"data": objective.digest(), "seed": seed, "workers": workers.size, **asdict(settings)}
    objective.to(workers.device)
    state = _State(objective, settings)
    if checkpoint is not None and checkpoint.exists():
        state.load(checkpoint, identity)
        say(f"going on after epoch {len(state.epochs)} of {checkpoint}")
    rng = np.random.default_rng(seed)
    for _ in state.epochs:  # what was drawn before the stop
        rng.permutation(objective.n_rows)
    workers.begin_alike(objective.model.state_dict().values())
    while not state.done(settings):
        number = len(state.epochs) + 1
        torch.manual_seed(seed * 1_000_003 + number * 1_009 + workers.rank)
        order = torch.from_numpy(rng.permutation(objective.n_rows))
        batches = range(0, objective.n_rows, settings.batch_rows)
        losses = []
        objective.train()
        with Progress(f"epoch {number}", len(batches), shown=workers.leads) as progress:
            for first in batches:
                rows = workers.share(order[first : first + settings.batch_rows])
                loss = objective(rows.to(workers.device))
                torch.autograd.backward(loss)
                workers.average(objective.model.parameters())
                state.optimiser.step()
                losses.append(loss.detach())
                progress.advance()
        objective.eval()
        with torch.inference_mode():
            held_out = workers.agreed(objective.held_out())
        state.keep(Epoch(float(torch.stack(losses).mean()), held_out))
        say(f"epoch {number}: loss {state.epochs[-1].train_loss:.4f}, held out {held_out:.4f}")
        if checkpoint is not None and workers.leads:
            state.save(checkpoint, identity)
    objective.model.load_state_dict(state.best_weights)
    objective.eval()
    return Course(tuple(state.epochs), state.best)


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread and without algorithms that sum in any order, for as long as the block runs."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)


class _State:
    """All that changes from epoch to epoch."""

    def __init__(self, objective: Objective, settings: FitSettings) -> None:
        self._model = objective.model
        steps = settings.max_epochs * -(-objective.n_rows // settings.batch_rows)
        self.optimiser = AdamW(objective.model.parameters(), settings.learning_rate, settings.weight_decay, steps)
        self.epochs: list[Epoch] = []
        self.best = 0
        self.best_weights: dict[str, Tensor] = copy.deepcopy(objective.model.state_dict())

    def keep(self, epoch: Epoch) -> None:
        """Adds an epoch; its weights are kept if it is the best so far."""
        self.epochs.append(epoch)
        if self.best == 0 or epoch.held_out_loss < self.epochs[self.best - 1].held_out_loss:
            self.best = len(self.epochs)
            self.best_weights = copy.deepcopy(self._model.state_dict())

    def done(self, settings: FitSettings) -> bool:
        """Whether nothing more is to be gained."""
        passed = len(self.epochs)
        return passed >= settings.max_epochs or (passed > 0 and passed - self.best >= settings.patience_epochs)

    def save(self, path: Path, identity: dict[str, Any]) -> None:
        """Written beside and renamed: a checkpoint is whole or the one before."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}.new")
        torch.save(
            {
                "identity": identity, "weights": self._model.state_dict(), "best_weights": self.best_weights,
                "best": self.best, "optimiser": self.optimiser.state(),
                "epochs": [[e.train_loss, e.held_out_loss] for e in self.epochs],
            },
            fresh,
        )  # fmt: skip
        os.replace(fresh, path)

    def load(self, path: Path, identity: dict[str, Any]) -> None:
        found = torch.load(path, map_location="cpu", weights_only=True)
        if found["identity"] != identity:
            differing = sorted(k for k in identity if found["identity"].get(k) != identity[k])
            raise OtherTraining(f"{path}: of another training, which differs in {', '.join(differing)}")
        self._model.load_state_dict(found["weights"])
        self.optimiser.load(found["optimiser"])
        self.best_weights, self.best = found["best_weights"], int(found["best"])
        self.epochs = [Epoch(*losses) for losses in found["epochs"]]
