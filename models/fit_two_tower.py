"""Fits the two towers to who watched what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.evaluation_ranking import recall
from models.impressions import Impressions, ImpressionSplit
from models.ranker import tensors
from models.training import Course, FitSettings, Objective, descend, one_thread
from models.two_tower import TowerShape, TwoTower, sampled_softmax
from models.workers import ALONE, Workers

LIVE_WINDOW_MS = 600_000
"""A stream counts as live from its first to its last impression, and this long around them."""


@dataclass(frozen=True)
class TwoTowerSettings:
    """How to learn. random_negatives: per batch, drawn from all streams alike. creator_dropout: see RankerSettings."""

    fit: FitSettings = field(
        default_factory=lambda: FitSettings(
            max_epochs=10, patience_epochs=2, batch_rows=256, learning_rate=1e-3, weight_decay=1.0
        )
    )
    random_negatives: int = 512
    creator_dropout: float = 0.2


@dataclass(frozen=True)
class FittedTowers:
    """The towers, and how training went."""

    model: TwoTower
    course: Course


def fit_two_tower(
    split: ImpressionSplit,
    settings: TwoTowerSettings,
    seed: int,
    say: Callable[[str], None] = lambda _: None,
    *,
    workers: Workers = ALONE,
    checkpoint: Path | None = None,
) -> FittedTowers:
    """Trains on what was clicked in ``split.fit``, stops on ``split.stop``. Reproducible as `fit_ranker` is."""
    with one_thread():
        torch.manual_seed(seed)
        model = TwoTower(TowerShape(split.fit.stream_embedding.shape[1]))
        objective = TwoTowerObjective(model, split.fit, split.stop, settings)
        course = descend(objective, settings.fit, seed, say, workers=workers, checkpoint=checkpoint)
        model.to("cpu")
    return FittedTowers(model, course)


class TwoTowerObjective(Objective):
    """Sampled softmax over the batch's own streams and random ones; see `models.two_tower.sampled_softmax`."""

    model: TwoTower

    def __init__(
        self, model: TwoTower, learned: Impressions, held_out: Impressions, settings: TwoTowerSettings
    ) -> None:
        self._learned, self._held_out = (part.take(np.flatnonzero(part.clicked)) for part in (learned, held_out))
        if not len(self._learned) or not len(self._held_out):
            raise ValueError("impressions: some clicked ones wanted, to learn from and to hold out")
        super().__init__(model, len(self._learned))
        self._settings = settings
        # One row for each stream there is, clicked or not: what random negatives are drawn from.
        self._streams, self._first_row = np.unique(learned.stream, return_index=True)
        self._all = learned
        n_streams = 1 + int(max(learned.stream.max(), self._held_out.stream.max()))
        counts = np.bincount(self._learned.stream, minlength=n_streams)
        self._share = counts / counts.sum()

    def forward(self, rows: Tensor) -> Tensor:
        drawn = torch.randint(len(self._streams), (self._settings.random_negatives,)).numpy()
        return self._loss(self._learned, rows.cpu().numpy(), drawn, self._settings.creator_dropout)

    def held_out(self) -> float:
        # The same negatives every time: epochs are compared by it.
        drawn = np.random.default_rng(0).integers(0, len(self._streams), self._settings.random_negatives)
        n, size = len(self._held_out), self._settings.fit.batch_rows
        total = 0.0
        for first in range(0, n, size):
            rows = np.arange(first, min(n, first + size))
            total += float(self._loss(self._held_out, rows, drawn, 0.0)) * len(rows)
        return total / n

    def digest(self) -> str:
        return f"{self._all.digest()}-{self._held_out.digest()}-{self._settings.random_negatives}"

    def _loss(self, part: Impressions, rows: NDArray[np.int64], drawn: NDArray[np.int64], dropout: float) -> Tensor:
        device = self.model.log_scale.device
        given = tensors(part.inputs(rows), device)
        random_rows = self._first_row[drawn]
        content = np.concatenate([part.stream_embedding[rows], self._all.stream_embedding[random_rows]])
        codes = np.concatenate([part.codes[rows], self._all.codes[random_rows]])
        if dropout > 0.0:
            codes[:, 2] *= (torch.rand(len(codes)) >= dropout).numpy()
        streams = self.model.stream(torch.from_numpy(content).to(device), torch.from_numpy(codes).to(device))
        viewers = self.model.viewer(
            given["viewer_embedding"], given["sequence_embedding"], given["sequence_meta"]
        )[given["viewer_of"]]  # fmt: skip
        candidate = np.concatenate([part.stream[rows], self._streams[drawn]])
        # Expected number of times in a batch, by either way.
        rate = len(rows) * self._share[candidate] + len(drawn) / len(self._streams)
        return sampled_softmax(
            torch.exp(self.model.log_scale) * viewers @ streams.T,
            torch.arange(len(rows), device=device),
            torch.from_numpy(np.log(rate)).to(torch.float32).to(device),
            torch.from_numpy(candidate).to(device),
            torch.from_numpy(part.stream[rows]).to(device),
        )


def vectors(model: TwoTower, rows: Impressions) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Of each row's viewer and of its stream, float32[n, D] each."""
    with torch.inference_mode():
        given = tensors(rows.inputs(slice(None)))
        viewers = model.viewer(given["viewer_embedding"], given["sequence_embedding"], given["sequence_meta"])
        streams = model.stream(given["stream_embedding"], given["codes"])
        return viewers[given["viewer_of"]].numpy(), streams.numpy()


def recall_of_watched(
    model: TwoTower | None, rows: Impressions, k: int, which: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """By watched impression: 1 where its stream is among the ``k`` nearest of those live then, else 0.

    Args:
        model: None: the embeddings as they came, which is what a server searches with when there are no towers.
        which: bool[R], the impressions to look at; None: all that were watched.
    """
    streams, first, own = np.unique(rows.stream, return_index=True, return_inverse=True)
    began = np.full(len(streams), np.iinfo(np.int64).max)
    ended = np.zeros(len(streams), np.int64)
    np.minimum.at(began, own, rows.at_ms)
    np.maximum.at(ended, own, rows.at_ms)
    asked = np.flatnonzero(rows.watched if which is None else rows.watched & which)
    if not len(asked):
        return np.zeros(0)
    if model is None:
        found = rows.askings.embedding[rows.asking[asked]], rows.stream_embedding[first]
    else:
        found = vectors(model, rows.take(asked))[0], vectors(model, rows.take(first))[1]
    at = rows.at_ms[asked, None]
    live = (began - LIVE_WINDOW_MS <= at) & (at <= ended + LIVE_WINDOW_MS)
    return recall(found[0], found[1], own[asked], live, k)
