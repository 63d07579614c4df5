"""Rule bits: one uint32 per row saying which rules hold, with hysteresis, for any subset of rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kernels import fence
from server.live.columns import Columns
from server.rules.rulebook import BUILT_IN, RuleBook

ENDED, STALE, BLOCKED, SPAM_MARKED, UNASSESSED = (np.uint32(1 << i) for i in range(len(BUILT_IN)))


def assess(
    book: RuleBook,
    feature_names: tuple[str, ...],
    features: NDArray[np.float32],
    reported: NDArray[np.bool_],
    before: NDArray[np.uint32],
) -> NDArray[np.uint32]:
    """The file's rules on n rows; built-in bits are zero in the result.

    A condition on a feature that no producer reports does not hold.

    Args:
        features: float32[n, F]. reported: bool[F], see `FeatureSet.reported`.
        before: uint32[n], bits so far (what hysteresis remembers).

    Returns:
        uint32[n]. Cost: one pass over one feature column per condition.
    """
    bits = np.zeros(len(before), np.uint32)
    column = {name: i for i, name in enumerate(feature_names)}
    for i, rule in enumerate(book.rules.values()):
        bit = np.uint32(1 << (len(BUILT_IN) + i))
        was_on = (before & bit) != 0
        on = np.ones(len(before), np.bool_)
        for condition in rule.when:
            if not reported[column[condition.feature]]:
                on[:] = False
                break
            value = features[:, column[condition.feature]]
            if condition.above is not None:
                on &= (value > condition.above) | (was_on & (value >= condition.until))
            elif condition.below is not None:
                on &= (value < condition.below) | (was_on & (value <= condition.until))
        bits[on] |= bit
    return bits


def built_in(columns: Columns, slots: NDArray[np.int32], now_ms: int) -> NDArray[np.uint32]:
    """The built-in bits but UNASSESSED, uint32[n], straight from the table's columns."""
    state = columns.state[slots]
    moderation = columns.moderation[slots]
    lapsed = (state == fence.SUSPECT) | ((state == fence.LIVE) & (columns.lease_expires_ms[slots] <= now_ms))
    bits = np.zeros(len(slots), np.uint32)
    bits[(state == fence.ENDED) | (state == fence.FREE)] |= ENDED
    bits[lapsed] |= STALE
    bits[(moderation & fence.MODERATED_BLOCKED) != 0] |= BLOCKED
    bits[(moderation & fence.MODERATED_SPAM) != 0] |= SPAM_MARKED
    return bits


def boosts(book: RuleBook, bits: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Sum of the boosts of the rules that hold, float32[n]."""
    total = np.zeros(len(bits), np.float32)
    for i, rule in enumerate(book.rules.values()):
        if rule.boost:
            total[(bits >> np.uint32(len(BUILT_IN) + i)) & np.uint32(1) == 1] += np.float32(rule.boost)
    return total


def count_by_first_rule(book: RuleBook, bits: NDArray[np.uint32]) -> dict[str, int]:
    """How many rows each excluding rule keeps out; a row counts for its first rule only."""
    left = bits & np.uint32(book.exclude_bits)
    left = left[left != 0]  # few: most rows may be shown
    counts = {}
    for i, name in enumerate(book.names):
        hit = (left >> np.uint32(i)) & np.uint32(1) == 1
        counts[name] = int(np.count_nonzero(hit))
        left = left[~hit]
    return counts
