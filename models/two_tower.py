"""Two towers: viewers and streams as vectors of one space, whose inner product says who watches what.

    viewer: embedding, recent streams and what came of them → vector
    stream: embedding of its content, language, category, creator → vector

Each is the embedding that came in, plus what training found it to lack.

Nothing a stream has done so far goes in, so a stream that begins this second has a vector as good as any. Both are
of unit length and as wide as the table's embeddings: the server can search with them as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from models.ranker import CREATOR_BUCKETS, Embedded, unit
from server.scoring.ranker_schema import CODE_BUCKETS, SEQUENCE_META


@dataclass(frozen=True)
class TowerShape:
    """Sizes. embedding_dim: D, of what goes in and of what comes out."""

    embedding_dim: int
    hidden: int = 64


class StreamTower(nn.Module):
    """stream_embedding float32[R, D], codes int64[R, 3] → float32[R, D] of unit length."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.codes = nn.ModuleList(
            Embedded(n, w) for n, w in zip((*CODE_BUCKETS[:2], CREATOR_BUCKETS), (4, 8, 8), strict=True)
        )
        self.first = nn.Linear(shape.embedding_dim + 4 + 8 + 8, shape.hidden)
        self.last = nn.Linear(shape.hidden, shape.embedding_dim)
        self.turn = nn.Linear(shape.embedding_dim, shape.embedding_dim, bias=False)
        _silence(self.last, self.turn)

    def forward(self, stream_embedding: Tensor, codes: Tensor) -> Tensor:
        content = unit(stream_embedding)
        known = torch.cat([content, *(table(codes[:, i]) for i, table in enumerate(self.codes))], dim=-1)
        return unit(content + self.turn(content) + self.last(torch.relu(self.first(known))))


class ViewerTower(nn.Module):
    """viewer_embedding float32[V, D], sequence_embedding float32[V, 20, D], sequence_meta float32[V, 20, 4]
    → float32[V, D] of unit length. Recent streams are weighed by what came of them and how long ago.
    """

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.weigh = nn.Linear(len(SEQUENCE_META), 1)
        self.trust = nn.Linear(2, 1)  # of the history, given whether there is an embedding, and how many visits
        self.first = nn.Linear(2 * shape.embedding_dim + 1, shape.hidden)
        self.last = nn.Linear(shape.hidden, shape.embedding_dim)
        self.turn = nn.Linear(shape.embedding_dim, shape.embedding_dim, bias=False)
        _silence(self.last, self.turn, self.weigh, self.trust)
        nn.init.ones_(self.weigh.bias)

    def forward(self, viewer_embedding: Tensor, sequence_embedding: Tensor, sequence_meta: Tensor) -> Tensor:
        taste = unit(viewer_embedding)
        valid = sequence_meta[..., -1:]
        # tanh: what was disliked pushes away.
        weights = torch.tanh(self.weigh(sequence_meta)) * valid
        visits = valid.sum(1)
        history = (weights * sequence_embedding).sum(1) / torch.sqrt(visits + 1.0)
        about = torch.cat([(taste * taste).sum(-1, keepdim=True), torch.log(visits + 1.0)], dim=-1)
        history = history * torch.exp(self.trust(about))
        known = torch.cat([taste, history, valid.amax(1)], dim=-1)
        both = taste + history
        return unit(both + self.turn(both) + self.last(torch.relu(self.first(known))))


class TwoTower(nn.Module):
    """Both towers and the temperature of their inner product."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.shape = shape
        self.viewer = ViewerTower(shape)
        self.stream = StreamTower(shape)
        self.log_scale = nn.Parameter(torch.tensor(2.3))  # inner products are multiplied by about 10


def sampled_softmax(scores: Tensor, own: Tensor, log_rate: Tensor, candidate: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy of finding each viewer's stream among the batch's candidates; a number.

    Candidates are drawn by how often they are watched (those of the other viewers of the batch) and at random; log_rate
    takes the advantage of often drawn ones away (logQ correction: Yi et al., "Sampling-bias-corrected neural modeling",
    2019; mixed negatives: Yang et al., "Mixed negative sampling", 2020).

    Args:
        scores: float32[b, c] of viewers and candidates; own: int64[b], the candidate that each viewer watched.
        log_rate: float32[c], log of how often a candidate is expected in a batch. candidate: int64[c], its stream;
            wanted: int64[b], each viewer's: the same stream elsewhere in the batch is no negative.
    """
    corrected = scores - log_rate
    # Its own stream is in the set once, however often it was drawn: the others of it are taken out below.
    each = torch.arange(len(own), device=own.device)
    corrected[each, own] = scores[each, own] - log_rate[own].clamp(max=0.0)
    same = candidate.unsqueeze(0) == wanted.unsqueeze(1)
    same[each, own] = False
    return cross_entropy(corrected.masked_fill(same, -1e9), own)


def _silence(*layers: nn.Linear) -> None:
    """Lets towers begin by passing on what they get: embeddings that come in are good ones already, and what training
    cannot tell to be better stays as it is (weights decay towards this)."""
    for layer in layers:
        nn.init.zeros_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
