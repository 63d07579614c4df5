"""How good scores are: as probabilities, and as the order of a top ten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from models.dataset import Rows
from models.target import growth_score
from server.scoring.formula import trend_formula

TOP = 10
MIN_VIEWERS = 20
"""Streams below are left out of top tens: relative growth of a handful of viewers is chance."""
MIN_STREAMS = 30
BASELINE_FEATURES = ("viewers", "viewers_gain_5m", "viewers_velocity", "likes_per_viewer_5m")


def auc(scores: NDArray[np.floating], labels: NDArray[np.bool_]) -> float:
    """Chance that a positive scores above a negative; ties count half. NaN with one class only."""
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2.0
    return float((mean_rank[inverse][labels].sum() - positives * (positives + 1) / 2) / positives / negatives)


def log_loss(probabilities: NDArray[np.floating], labels: NDArray[np.bool_]) -> float:
    """Mean negative log likelihood, nats."""
    p = np.clip(probabilities.astype(np.float64), 1e-7, 1.0 - 1e-7)
    return float(-np.where(labels, np.log(p), np.log1p(-p)).mean())


def calibration_error(probabilities: NDArray[np.floating], labels: NDArray[np.bool_], bins: int = 10) -> float:
    """Expected calibration error: mean |share of positives - mean probability| over equally wide bins."""
    which = np.minimum((probabilities * bins).astype(np.int64), bins - 1)
    gap = np.bincount(which, labels.astype(np.float64) - probabilities.astype(np.float64), bins)
    return float(np.abs(gap).sum() / len(labels))


def overlap(scores: NDArray[np.floating], truth: NDArray[np.floating], k: int = TOP) -> float:
    """Share of the ``k`` truly largest among the ``k`` best scored; float[n] each, ties by place."""
    k = min(k, len(truth))
    best = np.argsort(-scores, kind="stable")[:k]
    true = np.argsort(-truth, kind="stable")[:k]
    return len(np.intersect1d(best, true)) / k


def growths(rows: Rows) -> dict[str, NDArray[np.float64]]:
    """What grew, float64[n] by kind of growth; a fraud never grew."""
    now, later = rows.viewers_now, rows.viewers_later
    kinds = {
        "absolute": (later - now).astype(np.float64),
        "relative": (later - now) / np.maximum(now, 1),
        "target": growth_score(now, later),
    }
    return {name: np.where(rows.honest, value, -np.inf) for name, value in kinds.items()}


def mean_overlaps(rows: Rows, scores: Mapping[str, NDArray[np.floating]]) -> dict[str, dict[str, float]]:
    """Mean overlap@10 over all minutes with enough streams: by score, then by kind of growth.

    "chance" is what random orders would reach.
    """
    truths = growths(rows)
    found: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in truths} for name in scores}
    chance = []
    for moment in rows.moments():
        big = rows.viewers_now[moment] >= MIN_VIEWERS
        if big.sum() < MIN_STREAMS:
            continue
        chance.append(TOP / float(big.sum()))
        for kind, truth in truths.items():
            for name, score in scores.items():
                found[name][kind].append(overlap(score[moment][big], truth[moment][big]))
    means = {name: {kind: _mean(values) for kind, values in by.items()} for name, by in found.items()}
    means["chance"] = dict.fromkeys(truths, _mean(chance))
    return means


def baselines(rows: Rows, names: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """Scores float32[n] that need no model."""
    single = {name: rows.features[:, list(names).index(name)] for name in BASELINE_FEATURES}
    return {**single, "trend_formula": trend_formula(rows.features, names)}


def report(rows: Rows, probabilities: NDArray[np.float32], names: Sequence[str]) -> dict[str, object]:
    """All metrics of one test set; probabilities float32[n] are the model's."""
    scores: dict[str, NDArray[np.floating]] = {"model": probabilities, **baselines(rows, names)}
    return {
        "rows": len(rows),
        "positives": float(rows.label.mean()),
        "auc": {name: auc(score, rows.label) for name, score in scores.items()},
        "log_loss": log_loss(probabilities, rows.label),
        "log_loss_of_base_rate": log_loss(np.full(len(rows), rows.label.mean()), rows.label),
        "calibration_error": calibration_error(probabilities, rows.label),
        "overlap_at_10": mean_overlaps(rows, scores),
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
