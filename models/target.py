"""What "trending" means: the one definition that training, evaluation and every report share.

A stream is **trending** at minute t if, ``HORIZON_MINUTES`` later, its growth score

    g = (v(t + 5 min) - v(t)) / sqrt(v(t) + 20)

is among the largest ``TOP_SHARE`` of all streams live at t, is above 0, and the stream is no fraud. v counts
people (not bots) watching; it is 0 once a stream has ended.

Why so:

- *Growth, not size.* Who is large now is large in five minutes; a list of the largest needs no model and
  nearly fails to find what grows.
- *Between absolute and relative.* Absolute growth is only ever won by the largest streams, relative growth
  by streams of three viewers who become six. People come and go roughly as a Poisson process, whose
  deviation is the root of its size: g is growth in units of chance. The 20 keeps single visitors of tiny
  streams from counting as a trend.
- *Five minutes.* Long enough that a recommendation made now still pays, short enough that today's signals
  (joins, chats, likes) know something about it.
- *A share of those live, not a threshold.* In the evening everything grows. Which streams grow more than the
  others is the same question at any hour, so the probability stays calibrated and comparable. A tenth: with
  a fifth, most positives are small ups, and the model learns to be sure of those rather than to find the top.
- *Above 0.* When nearly everything shrinks, the best of the bad is not a trend. (A higher floor made the base
  rate depend on how fast crowds turn over on a platform, and the calibration with it.)
- *No fraud.* A stream with bought viewers or spammed chat is never a positive, so what tells it apart from
  honest ones counts against it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

HORIZON_MINUTES = 5
TOP_SHARE = 0.1
PRIOR_VIEWERS = 20.0


def growth_score(now: NDArray[np.int64], later: NDArray[np.int64]) -> NDArray[np.float64]:
    """g float64[n] of people watching now and one horizon later, int64[n] each."""
    return np.asarray((later - now) / np.sqrt(now + PRIOR_VIEWERS))


def is_trending(now: NDArray[np.int64], later: NDArray[np.int64], honest: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """bool[n] for all n streams that are live at one moment.

    The share is taken of the honest ones, rounded down; ties at its edge are all in.
    """
    score = np.where(honest, growth_score(now, later), -np.inf)
    wanted = int(TOP_SHARE * int(honest.sum()))
    if wanted == 0:
        return np.zeros(len(now), np.bool_)
    edge = np.partition(score, len(score) - wanted)[len(score) - wanted]
    return np.asarray((score >= edge) & (score > 0.0))
