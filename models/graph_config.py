"""config.pbtxt of any ONNX model that is exported: read off the graph."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from server.scoring.model_config import VERSIONS_KEPT, parameter_lines

_TYPES = {onnx.TensorProto.FLOAT: "TYPE_FP32", onnx.TensorProto.INT64: "TYPE_INT64"}


def config_text(name: str, graph: onnx.ModelProto, metrics: Mapping[str, float]) -> str:
    """config.pbtxt of a graph: its inputs and outputs, what it says about itself (schemas), and headline metrics.

    Raises:
        ConfigError: a name or a value would have to be escaped.
    """
    lines = [
        "# Written by the exporter (models/graph_config.py); do not edit.",
        f'name: "{name}"',
        'platform: "onnxruntime_onnx"',
        "# 0: rows of one call belong together (viewer_of), so Triton must not join or split calls.",
        "max_batch_size: 0",
        *(_tensor("input", value) for value in graph.graph.input),
        *(_tensor("output", value) for value in graph.graph.output),
        "instance_group [ { kind: KIND_AUTO count: 1 } ]",
        f"version_policy {{ latest {{ num_versions: {VERSIONS_KEPT} }} }}",
        parameter_lines(name, {p.key: p.value for p in graph.metadata_props}, metrics),
    ]
    return "\n".join(lines) + "\n"


def _tensor(kind: str, value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    dims = ", ".join(str(d.dim_value) if d.HasField("dim_value") else "-1" for d in tensor.shape.dim)
    return f'{kind} [ {{ name: "{value.name}" data_type: {_TYPES[tensor.elem_type]} dims: [ {dims} ] }} ]'
