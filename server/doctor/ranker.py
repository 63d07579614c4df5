"""The ranker: built for these features and embeddings, and ranks one request's candidates within its deadline."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING

from server.doctor import model
from server.doctor.base import Context, Finding, fail, ok, warn
from server.errors import BadScores, ConfigError, SchemaMismatch, ScorerTimeout, ScorerUnavailable, ScoringError

if TYPE_CHECKING:
    from server.scoring.ranker import Ranker

WITHOUT = "without it, replies are ranked by stream-level scores and say so"


def ranker(context: Context) -> Iterator[Finding]:
    """Loads or reaches the ranker, if there is to be one, compares its schemas, and ranks one request's candidates."""
    if not context.settings.ranker.model:
        return
    try:
        n_features = len(context.features)
    except (ConfigError, UnicodeDecodeError):
        yield warn("ranker.scores", "not checked: the feature file is broken", "Mend files.features first.")
        return
    with closing(_opened(context, n_features)) as opened:
        yield _ranked(context, opened, n_features)


def _opened(context: Context, n_features: int) -> Ranker:
    # As server.app.open_ranker, which would load all of the server.
    scoring, name = context.settings.scoring, context.settings.ranker.model
    sizes = (context.features.schema, n_features, context.settings.table.embedding_dim)
    if scoring.mode == "triton":
        from server.scoring.ranker_triton import TritonRanker

        return TritonRanker(scoring.triton_address, name, *sizes)
    from server.scoring.ranker_local import LocalRanker

    return LocalRanker(scoring.model_repository, name, *sizes)


def _ranked(context: Context, opened: Ranker, n_features: int) -> Finding:
    from server.scoring.ranker_schema import empty_inputs

    settings = context.settings.ranker
    inputs = empty_inputs(settings.candidates, n_features, context.settings.table.embedding_dim)
    try:
        opened.heads(inputs, model.FIRST_CALL_S)
        begun_s = time.monotonic()
        heads = opened.heads(inputs, model.FIRST_CALL_S)
        took_ms = (time.monotonic() - begun_s) * 1e3
    except ScoringError as error:
        return fail("ranker.scores", f"{error}; {WITHOUT}", _mend(context, error))
    told = f"{heads.model_version} ranks {settings.candidates} candidates in {took_ms:.1f} ms"
    if took_ms > settings.deadline_ms:
        return warn(
            "ranker.scores",
            f"{told}; ranker.deadline_ms is {settings.deadline_ms}",
            "Raise ranker.deadline_ms, lower ranker.candidates, or give the model more cores.",
        )
    return ok("ranker.scores", told)


def _mend(context: Context, error: ScoringError) -> str:
    scoring, name = context.settings.scoring, context.settings.ranker.model
    if isinstance(error, SchemaMismatch):
        return "Train a ranker for these features and table.embedding_dim (`make train`), or correct ranker.model."
    if isinstance(error, ScorerTimeout):
        return "The model server hangs or is overloaded: see its log, restart it."
    if isinstance(error, BadScores):
        return f"The ranker is not what the exporter writes: make it again with `make train` ({name})."
    if scoring.mode == "triton" and isinstance(error, ScorerUnavailable):
        return f"Load {name} in Triton (explicit model control), or correct scoring.triton_address; see Triton's log."
    return (
        f"Put <version>/model.onnx and config.pbtxt into {scoring.model_repository / name} (`make train` writes them), "
        "correct scoring.model_repository and ranker.model, or leave ranker.model empty."
    )
