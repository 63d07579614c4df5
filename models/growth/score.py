"""From rows to scores: what a kind of model is given, and what its answer means."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from models.growth import outlook
from models.growth.features import with_places
from models.growth.rows import Rows

PLACES, OUTLOOK = "places", "outlook"
"""What a recipe learns: the chance to be among the next ten (`labels`), or what may become of a stream (`outlook`)."""

Predict = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def features_of(rows: Rows, learns: str = PLACES) -> NDArray[np.float32]:
    """float32[n, NAMES]: a stream's place is the one among all that can be ranked at its moment; of an outlook
    float32[n, OWN]: the stream's own."""
    return rows.own if learns == OUTLOOK else with_places(rows.own, rows.t_s)


def scores_of(predict: Predict, learns: str, rows: Rows) -> NDArray[np.float32]:
    """float32[n, TARGETS] of rows that hold whole moments; higher is earlier in the order of its moment.

    Args:
        predict: features → the model's answer.
    """
    answer = predict(features_of(rows, learns))
    return outlook.scores(answer, rows.now, rows.t_s) if learns == OUTLOOK else answer
