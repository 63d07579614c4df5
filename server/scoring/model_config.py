"""config.pbtxt of a trendiness model: written by the exporter, checked by every scorer.

One text serves NVIDIA's GPU container, the Docker-less Triton of ``triton/`` and the in-process scorer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from server.errors import BadScores, ConfigError, SchemaMismatch

INPUT = "features"  # float32[n, F]
OUTPUT = "trend"  # float32[n], calibrated probability in [0, 1]
SCHEMA_PARAMETER = "feature_schema"
COMMIT_PARAMETER = "commit"
VERSIONS_KEPT = 2

_PLAIN = re.compile(r"[A-Za-z0-9_.:-]+")  # needs no escaping in protobuf text


def render_config(
    schema_hash: str,
    n_features: int,
    metrics: Mapping[str, float] | None = None,
    model_name: str = "trendiness",
    commit: str = "",
) -> str:
    """The text of ``<model_name>/config.pbtxt``.

    Args:
        schema_hash: the feature schema the model was trained on; servers refuse any other.
        n_features: F, the width of a feature row.
        metrics: evaluation results to keep beside the model, each as parameter ``metric.<name>``.
        commit: of the code that wrote it; "" unknown.

    Raises:
        ConfigError: a name cannot be written, or ``n_features`` is not positive.
    """
    if n_features < 1:
        raise ConfigError(f"n_features: {n_features} is not positive")
    said = {SCHEMA_PARAMETER: schema_hash} | ({COMMIT_PARAMETER: commit} if commit else {})
    lines = parameter_lines(model_name, said, metrics or {})
    return f"""\
# Written by the exporter (server/scoring/model_config.py); do not edit.
name: "{model_name}"
platform: "onnxruntime_onnx"
# 0: the shapes below are whole. A refresh sends tens of thousands of rows per call, where joining calls
# gains nothing; callers split larger tables, so no row limit has to be agreed between client and server.
max_batch_size: 0
input [ {{ name: "{INPUT}" data_type: TYPE_FP32 dims: [ -1, {n_features} ] }} ]
output [ {{ name: "{OUTPUT}" data_type: TYPE_FP32 dims: [ -1 ] }} ]
instance_group [ {{ kind: KIND_AUTO count: 1 }} ]
# The newest answers; the one before stays loaded until the next, so that going back is instant.
version_policy {{ latest {{ num_versions: {VERSIONS_KEPT} }} }}
# No dynamic_batching for the sake of its queue limit: with max_batch_size 0 a queue policy makes requests
# that wait behind others stall for seconds. Callers bound the queue: one call at a time, and a breaker.
{lines}
"""


def parameter_lines(model_name: str, schemas: Mapping[str, str], metrics: Mapping[str, float]) -> str:
    """The lines of config.pbtxt with its parameters: schemas by parameter, each metric as ``metric.<name>``.

    Raises:
        ConfigError: something cannot be written.
    """
    parameters = {**schemas, **{f"metric.{name}": f"{value:.6g}" for name, value in metrics.items()}}
    for text in (model_name, *parameters):
        if not _PLAIN.fullmatch(text):
            raise ConfigError(f"model configuration: {text!r} may hold letters, digits and _ . : - only")
    for name, value in schemas.items():
        if not _PLAIN.fullmatch(value):
            field = name if name == COMMIT_PARAMETER else "schema_hash"
            raise ConfigError(f"{field}: {value!r} may hold letters, digits and _ . : - only")
    return "\n".join(
        f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}' for key, value in parameters.items()
    )


def parse_config(text: str) -> ModelConfig:
    """Parses config.pbtxt. Raises SchemaMismatch when it is not one."""
    try:
        return text_format.Parse(text, ModelConfig())
    except text_format.ParseError as error:
        raise SchemaMismatch(f"config.pbtxt is not a model configuration: {error}") from error


def check_config(config: ModelConfig, model: str, feature_schema: str, n_features: int) -> None:
    """Accepts a model that was built for our features and answers one score per row.

    Raises:
        SchemaMismatch: other feature schema or other row width; names both sides.
        BadScores: no usable ``features`` input or ``trend`` output.
    """
    theirs = config.parameters[SCHEMA_PARAMETER].string_value if SCHEMA_PARAMETER in config.parameters else ""
    if theirs != feature_schema:
        raise SchemaMismatch(
            f"{model} was built for feature schema {theirs or '(none)'!r}, this server has {feature_schema!r}"
        )
    inputs = {entry.name: entry for entry in config.input}
    outputs = {entry.name: entry for entry in config.output}
    if set(inputs) != {INPUT} or OUTPUT not in outputs:
        raise BadScores(f"{model} maps {sorted(inputs)} to {sorted(outputs)}; wanted is ['{INPUT}'] to ['{OUTPUT}']")
    if {inputs[INPUT].data_type, outputs[OUTPUT].data_type} != {DataType.TYPE_FP32}:
        raise BadScores(f"{model}: {INPUT} and {OUTPUT} must be TYPE_FP32")
    width = inputs[INPUT].dims[-1] if inputs[INPUT].dims else 0
    if width != n_features:
        raise SchemaMismatch(f"{model} takes {width} features per row, this server has {n_features}")
