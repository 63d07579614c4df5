"""A ranker in this process with onnxruntime, from the same repository that Triton serves."""

from __future__ import annotations

import time
from pathlib import Path

from tritonclient.grpc.model_config_pb2 import ModelConfig

from server.errors import ScorerTimeout
from server.scoring.base import Scores
from server.scoring.local import LocalScorer, run_session
from server.scoring.ranker_config import check_ranker_config, checked_heads
from server.scoring.ranker_schema import OUTPUT_HEADS, RankerInputs


class LocalRanker(LocalScorer):
    """The version of ``model_repository/model_name`` that `LocalScorer` would take, as a `Ranker`."""

    def __init__(
        self, model_repository: Path, model_name: str, feature_schema: str, n_features: int, embedding_dim: int
    ) -> None:
        super().__init__(model_repository, model_name, feature_schema, n_features)
        self._embedding_dim = embedding_dim

    def heads(self, inputs: RankerInputs, deadline_s: float) -> Scores:
        """See Ranker."""
        ends_at = time.monotonic() + deadline_s
        model = self._newest()
        label = f"{self._name}/{model.version}"
        values = run_session(model.session, OUTPUT_HEADS, inputs.tensors(), ends_at - time.monotonic(), label)
        if time.monotonic() > ends_at:
            raise ScorerTimeout(f"{label} answered after {deadline_s * 1e3:.0f} ms")
        return Scores(checked_heads(values, len(inputs), label), label)

    def _check(self, config: ModelConfig, label: str) -> None:
        check_ranker_config(config, label, self._feature_schema, self._n_features, self._embedding_dim)
