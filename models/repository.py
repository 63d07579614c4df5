"""Puts any ONNX model into the model repository: config.pbtxt is read off the graph, a version appears as a whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from models import experiment
from models.export import GRAPH_HASH, TOLERANCE, ExportMismatch, graph_hash
from models.graph_config import config_text


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
    experiment.write(hidden, {**facts, GRAPH_HASH: graph_hash(content)})
    config = folder / ".new-config.pbtxt"
    config.write_text(config_text(name, graph, headline))
    os.replace(config, folder / "config.pbtxt")
    if final.exists():  # a folder cannot be renamed over another
        shutil.rmtree(final)
    os.replace(hidden, final)
    return final
