"""A ranker on a Triton Inference Server over gRPC; its tensors travel inside the messages."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput, InferResult

from server.errors import BadScores
from server.scoring.base import Scores
from server.scoring.ranker_config import check_ranker_config, checked_heads
from server.scoring.ranker_schema import INPUTS, OUTPUT_HEADS, RankerInputs, empty_inputs
from server.scoring.transport import Call, PlainTensors
from server.scoring.triton import TritonScorer

_DATATYPES: dict[type[np.generic], str] = {np.float32: "FP32", np.int64: "INT64"}


class RankerTensors(PlainTensors):
    """All inputs of one call inside its message."""

    def prepare(self, client: InferenceServerClient, rows: Any, timeout_s: float) -> Call:
        """See Transport; ``rows`` are `RankerInputs`."""
        return Call(messages_of(rows), [InferRequestedOutput(OUTPUT_HEADS)])

    def read(self, result: InferResult, n_rows: int, label: str) -> NDArray[Any]:
        """See Transport."""
        try:
            return np.asarray(result.as_numpy(OUTPUT_HEADS))
        except ValueError as error:  # as many bytes as the shape says were not there
            raise BadScores(f"{label} answered a broken tensor: {error}") from error


def messages_of(inputs: RankerInputs) -> list[InferInput]:
    """The inputs as tritonclient takes them."""
    return [
        InferInput(name, tensor.shape, _DATATYPES[INPUTS[name][0]]).set_data_from_numpy(np.ascontiguousarray(tensor))
        for name, tensor in inputs.tensors().items()
    ]


class TritonRanker(TritonScorer):
    """A `Ranker`: connects, checks, reloads a broken model and gives up exactly as `TritonScorer`."""

    def __init__(self, address: str, model_name: str, feature_schema: str, n_features: int, embedding_dim: int) -> None:
        super().__init__(address, model_name, feature_schema, n_features, RankerTensors())
        self._embedding_dim = embedding_dim

    def heads(self, inputs: RankerInputs, deadline_s: float) -> Scores:
        """See Ranker."""
        return self._answered(inputs, deadline_s)

    def _check(self, client: InferenceServerClient, version: str, ends_at: float) -> None:
        config, label = self._config_of(client, version, ends_at)
        check_ranker_config(config, label, self._feature_schema, self._n_features, self._embedding_dim)

    def _decode(self, result: InferResult, n_rows: int, label: str) -> NDArray[np.float32]:
        declared = result.get_output(OUTPUT_HEADS)
        if declared is None or declared.datatype != "FP32":
            found = "nothing" if declared is None else declared.datatype
            raise BadScores(f"{label} answered {found} as {OUTPUT_HEADS}, wanted is FP32")
        return checked_heads(self._tensors.read(result, n_rows, label), n_rows, label)

    def _probe(self) -> list[InferInput]:
        return messages_of(empty_inputs(1, self._n_features, self._embedding_dim))
