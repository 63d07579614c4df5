"""Declared features and rules as small tables, so that one kernel can evaluate any declaration.

Whoever owns a declaration compiles it (`FeatureSet.program`, `RuleBook.program`); the GPU's kernels read the tables.
Needs NumPy only.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels.counters import HALF_LIVES_MS

N_BUILT_IN = 5
"""Rule bits below this are set from the table: ended, stale, blocked, spam_marked, unassessed."""


class Op(IntEnum):
    """What a feature is; which codes it reads stands behind it."""

    AGE = 0  # -
    STALENESS = 1  # -
    GAUGE = 2  # STALE_AFTER_MS
    LEVEL = 3  # OF, FAST
    VELOCITY = 4  # OF, FAST, SLOW
    ACCELERATION = 5  # OF, FAST, MID, SLOW
    DIFFERENCE = 6  # OF, FAST, SLOW
    RATIO = 7  # OF, PER, FAST
    PER_VIEWER = 8  # OF, FAST
    UNIQUE = 9  # OF: 0 viewers, 1 chatters
    ATTRIBUTE = 10  # OF: place in ATTRIBUTES


class Code(IntEnum):
    """Columns of `FeatureProgram.codes`. Counters and half-lives by their place in kernels.counters."""

    OP = 0
    OF = 1
    PER = 2
    FAST = 3
    MID = 4
    SLOW = 5
    STALE_AFTER_MS = 6


class Number(IntEnum):
    """Columns of `FeatureProgram.numbers`."""

    MISSING = 0
    PRIOR = 1


ATTRIBUTES = ("age_rating", "language", "category")


class FeatureProgram(NamedTuple):
    """F features. codes: int64[F, 7], columns `Code`. numbers: float32[F, 2], columns `Number`."""

    codes: NDArray[np.int64]
    numbers: NDArray[np.float32]


class RuleProgram(NamedTuple):
    """R rules of a file, M conditions in the order of the rules; R and M may be 0.

    starts: int32[R + 1], conditions of rule r are starts[r] up to starts[r + 1]. features: int32[M].
    above: uint8[M], 1 where the value must be above, 0 below. enters, leaves: float32[M], the condition's
    threshold and its ``until``. boosts: float32[R].
    """

    starts: NDArray[np.int32]
    features: NDArray[np.int32]
    above: NDArray[np.uint8]
    enters: NDArray[np.float32]
    leaves: NDArray[np.float32]
    boosts: NDArray[np.float32]


PER_MINUTE = tuple(float(np.float32(math.log(2) * 60.0 / (h // 1000))) for h in HALF_LIVES_MS)
"""A constant rate r per minute gives a decayed sum of r / PER_MINUTE in the end, per half-life; float32 values."""
