"""Writes a trained recipe as a version's folder: model.onnx, metrics.json; and reads one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from loadtest.replay.growth import TARGETS
from models.export import TOLERANCE, ExportMismatch, without_nan
from models.growth.features import NAMES, OWN, schema
from models.growth.graph import OUTPUT, build_graph
from models.growth.net import Ensemble, predict
from models.growth.outlook_net import Outlooks
from models.growth.score import OUTLOOK, PLACES
from server.errors import ConfigError
from server.scoring.model_config import INPUT, SCHEMA_PARAMETER

MODEL_FILE, FACTS_FILE = "model.onnx", "metrics.json"
_FEATURES = {PLACES: NAMES, OUTLOOK: OWN}


@dataclass(frozen=True)
class Version:
    """A trained recipe as it was written: its graph in onnxruntime, its metrics.json, and what it learns."""

    session: onnxruntime.InferenceSession
    facts: dict[str, Any]
    learns: str = PLACES

    def predict(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """The answer to features as `models.growth.score.features_of` makes them: what the trained model gives."""
        if self.learns == OUTLOOK:
            return np.asarray(self.session.run([OUTPUT], {INPUT: features})[0])
        return np.stack(self.session.run(list(TARGETS), {INPUT: features}), axis=1)


def publish(folder: Path, model: Ensemble | Outlooks, sample: NDArray[np.float32], facts: Mapping[str, Any]) -> Path:
    """Checks the graph against torch on ``sample``, features float32[n, F] as the model wants them, and puts the
    version in place as a whole.

    Raises:
        ExportMismatch: they differ by more than TOLERANCE, or are not finite; nothing was written.
        ConfigError: ``folder`` is there and is no version of this kind.
    """
    if folder.exists() and not ((folder / MODEL_FILE).exists() and (folder / FACTS_FILE).exists()):
        raise ConfigError(f"{folder}: is there already and is no model version; another folder is wanted")
    graph = build_graph(model).SerializeToString(deterministic=True)
    answered = Version(_open(graph), {}, model.learns).predict(sample)
    wanted = predict(model, sample)
    difference = float(np.abs(answered - wanted).max(initial=0.0)) if np.isfinite(answered).all() else float("inf")
    if not difference <= TOLERANCE:
        raise ExportMismatch(f"graph and model differ by {difference:.2g}, allowed is {TOLERANCE}")
    hidden = folder.parent / f".new-{folder.name}"
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    (hidden / MODEL_FILE).write_bytes(graph)
    kept = {"feature_schema": schema(_FEATURES[model.learns]), "export_difference": difference, **facts}
    text = json.dumps(without_nan(kept), indent=2, sort_keys=True, allow_nan=False)
    (hidden / FACTS_FILE).write_text(text + "\n")
    if folder.exists():  # a folder cannot be renamed over another
        shutil.rmtree(folder)
    os.replace(hidden, folder)
    return folder


def load(folder: Path) -> Version:
    """A version that ``publish`` wrote.

    Raises:
        ConfigError: it is none, or was made for other features.
    """
    try:
        facts = json.loads((folder / FACTS_FILE).read_text())
        session = _open((folder / MODEL_FILE).read_bytes())
    except (OSError, ValueError, onnxruntime.capi.onnxruntime_pybind11_state.InvalidProtobuf) as error:
        raise ConfigError(f"--model: {folder} is no version of the growth model: {error}") from error
    theirs = session.get_modelmeta().custom_metadata_map.get(SCHEMA_PARAMETER, "")
    ours = {schema(names): learns for learns, names in _FEATURES.items()}
    if theirs not in ours:
        wanted = " or ".join(map(repr, ours))
        raise ConfigError(f"--model: {folder} was built for feature schema {theirs or '(none)'!r}, not {wanted}")
    return Version(session, facts, ours[theirs])


def _open(graph: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
