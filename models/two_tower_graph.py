"""The towers as ONNX, one file each. Mirrors `models.two_tower` node by node."""

from __future__ import annotations

import onnx
from torch import nn

from models.graph import Graph
from models.ranker import EPSILON
from models.ranker_graph import embedded_nodes
from models.two_tower import StreamTower, ViewerTower
from server.scoring.ranker_schema import CODES, RANKER_PARAMETER, RANKER_SCHEMA, SEQUENCE, SEQUENCE_META

STREAM_TOWER, VIEWER_TOWER = "stream_tower", "viewer_tower"
OUTPUT_EMBEDDING = "embedding"
"""float32[R or V, D], unit length."""


def stream_tower_graph(tower: StreamTower) -> onnx.ModelProto:
    """stream_embedding float32[R, D], codes int64[R, 3] → embedding float32[R, D]."""
    g = Graph(STREAM_TOWER)
    dim = tower.turn.in_features
    content = g.unit(g.floats("stream_embedding", "R", dim), EPSILON)
    codes = g.integers("codes", "R", len(CODES))
    known = g("Concat", content, *(embedded_nodes(g, codes, i, t) for i, t in enumerate(tower.codes)), axis=-1)
    return _finish(g, g("Add", _turned(g, content, tower), _corrected(g, known, tower)), "R", dim)


def viewer_tower_graph(tower: ViewerTower) -> onnx.ModelProto:
    """viewer_embedding float32[V, D], sequence_embedding float32[V, 20, D], sequence_meta float32[V, 20, 4]
    → embedding float32[V, D]."""
    g = Graph(VIEWER_TOWER)
    dim = tower.turn.in_features
    taste = g.unit(g.floats("viewer_embedding", "V", dim), EPSILON)
    embedding = g.floats("sequence_embedding", "V", SEQUENCE, dim)
    meta = g.floats("sequence_meta", "V", SEQUENCE, len(SEQUENCE_META))
    valid = g("Gather", meta, g.constant([len(SEQUENCE_META) - 1]), axis=2)
    weights = g("Mul", g("Tanh", g.linear(meta, tower.weigh)), valid)
    total = g("ReduceSum", g("Mul", weights, embedding), g.constant([1]), keepdims=0)
    count = g("Add", g("ReduceSum", valid, g.constant([1]), keepdims=0), g.constant(1.0))
    about = g("Concat", g.sum_last(g("Mul", taste, taste)), g("Log", count), axis=-1)
    history = g("Mul", g("Div", total, g("Sqrt", count)), g("Exp", g.linear(about, tower.trust)))
    known = g("Concat", taste, history, g("ReduceMax", valid, axes=[1], keepdims=0), axis=-1)
    both = _turned(g, g("Add", taste, history), tower)
    return _finish(g, g("Add", both, _corrected(g, known, tower)), "V", dim)


def _turned(g: Graph, x: str, tower: StreamTower | ViewerTower) -> str:
    return g("Add", x, g.linear(x, tower.turn))


def _corrected(g: Graph, known: str, tower: StreamTower | ViewerTower) -> str:
    first: nn.Linear = tower.first
    return g.linear(g("Relu", g.linear(known, first)), tower.last)


def _finish(g: Graph, vector: str, rows: str, dim: int) -> onnx.ModelProto:
    g.rename(g.unit(vector, EPSILON), OUTPUT_EMBEDDING)
    return g.finish({OUTPUT_EMBEDDING: (rows, dim)}, {RANKER_PARAMETER: RANKER_SCHEMA})
