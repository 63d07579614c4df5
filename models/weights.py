"""Trained weights as a file: what `liverank model export` turns into ONNX, again and elsewhere if need be.

A NumPy archive without pickles, so that reading one runs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray

from models.trendiness import Trendiness
from server.errors import ConfigError

NAME = "weights.npz"
SAMPLE_ROWS = 512
_WEIGHT = "weight:"


@dataclass(frozen=True)
class Weights:
    """A model with what belongs to it.

    model_name: in the repository. schema: of its features. sample float32[n, F]: rows it was tested on. facts: for
    metrics.json. headline: the few numbers by which versions are compared and gated.
    """

    model: Trendiness
    model_name: str
    schema: str
    sample: NDArray[np.float32]
    facts: Mapping[str, Any]
    headline: Mapping[str, float]


def save_weights(path: Path, weights: Weights) -> None:
    """Writes all of it; the same weights give the same bytes."""
    told = {
        "model": weights.model_name,
        "feature_schema": weights.schema,
        "facts": weights.facts,
        "headline": weights.headline,
    }
    arrays = {_WEIGHT + name: value.detach().numpy() for name, value in weights.model.state_dict().items()}
    with path.open("wb") as file:
        np.savez(
            file, told=np.array(json.dumps(told, sort_keys=True)), sample=weights.sample[:SAMPLE_ROWS], **arrays
        )  # fmt: skip


def load_weights(path: Path) -> Weights:
    """The reverse. Raises ConfigError: not such a file, or of a model that this version does not know."""
    try:
        with np.load(path, allow_pickle=False) as file:
            told = json.loads(str(file["told"]))
            sample = np.asarray(file["sample"], np.float32)
            state = {n.removeprefix(_WEIGHT): torch.from_numpy(file[n]) for n in file.files if n.startswith(_WEIGHT)}
        if told["model"] != "trendiness":
            raise ConfigError(f"{path}: weights of 'trendiness' wanted, it has those of {told['model']!r}")
        model = Trendiness(state["mean"].numpy(), state["scale"].numpy())
        model.load_state_dict(state)
        return Weights(model, told["model"], told["feature_schema"], sample, told["facts"], told["headline"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, BadZipFile) as error:
        raise ConfigError(f"{path}: not a file of trained weights: {error}") from error
