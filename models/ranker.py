"""The ranker: viewer × stream → calibrated probabilities of click, watch, purchase, report.

A multi-gate mixture of experts (Ma et al., "Modeling task relationships in multi-task learning with multi-gate
mixture-of-experts", 2018): experts are shared, each head weighs them by a gate of its own. Inputs and outputs
are those of `server.scoring.ranker_schema`; everything between them is inside, scaling and calibration included.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from models.trendiness import standardised
from server.scoring.ranker_schema import CODE_BUCKETS, HEADS, SEQUENCE_META, RankerInputs

TASKS = (*HEADS, "watch_time")
"""What is learned: the heads, and the expected share of WATCH_CAP_S that is watched."""
WATCH_CAP_S = 600.0
"""Watching longer counts as this much: one evening must not outweigh a hundred visits."""

CREATOR_BUCKETS = 16_384
"""The contract's buckets are folded to so many: most are never seen, and each costs a row of weights."""
POSITIONS = 50
"""Places beyond share the factor of this one."""
PACE = 20.0
"""Steps of the places' effect, in those of other weights: one number per place has far to go from chance."""
EPSILON = 1e-6
PADDED = 1e4
"""Taken from the attention score of padding; far below any real score."""


@dataclass(frozen=True)
class RankerShape:
    """Sizes of the net. features: F. embedding_dim: D."""

    features: int
    embedding_dim: int
    width: int = 16  # of projected embeddings, keys and values
    experts: int = 4
    hidden: int = 64
    expert: int = 32
    tower: int = 16


class Embedded(nn.Module):
    """int64[n] codes → float32[n, width]; what was never seen, and 0 (unknown), is exactly zero.

    So a new creator is what training showed by dropping ids: a stream known by its content alone.
    """

    def __init__(self, buckets: int, width: int) -> None:
        super().__init__()
        self.buckets = buckets
        self.weight = nn.Parameter(torch.zeros(buckets, width))

    def forward(self, codes: Tensor) -> Tensor:
        known = (codes > 0).to(self.weight.dtype).unsqueeze(-1)
        return self.weight[codes % self.buckets] * known


class Ranker(nn.Module):
    """See the module. R rows of V viewers, names and shapes as in `server.scoring.ranker_schema.INPUTS`.

    Args:
        mean, scale: float32[F] of the signed logs of present features; scale > 0.

    Buffers slope and offset float32[TASKS] are set by calibration, after the weights.
    """

    mean: Tensor
    scale: Tensor
    slope: Tensor
    offset: Tensor

    def __init__(self, shape: RankerShape, mean: NDArray[np.float32], scale: NDArray[np.float32]) -> None:
        super().__init__()
        self.shape = shape
        width, dim = shape.width, shape.embedding_dim
        self.register_buffer("mean", torch.from_numpy(mean.copy()))
        self.register_buffer("scale", torch.from_numpy(scale.copy()))
        self.register_buffer("slope", torch.ones(len(TASKS)))
        self.register_buffer("offset", torch.zeros(len(TASKS)))
        self.viewer = nn.Linear(dim, width, bias=False)
        self.stream = nn.Linear(dim, width, bias=False)
        self.key = nn.Linear(dim + len(SEQUENCE_META), width)
        self.value = nn.Linear(dim + len(SEQUENCE_META), width)
        self.query = nn.Linear(dim, width)
        buckets = (*CODE_BUCKETS[:2], CREATOR_BUCKETS)
        self.codes = nn.ModuleList(Embedded(n, w) for n, w in zip(buckets, (4, 8, 4), strict=True))
        inputs = 2 * shape.features + 4 * width + 3 + 16
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(inputs, shape.hidden), nn.ReLU(), nn.Linear(shape.hidden, shape.expert), nn.ReLU())
            for _ in range(shape.experts)
        )
        self.gates = nn.ModuleList(nn.Linear(inputs, shape.experts) for _ in TASKS)
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(shape.expert, shape.tower), nn.ReLU(), nn.Linear(shape.tower, 1)) for _ in TASKS
        )
        self.unseen = nn.Parameter(torch.zeros(POSITIONS - 1))

    def log_examined(self) -> Tensor:
        """float32[POSITIONS + 1]: log of the chance that place p is looked at, of that of place 1; [0] is neutral.

        Source: the examination hypothesis (Richardson et al., "Predicting clicks", 2007): an impression is clicked if
        it is looked at, which depends on the place alone, and then liked, which does not.
        """
        return torch.cat([self.unseen.new_zeros(2), -softplus(PACE * self.unseen)])

    @torch.no_grad()
    def set_log_examined(self, values: NDArray[np.float64]) -> None:
        """values: float64[POSITIONS], at most 0, of place 1, 2, …; the first one's is 0 whatever is given."""
        fallen = torch.from_numpy(-values[1:]).clamp(min=1e-4)
        self.unseen.copy_(torch.log(torch.expm1(fallen)) / PACE)

    def place(self, position: Tensor) -> Tensor:
        """float32[R, 1] → int64[R] into `log_examined`; -1 (neutral) and anything below 1 is 0."""
        return position.reshape(-1).clamp(0, POSITIONS).to(torch.int64)

    def logits(
        self,
        stream_features: Tensor,
        stream_missing: Tensor,
        stream_embedding: Tensor,
        codes: Tensor,
        viewer_of: Tensor,
        viewer_embedding: Tensor,
        sequence_embedding: Tensor,
        sequence_meta: Tensor,
    ) -> Tensor:
        """float32[R, TASKS], before calibration, as if looked at."""
        x = standardised(stream_features, self.mean, self.scale) * (1.0 - stream_missing)
        viewer, stream = unit(viewer_embedding)[viewer_of], unit(stream_embedding)
        liked, shown = self.viewer(viewer), self.stream(stream)
        remembered, closest = self._attend(stream, viewer_of, sequence_embedding, sequence_meta)
        embedded = [table(codes[:, i]) for i, table in enumerate(self.codes)]
        together = torch.cat(
            [
                x, stream_missing, liked, shown, liked * shown, remembered, closest,
                (viewer * stream).sum(-1, keepdim=True), (viewer * viewer).sum(-1, keepdim=True), *embedded,
            ],
            dim=-1,
        )  # fmt: skip
        experts = torch.stack([expert(together) for expert in self.experts], dim=1)
        found = []
        for gate, tower in zip(self.gates, self.towers, strict=True):
            weights = torch.softmax(gate(together), dim=-1).unsqueeze(-1)
            found.append(tower((weights * experts).sum(1)))
        return torch.cat(found, dim=-1)

    def forward(
        self,
        stream_features: Tensor,
        stream_missing: Tensor,
        stream_embedding: Tensor,
        codes: Tensor,
        position: Tensor,
        viewer_of: Tensor,
        viewer_embedding: Tensor,
        sequence_embedding: Tensor,
        sequence_meta: Tensor,
    ) -> Tensor:
        """float32[R, TASKS]: calibrated probabilities, then the expected share of WATCH_CAP_S."""
        logits = self.logits(
            stream_features, stream_missing, stream_embedding, codes, viewer_of, viewer_embedding, sequence_embedding,
            sequence_meta,
        )  # fmt: skip
        examined = torch.exp(self.log_examined())[self.place(position)].unsqueeze(-1)
        return torch.sigmoid(self.slope * logits + self.offset) * examined

    def _attend(
        self, stream: Tensor, viewer_of: Tensor, sequence_embedding: Tensor, sequence_meta: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the viewer did with streams like this one: float32[R, width], and how like the likest was [R, 1].

        Keys and values are computed once per viewer, before the gather. Zero for a viewer without a history.
        """
        visited = torch.cat([sequence_embedding, sequence_meta], dim=-1)
        keys, values = self.key(visited)[viewer_of], self.value(visited)[viewer_of]
        valid = sequence_meta[..., -1][viewer_of]
        scores = (self.query(stream).unsqueeze(1) * keys).sum(-1) * self.shape.width**-0.5
        scores = scores * valid + (valid - 1.0) * PADDED
        weights = torch.softmax(scores, dim=-1) * valid
        return (weights.unsqueeze(-1) * values).sum(1), scores.amax(-1, keepdim=True).clamp(min=-10.0)


def unit(x: Tensor) -> Tensor:
    """``x`` [..., D] at length 1; zero stays zero."""
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + EPSILON)


def task_loss(logits: Tensor, log_examined: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy float32[TASKS] of labels float32[b, TASKS] within [0, 1], mean over rows.

    Args:
        logits: float32[b, TASKS], as if looked at. log_examined: float32[b, 1], of each row's place; it is learned
            by the first task, click, alone: the others are rare, and hardly any of them happens without a click.
    """
    others = log_examined.detach().expand(-1, len(TASKS) - 1)
    log_p = logsigmoid(logits) + torch.cat([log_examined, others], dim=-1)
    log_not = torch.log1p(-torch.exp(log_p).clamp(max=1.0 - EPSILON))
    return -(labels * log_p + (1.0 - labels) * log_not).mean(0)


def tensors(inputs: RankerInputs, device: torch.device | None = None) -> dict[str, Tensor]:
    """One call's arrays as the keyword arguments of ``forward``."""
    return {name: torch.from_numpy(np.ascontiguousarray(a)).to(device) for name, a in inputs.tensors().items()}


def heads(model: Ranker, inputs: RankerInputs) -> NDArray[np.float32]:
    """float32[R, 4]: what a server gets."""
    with torch.inference_mode():
        return np.asarray(model(**tensors(inputs))[:, : len(HEADS)].numpy())
