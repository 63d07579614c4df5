"""The documented trend formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from server.errors import ConfigError
from server.scoring.formula import trend_formula

NAMES = ("other", "viewers_mean_1m", "viewers_mean_30m", "likes_per_viewer_5m")
AUDIENCE = st.floats(0, 1e7, width=32)


def score(observed: float, expected: float, likes: float = 0.0) -> float:
    row = np.array([[7.0, observed, expected, likes]], dtype=np.float32)
    return float(trend_formula(row, NAMES)[0])


@given(hnp.arrays(np.float32, st.tuples(st.integers(0, 20), st.just(4)), elements=st.floats(width=32)))
def test_every_input_whatsoever_scores_within_0_and_1(features: np.ndarray) -> None:
    scores = trend_formula(features, NAMES)
    assert scores.dtype == np.float32
    assert scores.shape == (len(features),)
    assert ((scores >= 0) & (scores <= 1)).all()


@given(AUDIENCE, AUDIENCE, AUDIENCE, st.floats(0, 10, width=32))
def test_more_viewers_or_likes_never_score_lower_and_more_expected_never_higher(
    observed: float, expected: float, more: float, likes: float
) -> None:
    base = score(observed, expected, likes)
    assert score(observed + more, expected, likes) >= base
    assert score(observed, expected, likes + more) >= base
    assert score(observed, expected + more, likes) <= base


def test_the_formula_is_the_documented_one() -> None:
    evidence = math.log(1 + (400 - 100) ** 2 / 100) + 0.5 * math.log10(401) + 0.5 * math.log(1 + 10 * 0.2)
    assert score(400, 100, 0.2) == pytest.approx(evidence / (evidence + 4), abs=1e-6)


def test_a_small_stream_that_grows_beats_a_large_one_at_rest() -> None:
    assert score(300, 50) > score(50_000, 50_000)


def test_growth_below_five_viewers_is_no_surprise() -> None:
    assert score(4.9, 0) == score(4.9, 4.9)
    assert score(5.0, 0) > score(5.0, 5.0)


def test_a_missing_feature_is_named() -> None:
    with pytest.raises(ConfigError, match="likes_per_viewer_5m"):
        trend_formula(np.zeros((1, 3), np.float32), NAMES[:3])
