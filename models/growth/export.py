"""Writes a trained recipe as a version's folder: model.onnx, metrics.json; and reads one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from loadtest.replay.growth import TARGETS
from models.export import IR_VERSION, OPSET, TOLERANCE, ExportMismatch, without_nan
from models.growth.features import NAMES, schema
from models.growth.net import CLAMP, Ensemble, predict
from server.errors import ConfigError
from server.scoring.model_config import INPUT, SCHEMA_PARAMETER

MODEL_FILE, FACTS_FILE = "model.onnx", "metrics.json"


@dataclass(frozen=True)
class Version:
    """A trained recipe as it was written: its graph in onnxruntime, and its metrics.json."""

    session: onnxruntime.InferenceSession
    facts: dict[str, Any]

    def scores(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32[n, TARGETS] of features float32[n, NAMES]."""
        return np.stack(self.session.run(list(TARGETS), {INPUT: features}), axis=1)


def build_graph(model: Ensemble) -> onnx.ModelProto:
    """The nets as ONNX: input ``features`` float32[n, NAMES], one output float32[n] per target."""
    constants: dict[str, NDArray[np.generic]] = {
        "clamp": np.float32(CLAMP),
        "minus_clamp": np.float32(-CLAMP),
        "flat": np.array([-1], np.int64),
        **{name: value.detach().numpy() for name, value in model.state_dict().items()},
    }
    nodes = []

    def add(operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    chances = []
    for i in range(len(model.nets)):
        net = f"nets.{i}"
        # Only the heads that are kept; the other tasks helped to learn.
        for name in ("last.weight", "last.bias", "straight.weight"):
            constants[f"{net}.{name}"] = constants[f"{net}.{name}"][: len(TARGETS)]
        x = add("Sub", [INPUT, f"{net}.mean"], f"{net}/centred")
        x = add("Div", [x, f"{net}.scale"], f"{net}/scaled")
        x = add("Clip", [x, "minus_clamp", "clamp"], f"{net}/standardised")
        y = x
        for layer in ("first", "second"):
            y = add("Gemm", [y, f"{net}.{layer}.weight", f"{net}.{layer}.bias"], f"{net}/{layer}", transB=1)
            y = add("Relu", [y], f"{net}/{layer}_relu")
        y = add("Gemm", [y, f"{net}.last.weight", f"{net}.last.bias"], f"{net}/last", transB=1)
        straight = add("Gemm", [x, f"{net}.straight.weight"], f"{net}/straight", transB=1)
        chances.append(add("Sigmoid", [add("Add", [y, straight], f"{net}/logit")], f"{net}/chance"))
    mean = add("Mean", chances, "mean_chance")
    nodes.append(helper.make_node("Split", [mean], [f"{t}/column" for t in TARGETS], axis=1))
    for target in TARGETS:
        add("Reshape", [f"{target}/column", "flat"], target)
    graph = helper.make_graph(
        nodes,
        "growth",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["n", len(NAMES)])],
        [helper.make_tensor_value_info(target, TensorProto.FLOAT, ["n"]) for target in TARGETS],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opset = helper.make_opsetid("", OPSET)
    made = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="liverank")
    helper.set_model_props(made, {SCHEMA_PARAMETER: schema()})
    onnx.checker.check_model(made, full_check=True)
    return made


def publish(folder: Path, model: Ensemble, sample: NDArray[np.float32], facts: Mapping[str, Any]) -> Path:
    """Checks the graph against torch on ``sample`` float32[n, NAMES] and puts the version in place as a whole.

    Raises:
        ExportMismatch: they differ by more than TOLERANCE, or are not finite; nothing was written.
        ConfigError: ``folder`` is there and is no version of this kind.
    """
    if folder.exists() and not ((folder / MODEL_FILE).exists() and (folder / FACTS_FILE).exists()):
        raise ConfigError(f"{folder}: is there already and is no model version; another folder is wanted")
    graph = build_graph(model).SerializeToString(deterministic=True)
    answered = Version(_open(graph), {}).scores(sample)
    wanted = predict(model, sample)
    difference = float(np.abs(answered - wanted).max(initial=0.0)) if np.isfinite(answered).all() else float("inf")
    if not difference <= TOLERANCE:
        raise ExportMismatch(f"graph and model differ by {difference:.2g}, allowed is {TOLERANCE}")
    hidden = folder.parent / f".new-{folder.name}"
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    (hidden / MODEL_FILE).write_bytes(graph)
    kept = {"feature_schema": schema(), "export_difference": difference, **facts}
    text = json.dumps(without_nan(kept), indent=2, sort_keys=True, allow_nan=False)
    (hidden / FACTS_FILE).write_text(text + "\n")
    if folder.exists():  # a folder cannot be renamed over another
        shutil.rmtree(folder)
    os.replace(hidden, folder)
    return folder


def load(folder: Path) -> Version:
    """A version that ``publish`` wrote.

    Raises:
        ConfigError: it is none, or was made for other features.
    """
    try:
        facts = json.loads((folder / FACTS_FILE).read_text())
        session = _open((folder / MODEL_FILE).read_bytes())
    except (OSError, ValueError, onnxruntime.capi.onnxruntime_pybind11_state.InvalidProtobuf) as error:
        raise ConfigError(f"--model: {folder} is no version of the growth model: {error}") from error
    theirs = session.get_modelmeta().custom_metadata_map.get(SCHEMA_PARAMETER, "")
    if theirs != schema():
        raise ConfigError(f"--model: {folder} was built for feature schema {theirs or '(none)'!r}, not {schema()!r}")
    return Version(session, facts)


def _open(graph: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
