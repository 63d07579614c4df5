"""The documented trend formula: what ranks streams when no model does. Needs only the features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from server.errors import ConfigError

OBSERVED = "viewers_mean_1m"
EXPECTED = "viewers_mean_30m"
LIKES = "likes_per_viewer_5m"

MIN_OBSERVED = 5.0  # fewer viewers than this are no trend, however fast they grew
SURPRISE_WEIGHT, LEVEL_WEIGHT, LIKES_WEIGHT = 1.0, 0.5, 0.5
HALF_SCORE = 4.0  # this much weighted evidence scores 0.5
LIMIT = 1e9  # above every real audience; keeps the arithmetic finite


@dataclass(frozen=True)
class FormulaColumns:
    """Where the formula finds its three features in a row of F."""

    observed: int
    expected: int
    likes: int


def formula_columns(names: Sequence[str]) -> FormulaColumns:
    """Resolves the feature names once. Raises ConfigError naming the features that are missing."""
    missing = [name for name in (OBSERVED, EXPECTED, LIKES) if name not in names]
    if missing:
        raise ConfigError(f"features: the trend formula needs {', '.join(missing)}")
    return FormulaColumns(names.index(OBSERVED), names.index(EXPECTED), names.index(LIKES))


def trend_formula(features: NDArray[np.float32], names: Sequence[str]) -> NDArray[np.float32]:
    """Trend score of every row.

    Mastodon's trend surprise, weakened to its logarithm, plus a little level and a little affection::

        o = viewers_mean_1m     e = max(viewers_mean_30m, 1)     l = likes_per_viewer_5m
        surprise = (o - e)^2 / e   if o >= 5 and o > e, else 0
        evidence = ln(1 + surprise) + 0.5 * log10(1 + o) + 0.5 * ln(1 + 10 * l)
        score    = evidence / (evidence + 4)

    Surprise finds what grows, in units of what chance explains; the level breaks ties between streams at
    rest (it alone misses growth); likes per viewer was the best simple predictor of relative growth.
    The score rises with o and with l, falls with e. It is an order, not a calibrated probability.

    Source: Mastodon, app/models/trends/links.rb and tags.rb (``(observed - expected)**2 / expected``).

    Args:
        features: float32[n, F]. Non-finite and negative values count as 0, +inf as a very large number.
        names: the F feature names, in order.

    Returns:
        float32[n] in [0, 1], never NaN.

    Raises:
        ConfigError: a needed feature is not in ``names``.
    """
    columns = formula_columns(names)
    observed = _clean(features[:, columns.observed])
    expected = np.maximum(_clean(features[:, columns.expected]), 1.0)
    likes = _clean(features[:, columns.likes])
    growth = np.where(observed >= MIN_OBSERVED, np.maximum(observed - expected, 0.0), 0.0)
    evidence = (
        SURPRISE_WEIGHT * np.log1p(growth * growth / expected)
        + LEVEL_WEIGHT * np.log10(1.0 + observed)
        + LIKES_WEIGHT * np.log1p(10.0 * likes)
    )
    score: NDArray[np.float32] = (evidence / (evidence + HALF_SCORE)).astype(np.float32)
    return score


def _clean(column: NDArray[np.float32]) -> NDArray[np.float64]:
    """float64[n] in [0, LIMIT]."""
    finite = np.nan_to_num(column.astype(np.float64), nan=0.0, posinf=LIMIT, neginf=0.0)
    return np.clip(finite, 0.0, LIMIT)
