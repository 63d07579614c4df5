"""What a training was: enough to do it again, and to see whether it came out the same."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loadtest.revision import code_commit
from models.export import without_nan
from models.training import Course

FORMAT = "liverank-experiment/1"
FILE = "experiment.json"


def metrics_hash(metrics: Any) -> str:
    """16 hex digits: equal for equal metrics, to the last bit."""
    text = json.dumps(without_nan(metrics), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def record(
    name: str,
    *,
    data_hash: str,
    feature_schema: str,
    settings: Mapping[str, Any],
    parameters: int,
    course: Course,
    metrics: Mapping[str, Any],
    **more: Any,
) -> dict[str, Any]:
    """An experiment as JSON. parameters: numbers that were learned. more: what else belongs to this model.

    Nothing in it depends on when or how fast it ran; versions and commit may differ between equal results.
    """
    return {
        "format": FORMAT,
        "model": name,
        "commit": code_commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "data_hash": data_hash,
        "feature_schema": feature_schema,
        "settings": dict(settings),
        "parameters": parameters,
        "best_epoch": course.best,
        "epochs": [{"train_loss": e.train_loss, "held_out_loss": e.held_out_loss} for e in course.epochs],
        "metrics": dict(metrics),
        "metrics_hash": metrics_hash(metrics),
        **more,
    }


def write(folder: Path, experiment: Mapping[str, Any]) -> Path:
    """Into ``folder``, beside the weights; returns the file."""
    path = folder / FILE
    path.write_text(json.dumps(without_nan(experiment), indent=2, sort_keys=True, allow_nan=False) + "\n")
    return path
