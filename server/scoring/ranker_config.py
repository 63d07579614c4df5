"""Checks of a ranker: of its config.pbtxt, which the exporter writes (`models.graph_config`), and of its answers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from server.errors import BadScores, SchemaMismatch
from server.scoring.model_config import SCHEMA_PARAMETER
from server.scoring.ranker_schema import HEADS, INPUTS, OUTPUT_HEADS, RANKER_PARAMETER, RANKER_SCHEMA

RANGE_TOLERANCE = 1e-3
"""Beyond [0, 1] by more than this is not a probability but a broken model."""

_TYPES: dict[type[np.generic], int] = {np.float32: DataType.TYPE_FP32, np.int64: DataType.TYPE_INT64}


def _dims(shape: tuple[str | int, ...], n_features: int, embedding_dim: int) -> list[int]:
    sizes = {"R": -1, "V": -1, "F": n_features, "D": embedding_dim}
    return [size if isinstance(size, int) else sizes[size] for size in shape]


def check_ranker_config(
    config: ModelConfig, model: str, feature_schema: str, n_features: int, embedding_dim: int
) -> None:
    """Accepts a ranker that was built for our features, our embeddings and this contract; it may answer more.

    Raises:
        SchemaMismatch: other schema or other widths; names both sides. BadScores: other inputs, or no usable heads.
    """
    for parameter, ours in ((SCHEMA_PARAMETER, feature_schema), (RANKER_PARAMETER, RANKER_SCHEMA)):
        theirs = config.parameters[parameter].string_value if parameter in config.parameters else ""
        if theirs != ours:
            raise SchemaMismatch(f"{model} was built for {parameter} {theirs or '(none)'!r}, this server has {ours!r}")
    inputs = {entry.name: entry for entry in config.input}
    if set(inputs) != set(INPUTS):
        raise BadScores(f"{model} takes {sorted(inputs)}; wanted is {sorted(INPUTS)}")
    for name, (kind, shape) in INPUTS.items():
        wanted = _dims(shape, n_features, embedding_dim)
        if inputs[name].data_type != _TYPES[kind] or list(inputs[name].dims) != wanted:
            theirs = inputs[name].data_type  # which may be a number without a name
            found = f"{DataType.Name(theirs) if theirs in DataType.values() else theirs}{list(inputs[name].dims)}"
            raise SchemaMismatch(
                f"{model} takes {name} as {found}, this server has {DataType.Name(_TYPES[kind])}{wanted}"
            )
    heads = next((entry for entry in config.output if entry.name == OUTPUT_HEADS), None)
    if heads is None or heads.data_type != DataType.TYPE_FP32 or list(heads.dims) != [-1, len(HEADS)]:
        raise BadScores(f"{model}: output {OUTPUT_HEADS} must be TYPE_FP32 [-1, {len(HEADS)}]")


def checked_heads(values: NDArray[Any], n_rows: int, model: str) -> NDArray[np.float32]:
    """``values``, clipped to [0, 1].

    Raises:
        BadScores: it is not float32[n_rows, 4], or a number in it is NaN, infinite or no probability. One is enough:
        a model that breaks for one candidate is not trusted about the order of the others.
    """
    wanted = (n_rows, len(HEADS))
    if values.dtype != np.float32 or values.shape != wanted:
        raise BadScores(f"{model} answered {values.dtype}{list(values.shape)}, wanted is float32{list(wanted)}")
    usable = (values >= -RANGE_TOLERANCE) & (values <= 1 + RANGE_TOLERANCE)  # False for NaN
    if not usable.all():
        rows = int(np.count_nonzero(~usable.all(axis=1)))
        raise BadScores(f"{model} gave no probabilities for {rows} of {n_rows} rows")
    return np.clip(values, 0.0, 1.0)
