"""Writes a model where the scorers look for it: model.onnx, config.pbtxt, metrics.json, and its weights beside them.

The graph is built node by node from the weights: it is small, and torch's own exporters need packages that
are not declared here, or write operator sets that servers do not know yet.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from loadtest.revision import code_commit
from models.trendiness import CLAMP, LIMIT, Trendiness, predict
from models.weights import NAME as WEIGHTS
from models.weights import Weights, save_weights
from server.scoring.model_config import COMMIT_PARAMETER, INPUT, OUTPUT, SCHEMA_PARAMETER, render_config

OPSET = 17
IR_VERSION = 8
"""What belongs to opset 17: onnxruntime from 1.12 and the Triton containers of the last years read it."""
GRAPH_HASH = "graph_sha256"
"""Of model.onnx, in the record beside it: that record is of these weights."""
TOLERANCE = 1e-5
MODEL_NAME = "trendiness"


class ExportMismatch(Exception):
    """The written graph does not compute what the model computes; nothing was published."""


def build_graph(model: Trendiness, schema: str, told: Mapping[str, str] | None = None) -> onnx.ModelProto:
    """The model as ONNX: input ``features`` float32[n, F], output ``trend`` float32[n]; carries its schema.

    ``told``: what else its metadata says.
    """
    n_features = len(model.mean)
    constants = {
        "zero": 0.0, "one": 1.0, "limit": LIMIT, "minus_limit": -LIMIT, "clamp": CLAMP, "minus_clamp": -CLAMP,
        **{name: value.detach().numpy() for name, value in model.state_dict().items()},
    }  # fmt: skip
    initialisers = [numpy_helper.from_array(np.asarray(v, np.float32), name) for name, v in constants.items()]
    initialisers.append(numpy_helper.from_array(np.array([-1], np.int64), "flat"))
    # (operator, inputs, output, attributes)
    nodes: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("IsNaN", [INPUT], "is_nan", {}),
        ("Where", ["is_nan", "zero", INPUT], "numbers", {}),
        ("Clip", ["numbers", "minus_limit", "limit"], "clean", {}),
        ("Sign", ["clean"], "sign", {}),
        ("Abs", ["clean"], "size", {}),
        ("Add", ["size", "one"], "size_1", {}),
        ("Log", ["size_1"], "log", {}),
        ("Mul", ["sign", "log"], "logs", {}),
        ("Sub", ["logs", "mean"], "centred", {}),
        ("Div", ["centred", "scale"], "scaled", {}),
        ("Clip", ["scaled", "minus_clamp", "clamp"], "standardised", {}),
        ("Gemm", ["standardised", "first.weight", "first.bias"], "a", {"transB": 1}),
        ("Relu", ["a"], "b", {}),
        ("Gemm", ["b", "second.weight", "second.bias"], "c", {"transB": 1}),
        ("Relu", ["c"], "d", {}),
        ("Gemm", ["d", "last.weight", "last.bias"], "column", {"transB": 1}),
        ("Reshape", ["column", "flat"], "logit", {}),
        ("Mul", ["logit", "slope"], "sloped", {}),
        ("Add", ["sloped", "offset"], "calibrated", {}),
        ("Sigmoid", ["calibrated"], OUTPUT, {}),
    ]
    graph = helper.make_graph(
        [helper.make_node(op, inputs, [output], **attributes) for op, inputs, output, attributes in nodes],
        MODEL_NAME,
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["n", n_features])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["n"])],
        initialisers,
    )
    made = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="liverank"
    )
    helper.set_model_props(made, {SCHEMA_PARAMETER: schema, **(told or {})})
    onnx.checker.check_model(made, full_check=True)
    return made


def check_parity(graph: bytes, model: Trendiness, features: NDArray[np.float32]) -> float:
    """Largest difference between the graph in onnxruntime and the model on rows float32[n, F].

    Raises:
        ExportMismatch: it is above TOLERANCE, or an output is not finite.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    answered = session.run([OUTPUT], {INPUT: features})[0]
    wanted = predict(model, features)
    if answered.shape != wanted.shape or not np.isfinite(answered).all():
        raise ExportMismatch(f"finite [{len(wanted)}] wanted from the graph, got {answered.shape}")
    difference = float(np.abs(answered - wanted).max(initial=0.0))
    if difference > TOLERANCE:
        raise ExportMismatch(f"graph and model differ by {difference:.2g}, allowed is {TOLERANCE}")
    return difference


def publish(
    repository: Path,
    version: int,
    model: Trendiness,
    schema: str,
    sample: NDArray[np.float32],
    facts: Mapping[str, Any],
    config_metrics: Mapping[str, float],
) -> Path:
    """Checks the exported model on ``sample`` float32[n, F] and puts it in place as a whole; returns its folder.

    Written to a hidden sibling and renamed, so that no scorer sees half a version. ``facts`` go into metrics.json;
    ``config_metrics`` too, as its headline, and with schema and commit into config.pbtxt and the graph itself. Checked
    also on rows of every size, with NaN and infinities.

    Raises:
        ExportMismatch: see check_parity; the repository is as before.
    """
    revision, config_metrics = code_commit(), dict(sorted(config_metrics.items()))
    told = {f"metric.{name}": f"{value:.6g}" for name, value in config_metrics.items() if math.isfinite(value)}
    graph = build_graph(model, schema, {COMMIT_PARAMETER: revision, **told}).SerializeToString(deterministic=True)
    checked = np.concatenate([sample, odd_rows(len(model.mean))])
    difference = check_parity(graph, model, checked)
    folder = repository / MODEL_NAME
    hidden, final = folder / f".new-{version}", folder / str(version)
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    (hidden / "model.onnx").write_bytes(graph)
    save_weights(hidden / WEIGHTS, Weights(model, MODEL_NAME, schema, sample, without_nan(facts), config_metrics))
    written = {
        **facts, "feature_schema": schema, "commit": revision, "headline": config_metrics,
        "onnx_difference": difference, "onnx_checked_rows": len(checked), GRAPH_HASH: graph_hash(graph),
    }  # fmt: skip
    text = json.dumps(without_nan(written), indent=2, sort_keys=True, allow_nan=False)
    (hidden / "metrics.json").write_text(text + "\n")
    config = folder / ".new-config.pbtxt"
    config.write_text(render_config(schema, len(model.mean), config_metrics, MODEL_NAME, revision))
    os.replace(config, folder / "config.pbtxt")
    if final.exists():  # a folder cannot be renamed over another
        shutil.rmtree(final)
    os.replace(hidden, final)
    return final


def odd_rows(n_features: int, rows: int = 64) -> NDArray[np.float32]:
    """float32[rows, n_features] that no training saw: every size and sign, NaN and infinities among them. Seeded."""
    rng = np.random.default_rng(0)
    found = rng.standard_normal((rows, n_features)) * 10.0 ** rng.uniform(-8, 12, (rows, n_features))
    for value in (np.nan, np.inf, -np.inf, 0.0):
        found[rng.random(found.shape) < 0.03] = value
    return found.astype(np.float32)


def graph_hash(graph: bytes) -> str:
    """sha256 of a model's file."""
    return hashlib.sha256(graph).hexdigest()


def without_nan(facts: Any) -> Any:
    """The same with None for numbers that could not be measured: JSON has no NaN."""
    if isinstance(facts, Mapping):
        return {key: without_nan(value) for key, value in facts.items()}
    if isinstance(facts, list | tuple):
        return [without_nan(value) for value in facts]
    return None if isinstance(facts, float) and not math.isfinite(facts) else facts
