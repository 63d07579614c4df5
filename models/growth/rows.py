"""Every minute of a history as rows: what was known then, what the formulas said, and what came.

The definitions of who can be ranked and of the truth are those of `loadtest.replay.growth`. Its bins of 5 minutes
are every minute here: neighbours tell nearly the same, but only nearly, and the intervals account for it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loadtest.replay.formulas import Formulas
from loadtest.replay.growth import AHEAD_S, MIN_VIEWERS, TARGETS, Reports
from loadtest.replay.reader import History
from loadtest.replay.sessions import split_sessions
from models.growth.features import OwnFeatures

MOMENT_S = 60
SILENCE_S = 1_200
"""After this long without a report a session is over, as in ``liverank replay``."""
TRAIN_SHARE = 0.7


@dataclass(frozen=True)
class Rows:
    """n rows by moment, then session (the one that began earlier first): who can be ranked at that moment.

    t_s int64[n]; session int32[n]; own float32[n, OWN]; now float64[n]: viewers; then float64[n]: viewers 15 minutes
    later, NaN where the session is not readable then, or the file is over. formulas: name → float64[n].
    """

    t_s: NDArray[np.int64]
    session: NDArray[np.int32]
    own: NDArray[np.float32]
    now: NDArray[np.float64]
    then: NDArray[np.float64]
    formulas: dict[str, NDArray[np.float64]]

    def __len__(self) -> int:
        return len(self.t_s)

    def take(self, which: NDArray[np.bool_]) -> Rows:
        """The rows where bool[n] is True."""
        formulas = {name: score[which] for name, score in self.formulas.items()}
        columns = (self.t_s, self.session, self.own, self.now, self.then)
        return Rows(*(column[which] for column in columns), formulas)

    def targets(self) -> dict[str, NDArray[np.float64]]:
        """Name → float64[n], as `loadtest.replay.growth` has them; NaN where ``then`` is."""
        return dict(zip(TARGETS, (self.then, self.then - self.now, self.then / self.now - 1.0)))


def rows_of(history: History) -> Rows:
    """Rows of every full minute from which the history reaches 15 minutes on."""
    reports = Reports(history, split_sessions(history, SILENCE_S))
    formulas, own = Formulas(reports, history.has_likes), OwnFeatures(reports)
    first_s, last_s = int(history.t_s[0]), int(history.t_s[-1])
    found: list[tuple[NDArray[np.generic], ...]] = []
    names: tuple[str, ...] = ()
    for t_s in range(-(-first_s // MOMENT_S) * MOMENT_S, last_s - AHEAD_S + 1, MOMENT_S):
        scores = formulas.scores(t_s)  # at every moment: one of them remembers
        names = tuple(scores)
        at, at_then = reports.last(t_s), reports.last(t_s + AHEAD_S)
        rankable = reports.readable(t_s, at) & (reports.value(reports.viewers, at) >= MIN_VIEWERS)
        of = np.flatnonzero(rankable)
        if not len(of):
            continue
        lasts = reports.readable(t_s + AHEAD_S, at_then)[of]
        then = np.where(lasts, reports.value(reports.viewers, at_then[of]), np.nan)
        columns = (np.full(len(of), t_s), of.astype(np.int32), own.at(t_s, of), reports.viewers[at[of]], then)
        found.append((*columns, *(score[of] for score in scores.values())))
    if not found:
        nothing = np.zeros(0)
        return Rows(nothing.astype(np.int64), nothing.astype(np.int32), own.at(0, np.zeros(0, np.int64)), nothing,
                    nothing, {})  # fmt: skip
    t, session, features, now, then_, *scored = (np.concatenate(column) for column in zip(*found))
    return Rows(t, session, features, now, then_, dict(zip(names, scored)))


def cut_s(history: History) -> int:
    """The moment (s of the file's clock) that ends the first ``TRAIN_SHARE`` of the file's time."""
    first_s, last_s = int(history.t_s[0]), int(history.t_s[-1])
    return first_s + int(TRAIN_SHARE * (last_s - first_s))


def digest(path: Path) -> str:
    """sha256 of the file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
