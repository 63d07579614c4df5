"""Puts any ONNX model into the model repository: config.pbtxt is read off the graph, a version appears as a whole."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from models import experiment
from models.export import TOLERANCE, ExportMismatch
from server.scoring.model_config import VERSIONS_KEPT

_TYPES = {onnx.TensorProto.FLOAT: "TYPE_FP32", onnx.TensorProto.INT64: "TYPE_INT64"}
_PLAIN = re.compile(r"[A-Za-z0-9_.:-]+")  # needs no escaping in protobuf text


def check_graph(
    graph: bytes,
    inputs: Mapping[str, NDArray[Any]],
    wanted: Mapping[str, NDArray[np.floating]],
    ranges: Mapping[str, float] | None = None,
) -> float:
    """Largest difference of the graph in onnxruntime from what the model computes, relative to an output's range.

    Args:
        ranges: by output, how large it may become; 1 where nothing is said.

    Raises:
        ExportMismatch: it is above TOLERANCE, or an output is not finite or of another shape.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for name, answered in zip(wanted, session.run(list(wanted), dict(inputs)), strict=True):
        if answered.shape != wanted[name].shape or not np.isfinite(answered).all():
            raise ExportMismatch(f"{name}: finite {wanted[name].shape} wanted from the graph, got {answered.shape}")
        difference = float(np.abs(answered - wanted[name]).max(initial=0.0))
        worst = max(worst, difference / (ranges or {}).get(name, 1.0))
    if worst > TOLERANCE:
        raise ExportMismatch(f"graph and model differ by {worst:.2g}, allowed is {TOLERANCE}")
    return worst


def config_text(name: str, graph: onnx.ModelProto, metrics: Mapping[str, float]) -> str:
    """config.pbtxt of a graph: its inputs and outputs, what it says about itself (schemas), and headline metrics.

    Raises ValueError for a name that protobuf text would have to escape.
    """
    parameters = {p.key: p.value for p in graph.metadata_props}
    parameters |= {f"metric.{key}": f"{value:.6g}" for key, value in metrics.items()}
    for text in (name, *parameters, *parameters.values()):
        if not _PLAIN.fullmatch(text):
            raise ValueError(f"model configuration: {text!r} may hold letters, digits and _ . : - only")
    lines = [
        "# Written by the exporter (models/repository.py); do not edit.",
        f'name: "{name}"',
        'platform: "onnxruntime_onnx"',
        "# 0: rows of one call belong together (viewer_of), so Triton must not join or split calls.",
        "max_batch_size: 0",
        *(_tensor("input", value) for value in graph.graph.input),
        *(_tensor("output", value) for value in graph.graph.output),
        "instance_group [ { kind: KIND_AUTO count: 1 } ]",
        f"version_policy {{ latest {{ num_versions: {VERSIONS_KEPT} }} }}",
        *(f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}' for key, value in parameters.items()),
    ]
    return "\n".join(lines) + "\n"


def place(
    repository: Path,
    name: str,
    version: int,
    graph: onnx.ModelProto,
    inputs: Mapping[str, NDArray[Any]],
    wanted: Mapping[str, NDArray[np.floating]],
    facts: Mapping[str, Any],
    headline: Mapping[str, float],
    ranges: Mapping[str, float] | None = None,
) -> Path:
    """Checks a graph on a sample and writes ``NAME/VERSION/`` (model.onnx, experiment.json) and ``config.pbtxt``.

    Written to a hidden sibling and renamed, so that no server sees half a version. Returns the version's folder.

    Raises:
        ExportMismatch: see check_graph; the repository is as before.
    """
    content = graph.SerializeToString(deterministic=True)
    check_graph(content, inputs, wanted, ranges)
    folder = repository / name
    hidden, final = folder / f".new-{version}", folder / str(version)
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    (hidden / "model.onnx").write_bytes(content)
    experiment.write(hidden, facts)
    config = folder / ".new-config.pbtxt"
    config.write_text(config_text(name, graph, headline))
    os.replace(config, folder / "config.pbtxt")
    if final.exists():  # a folder cannot be renamed over another
        shutil.rmtree(final)
    os.replace(hidden, final)
    return final


def _tensor(kind: str, value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    dims = ", ".join(str(d.dim_value) if d.HasField("dim_value") else "-1" for d in tensor.shape.dim)
    return f'{kind} [ {{ name: "{value.name}" data_type: {_TYPES[tensor.elem_type]} dims: [ {dims} ] }} ]'
