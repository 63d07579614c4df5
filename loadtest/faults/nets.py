"""Small ONNX models, good and bad, for a Triton in tests and in the fault matrix. Needs `onnx` (extra: train)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.errors import ConfigError
from server.scoring.model_config import render_config

try:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except ImportError as error:
    raise ConfigError("onnx is not installed, and small models are made here: pip install -e '.[train]'") from error

N_FEATURES = 6
SCHEMA = "schema-of-the-tests"

# Models. Each maps features float32[n, F] to trend float32[n].


def put_model(
    repository: Path, name: str, model: onnx.ModelProto, version: int = 1, schema: str = SCHEMA,
    n_features: int = N_FEATURES, config: str = "",
) -> None:  # fmt: skip
    """Adds a version; it appears complete, as the exporter promises."""
    folder = repository / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.pbtxt").write_text(config or render_config(schema, n_features, model_name=name))
    fresh = folder / f".{version}"
    fresh.mkdir()
    onnx.save(model, str(fresh / "model.onnx"))
    fresh.rename(folder / str(version))


def small_net(seed: int = 1, n_features: int = N_FEATURES, schema: str | None = None) -> onnx.ModelProto:
    """sigmoid(relu(x W1) w2), weights from ``seed``."""
    random = np.random.default_rng(seed)
    weights = {
        "w1": random.normal(0, 0.3, (n_features, 16)).astype(np.float32),
        "w2": random.normal(0, 0.3, 16).astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["features", "w1"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("MatMul", ["active", "w2"], ["logit"]),
        helper.make_node("Sigmoid", ["logit"], ["trend"]),
    ]
    return _model(nodes, weights, n_features=n_features, schema=schema)


def nan_where_first_feature_is_negative() -> onnx.ModelProto:
    """sqrt(x0): NaN for x0 < 0, a probability for 0 <= x0 <= 1."""
    nodes = [
        helper.make_node("Gather", ["features", "zero"], ["first"], axis=1),
        helper.make_node("Sqrt", ["first"], ["trend"]),
    ]
    return _model(nodes, {"zero": np.array(0, dtype=np.int64)})


def two_columns_out(n_features: int = N_FEATURES, schema: str | None = None) -> onnx.ModelProto:
    """Answers float32[n, 2] whatever its configuration says."""
    nodes = [
        helper.make_node("MatMul", ["features", "w"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["trend"]),
    ]
    return _model(nodes, {"w": np.ones((n_features, 2), np.float32)}, n_features, ["n", 2], schema)


def all_nan(n_features: int = N_FEATURES, schema: str | None = None) -> onnx.ModelProto:
    """Answers NaN for every row."""
    nodes = [helper.make_node("MatMul", ["features", "w"], ["trend"])]
    return _model(nodes, {"w": np.full(n_features, np.nan, np.float32)}, n_features=n_features, schema=schema)


def one_row_short(n_features: int = N_FEATURES, schema: str | None = None) -> onnx.ModelProto:
    """Answers 0.5 for every row but the last, which it forgets."""
    nodes = [
        helper.make_node("Slice", ["features", "first", "last"], ["most"]),
        helper.make_node("MatMul", ["most", "w"], ["logit"]),
        helper.make_node("Sigmoid", ["logit"], ["trend"]),
    ]
    weights = {
        "first": np.array([0], np.int64), "last": np.array([-1], np.int64), "w": np.zeros(n_features, np.float32),
    }  # fmt: skip
    return _model(nodes, weights, n_features=n_features, schema=schema, out_shape=["m"])


def endless() -> onnx.ModelProto:
    """Adds one to a scalar 10^9 times before it answers 0.5: minutes."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Add", ["sum", "one"], ["sum_out"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum_out", TensorProto.FLOAT, []),
        ],
    )
    weights = {
        "times": np.array(10**9, np.int64), "yes": np.array(True), "one": np.array(1, np.float32),
        "w": np.zeros(N_FEATURES, np.float32), "nothing": np.array(0, np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("Loop", ["times", "yes", "one"], ["total"], body=body),
        helper.make_node("Mul", ["total", "nothing"], ["none"]),
        helper.make_node("MatMul", ["features", "w"], ["logit"]),
        helper.make_node("Add", ["logit", "none"], ["shifted"]),
        helper.make_node("Sigmoid", ["shifted"], ["trend"]),
    ]
    return _model(nodes, weights)


def _model(
    nodes: list[onnx.NodeProto], weights: dict[str, NDArray[Any]], n_features: int = N_FEATURES,
    out_shape: list[Any] | None = None, schema: str | None = None,
) -> onnx.ModelProto:  # fmt: skip
    graph = helper.make_graph(
        nodes, "trend",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", n_features])],
        [helper.make_tensor_value_info("trend", TensorProto.FLOAT, out_shape or ["n"])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if schema is not None:
        helper.set_model_props(model, {"feature_schema": schema})
    return model


def on_lattice(model: onnx.ModelProto, odd: bool, schema: str, metrics: dict[str, float] | None = None) -> None:
    """Moves the scores of a model, in place, onto multiples of 0.002, or, if ``odd``, between them: by 0.001 or less.

    So every single score tells which of two models gave it, and the two agree about everything else.
    """
    for node in model.graph.node:
        node.output[:] = ["raw_trend" if name == "trend" else name for name in node.output]
    constants = {"steps": 499.0, "step": 0.002, "shift": 0.001 if odd else 0.0}
    model.graph.initializer.extend(numpy_helper.from_array(np.float32(v), name) for name, v in constants.items())
    model.graph.node.extend(
        [
            helper.make_node("Mul", ["raw_trend", "steps"], ["stretched"]),
            helper.make_node("Floor", ["stretched"], ["whole"]),
            helper.make_node("Mul", ["whole", "step"], ["even_trend"]),
            helper.make_node("Add", ["even_trend", "shift"], ["trend"]),
        ]
    )
    told = {"feature_schema": schema, **{f"metric.{name}": str(value) for name, value in (metrics or {}).items()}}
    del model.metadata_props[:]
    helper.set_model_props(model, told)


def is_odd(score: float) -> bool | None:
    """Which lattice a score of `on_lattice` is on; None: neither, so another model, or none, gave it."""
    thousandths = score * 1000
    if abs(thousandths - round(thousandths)) > 0.05:
        return None
    return round(thousandths) % 2 == 1
