"""How good a ranker is on impressions that it has not seen: as probabilities, as orders, in money, by segment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.evaluation import auc, calibration_error, log_loss
from models.evaluation_ranking import Interval, best_of, bootstrap, bootstrap_mean, ndcg, snips
from models.impressions import Impressions
from server.scoring.ranker_schema import HEADS

KEPT = 5
"""Of each slate so many are kept when orders are compared by money: what a smaller screen would have shown."""
Scores = Mapping[str, NDArray[np.floating]]

_LABELS = {"click": "clicked", "watch": "watched", "purchase": "purchased", "report": "reported"}


def head_metrics(rows: Impressions, probabilities: NDArray[np.floating]) -> dict[str, dict[str, Any]]:
    """By head: base rate, AUC, log loss, calibration error, with 95 % intervals over resampled askings.

    Args:
        probabilities: float[R, 4], with the effect of each row's place: labels have it, too.
    """
    found = {}
    for column, head in enumerate(HEADS):
        p, y = probabilities[:, column], getattr(rows, _LABELS[head])
        statistics = {
            "auc": lambda r, p=p, y=y: auc(p[r], y[r]),
            "log_loss": lambda r, p=p, y=y: log_loss(p[r], y[r]),
            "calibration_error": lambda r, p=p, y=y: calibration_error(p[r], y[r]),
        }
        found[head] = {
            "rate": float(y.mean()), "log_loss_of_base_rate": log_loss(np.full(len(y), y.mean()), y),
            **{name: asdict(bootstrap(f, rows.asking, 100)) for name, f in statistics.items()},
        }  # fmt: skip
    return found


def order_metrics(rows: Impressions, scores: Scores, examined: NDArray[np.floating]) -> dict[str, dict[str, Any]]:
    """By score: NDCG@10 of clicks, and purchase value per impression of the KEPT best of each slate.

    Both as if all places were looked at alike: what was bought or clicked at a place that is looked at half as often
    counts twice. Also the difference in value to the first score, with the same askings resampled for both.

    Args:
        scores: float[R] each, higher is better. examined: float[R], how likely each row's place is looked at.
    """
    gains = rows.clicked / examined
    by_asking = {name: _value(rows, score, examined) for name, score in scores.items()}
    reference = next(iter(by_asking))
    found = {}
    for name, score in scores.items():
        found[name] = {
            "ndcg10": asdict(bootstrap_mean(ndcg(score, gains, rows.asking))),
            "value_per_impression": asdict(_ratio(by_asking[name])),
        }
        if name != reference:
            found[name][f"value_minus_{reference}"] = asdict(_difference(by_asking[name], by_asking[reference]))
    return found


def off_policy(rows: Impressions, scores: Scores, values: NDArray[np.floating]) -> dict[str, dict[str, Any]]:
    """SNIPS of policies that keep an explored stream if it is in the better half of its slate by a score.

    Only explored impressions are looked at: they alone were drawn by chance, with a logged propensity.

    Args:
        values: float[R], what an impression was worth.
    """
    found = {}
    sizes = np.bincount(rows.asking, minlength=int(rows.asking.max(initial=0)) + 1)
    for name, score in scores.items():
        kept = np.zeros(len(rows))
        for size in np.unique(sizes[sizes > 0]).tolist():
            some = np.flatnonzero(sizes[rows.asking] == size)
            kept[some] = best_of(score[some], rows.asking[some], size // 2)
        estimate = snips(values, rows.propensity, kept, rows.asking)
        found[name] = {**asdict(estimate.reward), "effective_rows": estimate.effective_rows}
    return found


def segment_table(
    rows: Impressions, probabilities: NDArray[np.floating], segments: Mapping[str, NDArray[np.bool_]]
) -> list[dict[str, Any]]:
    """One entry per segment: name, rows, and of each head the rate, the mean probability and the AUC."""
    found = []
    for name, which in segments.items():
        entry: dict[str, Any] = {"segment": name, "rows": int(which.sum())}
        for column, head in enumerate(HEADS):
            p, y = probabilities[which, column], getattr(rows, _LABELS[head])[which]
            entry[head] = {
                "rate": float(y.mean()) if len(y) else float("nan"),
                "mean": float(p.mean()) if len(y) else float("nan"),
                "auc": auc(p, y) if len(y) else float("nan"),
            }
        found.append(entry)
    return found


def calibration_curve(
    probabilities: NDArray[np.floating], labels: NDArray[np.bool_], bins: int = 10
) -> list[tuple[float, float, int]]:
    """(mean probability, share of positives, rows) of equally many rows each, from the lowest probability up."""
    order = np.argsort(probabilities, kind="stable")
    parts: Sequence[NDArray[np.int64]] = [part for part in np.array_split(order, bins) if len(part)]
    return [(float(probabilities[p].mean()), float(labels[p].mean()), len(p)) for p in parts]


def place_errors(found: NDArray[np.floating], planted: NDArray[np.floating]) -> dict[str, float]:
    """How far a position effect is from the planted one, float[P] each, of places 1 … P.

    exponent and planted_exponent: of the power laws place ** -exponent that fit them best (log by log).
    """
    at = np.log(np.arange(1, len(found) + 1))
    relative = np.abs(found / planted - 1.0)
    return {
        "exponent": float(-(at @ np.log(found)) / (at @ at)),
        "planted_exponent": float(-(at @ np.log(planted)) / (at @ at)),
        "mean_relative_error": float(relative.mean()), "largest_relative_error": float(relative.max()),
    }  # fmt: skip


def _value(
    rows: Impressions, score: NDArray[np.floating], examined: NDArray[np.floating]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """By asking: value of the KEPT best scored impressions, undone of the effect of places, and their number."""
    kept = best_of(score, rows.asking, KEPT)
    _, asking = np.unique(rows.asking, return_inverse=True)
    n = int(asking.max()) + 1
    value = np.bincount(asking[kept], rows.value[kept] / examined[kept], n)
    return value, np.bincount(asking[kept], minlength=n).astype(np.float64)


def _ratio(parts: tuple[NDArray[np.float64], NDArray[np.float64]]) -> Interval:
    value, n = parts
    return bootstrap(lambda r: float(value[r].sum() / n[r].sum()), np.arange(len(n)), 1_000)


def _difference(
    one: tuple[NDArray[np.float64], NDArray[np.float64]], other: tuple[NDArray[np.float64], NDArray[np.float64]]
) -> Interval:
    def statistic(r: NDArray[np.int64]) -> float:
        return float(one[0][r].sum() / one[1][r].sum() - other[0][r].sum() / other[1][r].sum())

    return bootstrap(statistic, np.arange(len(one[1])), 1_000)
