"""The model: built for these features, and scores a row. A server without one ranks by formula instead."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING

from server.doctor.base import Context, Finding, fail, ok, warn
from server.errors import (
    BadScores,
    ConfigError,
    SchemaMismatch,
    ScorerTimeout,
    ScorerUnavailable,
    ScoringError,
)

if TYPE_CHECKING:
    from server.scoring.base import Scorer

FIRST_CALL_S = 10.0
"""The first call also connects or loads, and checks the model's configuration."""
CONNECT_S = 2.0
WITHOUT = "without it, replies are ranked by formula and say so"


def model(context: Context) -> Iterator[Finding]:
    """Loads or reaches the configured model, compares its feature schema, scores one row, twice."""
    try:
        features = context.features
    except (ConfigError, UnicodeDecodeError):
        yield warn("model.scores", "not checked: the feature file is broken", "Mend files.features first.")
        return
    scoring = context.settings.scoring
    if scoring.mode == "triton":
        reached, told = _reached(scoring.triton_address)
        if not reached:
            yield fail(
                "model.reachable",
                f"Triton at {scoring.triton_address}: {told}; {WITHOUT}",
                "Start it (triton/setup.sh && python triton/run.py --model-repository model_repository --load "
                f"{scoring.model_name}), correct scoring.triton_address, or set scoring.mode to local.",
            )
            return
        yield ok("model.reachable", f"{scoring.triton_address} accepts connections")
    with closing(_scorer(context)) as scorer:
        yield _scored(context, scorer, len(features))


def _scorer(context: Context) -> Scorer:
    # As in server.app, which would load all of the server.
    scoring, features = context.settings.scoring, context.features
    if scoring.mode == "triton":
        from server.scoring.transport import open_transport
        from server.scoring.triton import TritonScorer

        tensors = open_transport(scoring.transport, scoring.triton_address)
        return TritonScorer(scoring.triton_address, scoring.model_name, features.schema, len(features), tensors)
    from server.scoring.local import LocalScorer

    return LocalScorer(scoring.model_repository, scoring.model_name, features.schema, len(features))


def _scored(context: Context, scorer: Scorer, n_features: int) -> Finding:
    import numpy as np

    scoring = context.settings.scoring
    row = np.zeros((1, n_features), np.float32)
    try:
        scorer.score(row, FIRST_CALL_S)
        begun_s = time.monotonic()
        scores = scorer.score(row, FIRST_CALL_S)
        took_ms = (time.monotonic() - begun_s) * 1e3
    except ScoringError as error:
        return fail("model.scores", f"{error}; {WITHOUT}", _mend(context, error))
    value = float(scores.values[0])
    model = f"{scores.model_version} ({scorer.name}, tensors {scorer.transport})"
    told = f"{model}, schema {context.features.schema}, scores a row {value:.3f}"
    if not np.isfinite(value):
        return fail("model.scores", f"{told}: not a finite number", _mend(context, BadScores("")))
    if took_ms > scoring.deadline_ms:
        return warn(
            "model.scores",
            f"{told} in {took_ms:.0f} ms; scoring.deadline_ms is {scoring.deadline_ms}",
            "Raise scoring.deadline_ms, or give the model more cores.",
        )
    return ok("model.scores", f"{told} in {took_ms:.1f} ms")


def _mend(context: Context, error: ScoringError) -> str:
    scoring = context.settings.scoring
    place = scoring.model_repository / scoring.model_name
    if isinstance(error, SchemaMismatch):
        return (
            "Train a model for these features (`make train`), or set table.features_file to the one that the "
            f"model was trained with ({scoring.model_name})."
        )
    if isinstance(error, ScorerTimeout):
        return "The model server hangs or is overloaded: see its log, restart it."
    if isinstance(error, BadScores):
        return f"The model is not what the exporter writes: make it again with `make train` ({scoring.model_name})."
    if scoring.mode == "triton" and isinstance(error, ScorerUnavailable):
        return f"Load {scoring.model_name} in Triton (explicit model control: unload, then load it); see Triton's log."
    return (
        f"Put <version>/model.onnx and config.pbtxt into {place} (`make train` writes them), or correct "
        "scoring.model_repository and scoring.model_name."
    )


def _reached(address: str) -> tuple[bool, str]:
    """Whether something listens at "host:port", and what was found otherwise."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return False, "scoring.triton_address must be host:port"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        return False, f"not reachable ({error})"
    return True, ""
