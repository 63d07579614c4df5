"""Scores in this process with onnxruntime, from the same repository that Triton serves."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tritonclient.grpc.model_config_pb2 import ModelConfig

from server.errors import BadScores, SchemaMismatch, ScorerTimeout, ScorerUnavailable, ScoringError
from server.scoring.base import Scores
from server.scoring.model_config import INPUT, OUTPUT, SCHEMA_PARAMETER, check_config, parse_config
from server.scoring.ort_errors import ORT_ERRORS
from server.scoring.shapes import checked_features, checked_scores
from server.scoring.watchdog import Watchdog

log = logging.getLogger(__name__)

_WATCHDOG = Watchdog()


@dataclass(frozen=True)
class _Model:
    version: int
    session: onnxruntime.InferenceSession


class LocalScorer:
    """One version of ``model_repository/model_name``. Called from one thread; loads when first used.

    Args:
        version: the only one that answers; 0: the highest, until `pin` names another.

    A new, higher version directory is picked up by the next call if none is pinned, so it must appear complete
    (written elsewhere, then renamed). One that cannot be used is logged and not tried again while an older one serves.
    """

    name = "local"
    transport = "in_process"

    def __init__(
        self, model_repository: Path, model_name: str, feature_schema: str, n_features: int, version: int = 0
    ) -> None:
        self._folder = Path(model_repository) / model_name
        self._name = model_name
        self._feature_schema = feature_schema
        self._n_features = n_features
        self._model: _Model | None = None
        self._refused_version: int | None = None
        self._pinned = version

    def pin(self, version: int) -> None:
        """From the next call on only this version answers. Any thread."""
        self._pinned = version

    def serve(self) -> None:
        """See VersionedScorer. There is nothing to reload here."""

    def score(self, features: NDArray[np.float32], deadline_s: float) -> Scores:
        """See Scorer.score."""
        rows = checked_features(features, self._n_features)
        ends_at = time.monotonic() + deadline_s
        model = self._newest()
        label = f"{self._name}/{model.version}"
        values = run_session(model.session, OUTPUT, {INPUT: rows}, ends_at - time.monotonic(), label)
        if time.monotonic() > ends_at:
            raise ScorerTimeout(f"{label} answered after {deadline_s * 1e3:.0f} ms")
        return Scores(checked_scores(values, len(rows), label), label)

    def close(self) -> None:
        """See Scorer.close."""
        self._model = None

    def _newest(self) -> _Model:
        if pinned := self._pinned:
            if self._model is None or self._model.version != pinned:
                self._model = self._load(pinned)
            return self._model
        version = max(self._versions(), default=None)
        if version is None:
            if self._model is not None:
                return self._model
            raise ScorerUnavailable(f"{self._folder} holds no <version>/model.onnx")
        if self._model is None:
            self._model = self._load(version)
        elif version not in (self._model.version, self._refused_version):
            try:
                self._model = self._load(version)
            except ScoringError as error:
                self._refused_version = version
                log.error("keeping %s/%d: %s", self._name, self._model.version, error)
        return self._model

    def _versions(self) -> list[int]:
        names = [path.parent.name for path in self._folder.glob("*/model.onnx")]
        return [int(name) for name in names if name.isdecimal()]

    def _load(self, version: int) -> _Model:
        label = f"{self._name}/{version}"
        try:
            config = parse_config((self._folder / "config.pbtxt").read_text())
        except OSError as error:
            raise ScorerUnavailable(f"{label}: {error}") from error
        self._check(config, label)
        options = onnxruntime.SessionOptions()
        # One core is left to those who answer requests meanwhile.
        options.intra_op_num_threads = max(1, min(2, (os.cpu_count() or 1) - 1))
        options.inter_op_num_threads = 1
        # Waiting threads must not burn the cores that answer requests.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = self._folder / str(version) / "model.onnx"
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except ORT_ERRORS as error:
            raise ScorerUnavailable(f"{label}: {error}") from error
        # One config.pbtxt covers all versions; what the file itself says about its schema counts as well.
        built_for = session.get_modelmeta().custom_metadata_map.get(SCHEMA_PARAMETER, self._feature_schema)
        if built_for != self._feature_schema:
            raise SchemaMismatch(
                f"{label} was built for feature schema {built_for!r}, this server has {self._feature_schema!r}"
            )
        log.info("loaded %s", label)
        return _Model(version, session)

    def _check(self, config: ModelConfig, label: str) -> None:
        check_config(config, label, self._feature_schema, self._n_features)


def run_session(
    session: onnxruntime.InferenceSession, output: str, inputs: Mapping[str, NDArray[Any]], left_s: float, label: str
) -> NDArray[np.float32]:
    """Runs the model, and stops it between two of its operators once ``left_s`` seconds are over."""
    options = onnxruntime.RunOptions()

    def stop() -> None:
        options.terminate = True

    with _WATCHDOG.watching(time.monotonic() + left_s, stop) as watch:
        try:
            values: NDArray[np.float32] = session.run([output], inputs, options)[0]
        except ORT_ERRORS as error:
            if watch.expired:
                raise ScorerTimeout(f"{label} was stopped at the deadline") from error
            raise BadScores(f"{label}: {error}") from error
    return values
