"""A trained recipe as ONNX, node by node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from loadtest.replay.growth import TARGETS
from models.export import IR_VERSION, OPSET
from models.growth.features import NAMES, OWN, schema
from models.growth.net import CLAMP, Ensemble
from models.growth.outlook import PARTS
from models.growth.outlook_net import LOG_SPREAD, MIXED, Outlooks
from server.scoring.model_config import INPUT, SCHEMA_PARAMETER

OUTPUT = "outlook"
_OF_CHANCES: dict[str, NDArray[np.generic]] = {"flat": np.array([-1], np.int64)}
_OF_OUTLOOKS: dict[str, NDArray[np.generic]] = {
    "narrowest": np.array(LOG_SPREAD[0], np.float32),
    "widest": np.array(LOG_SPREAD[1], np.float32),
    "part_axis": np.array([1], np.int64),
}


class _Nodes:
    """Nodes and constants of a graph that is being written."""

    def __init__(self, model: Ensemble | Outlooks, constants: Mapping[str, NDArray[np.generic]]) -> None:
        self.nets = len(model.nets)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, NDArray[np.generic]] = {
            "clamp": np.array(CLAMP, np.float32),
            "minus_clamp": np.array(-CLAMP, np.float32),
            **constants,
            **{name: value.detach().numpy() for name, value in model.state_dict().items()},
        }

    def add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def split(self, whole: str, parts: list[str]) -> list[str]:
        """Equal parts of the last axis."""
        self.nodes.append(helper.make_node("Split", [whole], parts, axis=1))
        return parts

    def net(self, number: int) -> str:
        """The name of one net's output."""
        net = f"nets.{number}"
        x = self.add("Sub", [INPUT, f"{net}.mean"], f"{net}/centred")
        x = self.add("Div", [x, f"{net}.scale"], f"{net}/scaled")
        x = self.add("Clip", [x, "minus_clamp", "clamp"], f"{net}/standardised")
        y = x
        for layer in ("first", "second"):
            y = self.add("Gemm", [y, f"{net}.{layer}.weight", f"{net}.{layer}.bias"], f"{net}/{layer}", transB=1)
            y = self.add("Relu", [y], f"{net}/{layer}_relu")
        y = self.add("Gemm", [y, f"{net}.last.weight", f"{net}.last.bias"], f"{net}/last", transB=1)
        straight = self.add("Gemm", [x, f"{net}.straight.weight"], f"{net}/straight", transB=1)
        return self.add("Add", [y, straight], f"{net}/logit")


def build_graph(model: Ensemble | Outlooks) -> onnx.ModelProto:
    """Input ``features``. Of an ensemble float32[n, NAMES] to one output float32[n] per target; of outlooks
    float32[n, OWN] to ``outlook`` float32[n, PARTS, nets * MIXED]."""
    if isinstance(model, Outlooks):
        nodes = _Nodes(model, _OF_OUTLOOKS | {"nets": np.array(len(model.nets), np.float32)})
        names, outputs = OWN, _add_outlook(nodes)
    else:
        nodes = _Nodes(model, _OF_CHANCES)
        names, outputs = NAMES, _add_chances(nodes)
    graph = helper.make_graph(
        nodes.nodes,
        "growth",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["n", len(names)])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in nodes.constants.items()],
    )
    opset = helper.make_opsetid("", OPSET)
    made = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="liverank")
    helper.set_model_props(made, {SCHEMA_PARAMETER: schema(names)})
    onnx.checker.check_model(made, full_check=True)
    return made


def _add_chances(nodes: _Nodes) -> dict[str, list[str | int]]:
    """Output → shape."""
    chances = []
    for i in range(nodes.nets):
        # Only the heads that are kept; the other tasks helped to learn.
        for name in ("last.weight", "last.bias", "straight.weight"):
            nodes.constants[f"nets.{i}.{name}"] = nodes.constants[f"nets.{i}.{name}"][: len(TARGETS)]
        chances.append(nodes.add("Sigmoid", [nodes.net(i)], f"nets.{i}/chance"))
    mean = nodes.add("Mean", chances, "mean_chance")
    for target, column in zip(TARGETS, nodes.split(mean, [f"{t}/column" for t in TARGETS])):
        nodes.add("Reshape", [column, "flat"], target)
    return {target: ["n"] for target in TARGETS}


def _add_outlook(nodes: _Nodes) -> dict[str, list[str | int]]:
    """Output → shape."""
    of_parts: tuple[list[str], ...] = ([], [], [])
    for i in range(nodes.nets):
        net = f"nets.{i}"
        weight, centre, spread = nodes.split(nodes.net(i), [f"{net}/{part}" for part in ("weight", "centre", "spread")])
        weight = nodes.add("Softmax", [weight], f"{net}/of_one", axis=1)
        of_parts[0].append(nodes.add("Div", [weight, "nets"], f"{net}/of_all"))
        of_parts[1].append(centre)
        of_parts[2].append(nodes.add("Clip", [spread, "narrowest", "widest"], f"{net}/log_spread"))
    rows = []
    for part, of in zip(("weights", "centres", "log_spreads"), of_parts):
        whole = nodes.add("Concat", of, part, axis=1)
        rows.append(nodes.add("Unsqueeze", [whole, "part_axis"], f"{part}/row"))
    nodes.add("Concat", rows, OUTPUT, axis=1)
    return {OUTPUT: ["n", PARTS, nodes.nets * MIXED]}
