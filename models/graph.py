"""Builds ONNX graphs node by node: the same weights give the same bytes, and only `onnx` is needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from models.export import IR_VERSION, OPSET

Shape = Sequence[int | str]


class Graph:
    """A graph that grows; every method that adds something returns the name of the value it makes."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._initialisers: dict[str, onnx.TensorProto] = {}

    def floats(self, name: str, *shape: int | str) -> str:
        """An input of float32."""
        self._inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def integers(self, name: str, *shape: int | str) -> str:
        """An input of int64."""
        self._inputs.append(helper.make_tensor_value_info(name, TensorProto.INT64, shape))
        return name

    def constant(self, value: NDArray[Any] | float | Sequence[int]) -> str:
        """A number or array of float32, or a sequence of int64 (shapes, axes); equal ones are kept once."""
        array = np.asarray(value)
        array = array.astype(np.int64 if array.dtype.kind in "iu" else np.float32)
        name = f"constant_{len(self._initialisers)}"
        made = numpy_helper.from_array(array, name)
        for known, other in self._initialisers.items():
            if other.dims == made.dims and other.data_type == made.data_type and other.raw_data == made.raw_data:
                return known
        self._initialisers[name] = made
        return name

    def __call__(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """A node of one output."""
        output = f"{operator.lower()}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    def linear(self, x: str, layer: nn.Linear) -> str:
        """``layer`` on the last axis of ``x``."""
        product = self("MatMul", x, self.constant(layer.weight.detach().numpy().T.copy()))
        return product if layer.bias is None else self("Add", product, self.constant(layer.bias.detach().numpy()))

    def side_by_side(self, x: str, layers: Iterable[nn.Module]) -> str:
        """Linear layers with biases on the last axis of ``x``, their outputs one after the other: one product."""
        weights, biases = zip(*((layer.weight.detach(), layer.bias.detach()) for layer in layers), strict=True)
        product = self("MatMul", x, self.constant(torch.cat(weights).numpy().T.copy()))
        return self("Add", product, self.constant(torch.cat(biases).numpy()))

    def sum_last(self, x: str) -> str:
        """Sums over the last axis, which stays as 1."""
        return self("ReduceSum", x, self.constant([-1]), keepdims=1)

    def unit(self, x: str, epsilon: float) -> str:
        """x / sqrt(x·x + epsilon) along the last axis."""
        size = self("Sqrt", self("Add", self.sum_last(self("Mul", x, x)), self.constant(epsilon)))
        return self("Div", x, size)

    def rename(self, x: str, name: str) -> str:
        """Makes ``x`` an output's name."""
        self._nodes.append(helper.make_node("Identity", [x], [name]))
        return name

    def finish(self, outputs: Mapping[str, Shape], properties: Mapping[str, str]) -> onnx.ModelProto:
        """The checked model; outputs are of float32. properties: what it says about itself."""
        graph = helper.make_graph(
            self._nodes,
            self._name,
            self._inputs,
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
            list(self._initialisers.values()),
        )
        made = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="liverank"
        )
        helper.set_model_props(made, dict(properties))
        onnx.checker.check_model(made, full_check=True)
        return made
