"""The ranker as ONNX: what `models.ranker` computes, as `models.repository.check_graph` proves.

Sums of products are products of small matrices here: as broadcast products and sums they took half of the time.
"""

from __future__ import annotations

import onnx
from torch import nn

from models.graph import Graph
from models.ranker import EPSILON, PADDED, POSITIONS, TASKS, WATCH_CAP_S, Embedded, Ranker
from models.trendiness import CLAMP, LIMIT
from server.scoring.ranker_schema import CODES, HEADS, OUTPUT_HEADS, RANKER_PARAMETER, RANKER_SCHEMA, SEQUENCE

OUTPUT_WATCH_SECONDS = "watch_seconds"
"""float32[R]: expected seconds, each visit capped at WATCH_CAP_S."""


def ranker_graph(model: Ranker, feature_schema: str) -> onnx.ModelProto:
    """Inputs as in `ranker_schema.INPUTS`; outputs ``heads`` float32[R, 4] and ``watch_seconds`` float32[R]."""
    g = Graph("ranker")
    n_features, dim = model.shape.features, model.shape.embedding_dim
    features = g.floats("stream_features", "R", n_features)
    missing = g.floats("stream_missing", "R", n_features)
    stream_embedding = g.floats("stream_embedding", "R", dim)
    codes = g.integers("codes", "R", len(CODES))
    position = g.floats("position", "R", 1)
    viewer_of = g.integers("viewer_of", "R")
    viewer_embedding = g.floats("viewer_embedding", "V", dim)
    sequence_embedding = g.floats("sequence_embedding", "V", SEQUENCE, dim)
    sequence_meta = g.floats("sequence_meta", "V", SEQUENCE, 4)

    x = g("Mul", standardised_nodes(g, features, model), g("Sub", g.constant(1.0), missing))
    viewer = g("Gather", g.unit(viewer_embedding, EPSILON), viewer_of, axis=0)
    stream = g.unit(stream_embedding, EPSILON)
    liked, shown = g.linear(viewer, model.viewer), g.linear(stream, model.stream)
    remembered, closest = _attention(g, model, stream, viewer_of, sequence_embedding, sequence_meta)
    together = g(
        "Concat", x, missing, liked, shown, g("Mul", liked, shown), remembered, closest,
        g.sum_last(g("Mul", viewer, stream)), g.sum_last(g("Mul", viewer, viewer)),
        *(embedded_nodes(g, codes, i, table) for i, table in enumerate(model.codes)), axis=-1,
    )  # fmt: skip
    experts = [g("Unsqueeze", _sequential(g, together, expert), g.constant([1])) for expert in model.experts]
    stacked = g("Concat", *experts, axis=1)
    gates = g("Reshape", g.side_by_side(together, model.gates), g.constant([-1, len(TASKS), model.shape.experts]))
    mixed = g("MatMul", g("Softmax", gates, axis=-1), stacked)  # [R, TASKS, expert]
    found = [
        _sequential(g, g("Gather", mixed, g.constant(task), axis=1), tower) for task, tower in enumerate(model.towers)
    ]
    logits = g("Concat", *found, axis=-1)
    calibrated = g(
        "Add", g("Mul", logits, g.constant(model.slope.numpy())), g.constant(model.offset.numpy())
    )  # fmt: skip
    answers = g("Mul", g("Sigmoid", calibrated), _examined(g, model, position))
    heads = g("Slice", answers, g.constant([0]), g.constant([len(HEADS)]), g.constant([1]))
    share = g("Slice", answers, g.constant([TASKS.index("watch_time")]), g.constant([len(TASKS)]), g.constant([1]))
    seconds = g("Mul", g("Squeeze", share, g.constant([1])), g.constant(WATCH_CAP_S))
    g.rename(heads, OUTPUT_HEADS)
    g.rename(seconds, OUTPUT_WATCH_SECONDS)
    return g.finish(
        {OUTPUT_HEADS: ("R", len(HEADS)), OUTPUT_WATCH_SECONDS: ("R",)},
        {"feature_schema": feature_schema, RANKER_PARAMETER: RANKER_SCHEMA},
    )


def standardised_nodes(g: Graph, features: str, model: Ranker) -> str:
    """`models.trendiness.standardised`."""
    numbers = g("Where", g("IsNaN", features), g.constant(0.0), features)
    clean = g("Clip", numbers, g.constant(-LIMIT), g.constant(LIMIT))
    logs = g("Mul", g("Sign", clean), g("Log", g("Add", g("Abs", clean), g.constant(1.0))))
    scaled = g("Div", g("Sub", logs, g.constant(model.mean.numpy())), g.constant(model.scale.numpy()))
    return g("Clip", scaled, g.constant(-CLAMP), g.constant(CLAMP))


def embedded_nodes(g: Graph, codes: str, column: int, table: nn.Module) -> str:
    """`models.ranker.Embedded` of one column of codes int64[R, 3]."""
    assert isinstance(table, Embedded)
    code = g("Gather", codes, g.constant(column), axis=1)
    rows = g("Gather", g.constant(table.weight.detach().numpy()), g("Mod", code, g.constant(table.buckets)))
    known = g("Cast", g("Greater", code, g.constant(0)), to=onnx.TensorProto.FLOAT)
    return g("Mul", rows, g("Unsqueeze", known, g.constant([-1])))


def _attention(g: Graph, model: Ranker, stream: str, viewer_of: str, embedding: str, meta: str) -> tuple[str, str]:
    visited = g("Concat", embedding, meta, axis=-1)
    keys = g("Gather", g.linear(visited, model.key), viewer_of, axis=0)
    values = g("Gather", g.linear(visited, model.value), viewer_of, axis=0)
    valid = g("Gather", g("Gather", meta, g.constant(3), axis=2), viewer_of, axis=0)
    query = g("Unsqueeze", g.linear(stream, model.query), g.constant([2]))
    products = g("Squeeze", g("MatMul", keys, query), g.constant([2]))
    scores = g("Mul", products, g.constant(model.shape.width**-0.5))
    padding = g("Mul", g("Sub", valid, g.constant(1.0)), g.constant(PADDED))
    scores = g("Add", g("Mul", scores, valid), padding)
    weights = g("Unsqueeze", g("Mul", g("Softmax", scores, axis=-1), valid), g.constant([1]))
    remembered = g("Squeeze", g("MatMul", weights, values), g.constant([1]))
    return remembered, g("Max", g("ReduceMax", scores, axes=[-1], keepdims=1), g.constant(-10.0))


def _examined(g: Graph, model: Ranker, position: str) -> str:
    table = g.constant(model.log_examined().exp().detach().numpy())
    place = g("Clip", position, g.constant(0.0), g.constant(float(POSITIONS)))
    return g("Gather", table, g("Cast", place, to=onnx.TensorProto.INT64), axis=0)


def _sequential(g: Graph, x: str, layers: nn.Module) -> str:
    assert isinstance(layers, nn.Sequential)
    for layer in layers:
        x = g.linear(x, layer) if isinstance(layer, nn.Linear) else g("Relu", x)
    return x
