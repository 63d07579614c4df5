"""Tiny rankers as ONNX, good and bad. Needs `onnx` (extra: train)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from loadtest.faults.nets import put_model
from models.graph_config import config_text
from server.scoring.model_config import SCHEMA_PARAMETER
from server.scoring.ranker_schema import CODE_BUCKETS, HEADS, INPUTS, RANKER_PARAMETER, RANKER_SCHEMA, RankerInputs

_TYPES = {np.float32: TensorProto.FLOAT, np.int64: TensorProto.INT64}


def put_ranker(
    repository: Path, model: onnx.ModelProto, schema: str, n_features: int, dim: int, version: int = 1,
    name: str = "ranker", config: str = "",
) -> None:  # fmt: skip
    """Adds a version to ``repository/name``."""
    text = config or config_of(schema, n_features, dim, name)
    put_model(repository, name, model, version, config=text)


def config_of(schema: str, n_features: int, dim: int, name: str = "ranker", auc: float = 0.7) -> str:
    """config.pbtxt of a ranker that keeps the contract, as the exporter writes it."""
    graph = constant(n_features, dim, [0.5] * len(HEADS))
    helper.set_model_props(graph, {SCHEMA_PARAMETER: schema, RANKER_PARAMETER: RANKER_SCHEMA})
    graph.graph.output[0].type.tensor_type.shape.dim[1].dim_value = len(HEADS)
    return config_text(name, graph, {"auc": auc})


def telling(n_features: int, dim: int) -> onnx.ModelProto:
    """A ranker whose heads tell its inputs, so that a test sees what arrived:

    click = (1 + cosine of viewer and stream) / 2, where both embeddings are of unit length
    watch = sigmoid(sum of the outcomes in the viewer's history + sum of its embeddings' first numbers)
    purchase = creator's bucket / number of buckets
    report = 0.25 * (position + 1) + 0.5 * share of features that are missing
    """
    constants = {
        "half": np.float32(0.5), "one": np.float32(1), "quarter": np.float32(0.25), "two": np.array(2, np.int64),
        "zero": np.array(0, np.int64), "buckets": np.float32(CODE_BUCKETS[2]), "axis1": np.array([1], np.int64),
    }  # fmt: skip
    n = helper.make_node
    nodes = [
        n("Gather", ["viewer_embedding", "viewer_of"], ["mine"], axis=0),
        n("Mul", ["mine", "stream_embedding"], ["products"]),
        n("ReduceSum", ["products", "axis1"], ["cosine"], keepdims=1),
        n("Add", ["cosine", "one"], ["above"]),
        n("Mul", ["above", "half"], ["click"]),
        n("Gather", ["sequence_meta", "two"], ["outcomes"], axis=2),
        n("Gather", ["sequence_embedding", "zero"], ["firsts"], axis=2),
        n("Add", ["outcomes", "firsts"], ["visits"]),
        n("ReduceSum", ["visits", "axis1"], ["history"], keepdims=1),
        n("Gather", ["history", "viewer_of"], ["of_row"], axis=0),
        n("Sigmoid", ["of_row"], ["watch"]),
        n("Cast", ["codes"], ["numbers"], to=TensorProto.FLOAT),
        n("Gather", ["numbers", "two"], ["creator"], axis=1),
        n("Div", ["creator", "buckets"], ["share"]),
        n("Unsqueeze", ["share", "axis1"], ["purchase"]),
        n("Add", ["position", "one"], ["placed"]),
        n("Mul", ["placed", "quarter"], ["place"]),
        n("ReduceMean", ["stream_missing"], ["missing"], axes=[1], keepdims=1),
        n("Mul", ["missing", "half"], ["halved"]),
        n("Add", ["place", "halved"], ["report"]),
        n("Concat", ["click", "watch", "purchase", "report"], ["heads"], axis=1),
    ]
    return _model(nodes, constants, n_features, dim)


def told_by(inputs: RankerInputs) -> np.ndarray[Any, Any]:
    """What `telling` answers, computed here. float32[R, 4]."""
    cosine = (inputs.viewer_embedding[inputs.viewer_of] * inputs.stream_embedding).sum(axis=1)
    history = (inputs.sequence_meta[:, :, 2] + inputs.sequence_embedding[:, :, 0]).sum(axis=1)
    return np.stack(
        [
            (1 + cosine) / 2, 1 / (1 + np.exp(-history[inputs.viewer_of])), inputs.codes[:, 2] / CODE_BUCKETS[2],
            0.25 * (inputs.position[:, 0] + 1) + 0.5 * inputs.stream_missing.mean(axis=1),
        ], axis=1,
    ).astype(np.float32)  # fmt: skip


def constant(n_features: int, dim: int, heads: list[float]) -> onnx.ModelProto:
    """Answers the same for every row, with as many columns as ``heads``; NaN allowed."""
    nodes = [
        helper.make_node("Sub", ["position", "position"], ["zeros"]),
        helper.make_node("Add", ["zeros", "wanted"], ["heads"]),
    ]
    return _model(nodes, {"wanted": np.array([heads], np.float32)}, n_features, dim)


def endless(n_features: int, dim: int) -> onnx.ModelProto:
    """Takes minutes."""
    return slow(n_features, dim, 10**9, [0.0] * len(HEADS))


def slow(n_features: int, dim: int, steps_per_row: int, heads: list[float]) -> onnx.ModelProto:
    """Answers the same for every row, after a loop of so many steps, of a microsecond or so, for each."""
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Add", ["sum", "one"], ["sum_out"])],
        "body",
        [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("sum", TensorProto.FLOAT, [])],
        [value("go_on", TensorProto.BOOL, []), value("sum_out", TensorProto.FLOAT, [])],
    )
    nodes = [
        helper.make_node("Shape", ["viewer_of"], ["rows"]),
        helper.make_node("Squeeze", ["rows"], ["n"]),
        helper.make_node("Mul", ["n", "per_row"], ["times"]),
        helper.make_node("Loop", ["times", "yes", "one"], ["total"], body=body),
        helper.make_node("Mul", ["total", "nothing"], ["none"]),
        helper.make_node("Mul", ["position", "none"], ["zeros"]),
        helper.make_node("Add", ["zeros", "wanted"], ["heads"]),
    ]
    constants = {
        "per_row": np.array(steps_per_row, np.int64), "yes": np.array(True), "one": np.float32(1),
        "nothing": np.float32(0), "wanted": np.array([heads], np.float32),
    }  # fmt: skip
    return _model(nodes, constants, n_features, dim)


def _model(nodes: list[Any], constants: dict[str, Any], n_features: int, dim: int) -> onnx.ModelProto:
    sizes = {"F": n_features, "D": dim}
    graph = helper.make_graph(
        nodes, "ranker",
        [
            helper.make_tensor_value_info(name, _TYPES[kind], [sizes.get(str(size), size) for size in shape])
            for name, (kind, shape) in INPUTS.items()
        ],
        [helper.make_tensor_value_info("heads", TensorProto.FLOAT, ["R", "H"])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
