"""Fits the ranker to impressions and calibrates its heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.calibration import fit_platt
from models.impressions import Impressions, ImpressionSplit
from models.places import examined
from models.ranker import POSITIONS, TASKS, WATCH_CAP_S, Ranker, RankerShape, task_loss, tensors
from models.training import Course, FitSettings, Objective, descend, one_thread
from models.trendiness import scaling
from models.workers import ALONE, Workers
from server.scoring.ranker_schema import NEUTRAL_POSITION

CHUNK_ROWS = 8_192
LEAST_CLICKS = 1_000
"""On slates in an order of chance, for the effect of places to be judged by them alone."""


@dataclass(frozen=True)
class RankerSettings:
    """How to learn. creator_dropout: share of rows that are learned without their creator's id."""

    fit: FitSettings = field(
        default_factory=lambda: FitSettings(max_epochs=8, patience_epochs=2, batch_rows=1024, learning_rate=2e-3)
    )
    creator_dropout: float = 0.2


@dataclass(frozen=True)
class FittedRanker:
    """A calibrated ranker, and how training it went."""

    model: Ranker
    course: Course


def fit_ranker(
    split: ImpressionSplit,
    settings: RankerSettings,
    seed: int,
    say: Callable[[str], None] = lambda _: None,
    *,
    workers: Workers = ALONE,
    checkpoint: Path | None = None,
) -> FittedRanker:
    """Trains on ``split.fit``, stops on ``split.stop``, calibrates on ``split.calibrate``.

    Equal rows, settings, seed and number of workers give equal weights (`models.training`). Raises OtherTraining.
    """
    with one_thread():
        torch.manual_seed(seed)
        shape = RankerShape(split.fit.features.shape[1], split.fit.stream_embedding.shape[1])
        model = Ranker(shape, *_scaling(split.fit))
        # Rows that the net does not learn from are as good as others here: what is judged are places, not viewers.
        by_chance = [
            part.take(part.by_chance & (part.position >= 1.0)) for part in (split.fit, split.stop, split.calibrate)
        ]
        settled = sum(int(part.clicked.sum()) for part in by_chance) >= LEAST_CLICKS
        if settled:
            # In an order of chance the shares of clicks alone say it, whatever the net does not know of viewers, and
            # better than with what it says of rows that it has learned by heart.
            model.set_log_examined(_examined(by_chance, [np.zeros(len(part), np.float32) for part in by_chance]))
            model.unseen.requires_grad_(False)
        objective = RankerObjective(model, split.fit, split.stop, settings.creator_dropout)
        course = descend(objective, settings.fit, seed, say, workers=workers, checkpoint=checkpoint)
        model.to("cpu")
        if not settled:
            settle_places(model, known_places(split.fit))
        calibrate(model, split.calibrate)
    return FittedRanker(model, course)


class RankerObjective(Objective):
    """Every task's cross-entropy, each in units of its base rate's own: rare heads count as much as frequent ones."""

    model: Ranker
    weight: Tensor

    def __init__(self, model: Ranker, learned: Impressions, held_out: Impressions, creator_dropout: float) -> None:
        super().__init__(model, len(learned))
        self._learned, self._held_out, self._dropout = learned, held_out, creator_dropout
        rate = learned.labels(slice(None), WATCH_CAP_S).mean(0).astype(np.float64).clip(1e-4, 1 - 1e-4)
        entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
        self.register_buffer("weight", torch.from_numpy((1.0 / entropy / len(TASKS)).astype(np.float32)))
        # A head that never happens teaches nothing, and its weight would be huge.
        self.weight[torch.from_numpy(learned.labels(slice(None), WATCH_CAP_S).max(0) <= 0)] = 0.0

    def forward(self, rows: Tensor) -> Tensor:
        return (self._loss(self._learned, rows.cpu().numpy(), self._dropout) * self.weight).sum()

    def held_out(self) -> float:
        total = torch.zeros(len(TASKS), device=self.weight.device)
        for rows in chunks(len(self._held_out)):
            total += self._loss(self._held_out, rows, 0.0) * len(rows)
        return float((total * self.weight).sum() / len(self._held_out))

    def digest(self) -> str:
        return f"{self._learned.digest()}-{self._held_out.digest()}"

    def _loss(self, part: Impressions, rows: NDArray[np.int64], dropout: float) -> Tensor:
        device = self.weight.device
        given = tensors(part.inputs(rows, neutral=False), device)
        position = given.pop("position")
        if dropout > 0.0:
            given["codes"] = given["codes"].clone()
            given["codes"][:, 2] *= torch.rand(len(rows), device=device) >= dropout
        labels = torch.from_numpy(part.labels(rows, WATCH_CAP_S)).to(device)
        log_examined = self.model.log_examined()[self.model.place(position)].unsqueeze(-1)
        return task_loss(self.model.logits(**given), log_examined, labels)


def settle_places(model: Ranker, rows: Impressions) -> None:
    """Sets the effect of places to the most likely one, given what the net says of ``rows``; see `models.places`."""
    model.set_log_examined(_examined([rows], [np.concatenate([logits[:, 0] for logits, _ in _logits(model, rows)])]))


def _examined(parts: Sequence[Impressions], liked: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    """float64[POSITIONS], log, by the rows of all parts. liked: logits of a click, of each part's rows."""
    places = [np.minimum(part.position, POSITIONS).astype(np.int64) - 1 for part in parts]
    return examined(
        np.concatenate(liked), np.concatenate(places), np.concatenate([part.clicked for part in parts]), POSITIONS
    )


def calibrate(model: Ranker, rows: Impressions) -> None:
    """Sets slope and offset of every task by rows that were not learned from; as if looked at, hence for any place.

    A head with fewer than two kinds of labels keeps slope 1 and offset 0.
    """
    z, ceiling = (np.concatenate(part) for part in zip(*_logits(model, rows), strict=True))
    labels = rows.labels(slice(None), WATCH_CAP_S)
    for task in range(len(TASKS)):
        if 0 < labels[:, task].sum() < len(labels):
            platt = fit_platt(z[:, task], labels[:, task], ceiling)
            model.slope[task], model.offset[task] = platt.slope, platt.offset


def _logits(model: Ranker, rows: Impressions) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Chunk by chunk: logits float32[n, TASKS], and how likely each row's place is looked at, float32[n]."""
    with torch.inference_mode():
        for chunk in chunks(len(rows)):
            given = tensors(rows.inputs(chunk, neutral=False))
            position = given.pop("position")
            yield model.logits(**given).numpy(), torch.exp(model.log_examined())[model.place(position)].numpy()


def answers(model: Ranker, rows: Impressions, *, neutral: bool = True) -> NDArray[np.float32]:
    """float32[R, TASKS]: see `Ranker.forward`. neutral: as when serving; else with the effect of each row's place."""
    with torch.inference_mode():
        return np.concatenate(
            [model(**tensors(rows.inputs(c, neutral=neutral))).numpy() for c in chunks(len(rows))]
            or [np.zeros((0, len(TASKS)), np.float32)]
        )


def position_effect(model: Ranker) -> NDArray[np.float64]:
    """float64[POSITIONS]: chance that place 1, 2, … is looked at, of that of place 1."""
    with torch.inference_mode():
        return np.exp(model.log_examined()[1 : POSITIONS + 1].numpy().astype(np.float64))


def known_places(rows: Impressions) -> Impressions:
    """Those whose place in the slate was told: the others would be taken for first places."""
    return rows.take(rows.position != NEUTRAL_POSITION)


def chunks(n: int) -> list[NDArray[np.int64]]:
    """Row numbers 0 … n - 1 in parts that fit into caches."""
    return [np.arange(first, min(n, first + CHUNK_ROWS)) for first in range(0, n, CHUNK_ROWS)]


def _scaling(rows: Impressions) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Of present values only: a stand-in says nothing of what is usual."""
    present = np.where(rows.missing > 0, np.nan, rows.features)
    columns = [column[~np.isnan(column)].reshape(-1, 1) for column in present.T]
    pairs = [scaling(c) if len(c) else (np.zeros(1, np.float32), np.ones(1, np.float32)) for c in columns]
    return np.concatenate([mean for mean, _ in pairs]), np.concatenate([scale for _, scale in pairs])
