"""What is learned: the chance to be among the ten that grow most, of so many that are live.

- *The ten highest, not the growth.* Growth has heavy tails; a squared error would spend the model on a few raids. What
  is wanted is a top ten, and the order by the chance to be in it is the best order for overlap@10.
- *Softly.* The tenth and the eleventh hardly differ: the label falls from 1 to 0 around place ten.
- *Of so many.* How many are live changes over the day: with a hundred the top ten are a few exceptions, with thirty
  every third is one. So each moment is a lesson twice: as it is, and dealt into sets of about ``SET_SIZE``, each with
  a top ten of its own (a session stays with its set while their number does). How many there are is a feature.
- *Neighbouring questions too.* Top fives, top eighteens and all three targets are learned by one net: what they share
  is learned from more rows. Only the top-ten heads are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loadtest.replay.growth import TARGETS
from models.growth.features import with_places
from models.growth.rows import Rows

SET_SIZE = 40
MIN_SET = 15
"""Sets with fewer candidates teach nothing: most of them would be among the ten."""
TASKS = (
    *((target, 10.0, 2.5) for target in TARGETS),
    ("viewers", 5.0, 2.0), ("viewers", 18.0, 3.0),
    ("absolute_growth", 5.0, 2.0), ("absolute_growth", 18.0, 3.0),
    ("relative_growth", 5.0, 2.0), ("relative_growth", 18.0, 3.0),
)  # fmt: skip
"""(target, place around which the label falls, over how many places). The first are the heads, in order of TARGETS."""


@dataclass(frozen=True)
class Lessons:
    """What one net learns from: features float32[m, NAMES], labels float32[m, TASKS]."""

    features: NDArray[np.float32]
    labels: NDArray[np.float32]


def lessons(rows: Rows, seed: int) -> Lessons:
    """Every moment whole, and dealt by ``seed`` where that makes a difference. Rows without a truth are among the live,
    but teach nothing."""
    whole, dealt = deal(rows, seed, np.inf), deal(rows, seed, SET_SIZE)
    _, first, moment = np.unique(whole, return_index=True, return_inverse=True)
    split = np.bincount(moment, dealt != dealt[first][moment])[moment] > 0
    parts = [_lessons(rows, live, chosen) for live, chosen in ((whole, np.ones_like(split)), (dealt, split))]
    return Lessons(np.concatenate([p.features for p in parts]), np.concatenate([p.labels for p in parts]))


def _lessons(rows: Rows, live: NDArray[np.int64], chosen: NDArray[np.bool_]) -> Lessons:
    """Of the rows bool[n], all of whose set is among them."""
    known = np.flatnonzero(chosen & np.isfinite(rows.then))
    _, group = np.unique(live[known], return_inverse=True)
    places = {name: place_of(values[known], group) for name, values in rows.targets().items()}
    labels = [1.0 / (1.0 + np.exp((places[target] - (at - 0.5)) / width)) for target, at, width in TASKS]
    enough = np.bincount(group)[group] >= MIN_SET if len(group) else np.zeros(0, np.bool_)
    features = with_places(rows.own, live)[known[enough]]
    return Lessons(features, np.stack(labels, axis=1).astype(np.float32)[enough])


def deal(rows: Rows, seed: int, sets_of: float) -> NDArray[np.int64]:
    """int64[n]: the set of each row; rows of one set are of one moment."""
    draw = np.random.default_rng(seed).random(int(rows.session.max(initial=-1)) + 1)
    _, moment = np.unique(rows.t_s, return_inverse=True)
    # Candidates, not all the live: only they are counted by the truth.
    candidates = np.bincount(moment, np.isfinite(rows.then))
    sets = np.maximum(np.rint(candidates / sets_of), 1).astype(np.int64)
    return moment * (1 + int(sets.max(initial=1))) + (draw[rows.session] * sets[moment]).astype(np.int64)


def place_of(values: NDArray[np.float64], group: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64[n]: place among the values of its group, 0 the highest; of equal values the earlier row is before."""
    order = np.lexsort((-values, group))
    of = group[order]
    index = np.arange(len(of))
    fresh = np.ones(len(of), np.bool_)
    fresh[1:] = of[1:] != of[:-1]
    place = np.empty(len(of), np.int64)
    place[order] = index - np.maximum.accumulate(np.where(fresh, index, 0))
    return place
