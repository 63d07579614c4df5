"""Rule bits and boosts on the GPU against `server.rules.bits`, through hysteresis and for every built-in bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kernels import fence
from kernels.rules_gpu import UNASSESSED, RowState, RuleTables, assess, refresh_built_in
from server.config import RankSettings, TableSettings
from server.live.columns import Columns
from server.live.features import FeatureSet
from server.rules import bits
from server.rules.rulebook import MAX_RULES, Condition, Rule, RuleBook
from tests.device import get, put

NOW_MS = 1_760_000_000_000
SHIPPED_FEATURES = FeatureSet.load(TableSettings().features_file).names
SHIPPED = RuleBook.load(RankSettings().rules_file, SHIPPED_FEATURES)
NAMES = ("x", "y", "z")


def random_table(rng: np.random.Generator, rows: int) -> Columns:
    """Every state, with leases before, at and after now, and every moderation."""
    c = Columns.allocate(rows, np.zeros((rows, 4), np.float32))
    c.state[:] = rng.choice([fence.FREE, fence.LIVE, fence.LIVE, fence.SUSPECT, fence.ENDED], rows)
    c.lease_expires_ms[:] = NOW_MS + rng.integers(-1, 2, rows)
    c.moderation[:] = rng.integers(0, 4, rows)
    return c


def row_state(columns: Columns) -> RowState:
    return RowState(put(columns.state), put(columns.lease_expires_ms), put(columns.moderation))


def tables(book: RuleBook, names: tuple[str, ...], reported: NDArray[np.bool_]) -> RuleTables:
    return RuleTables(*(put(column) for column in book.program(names)), put(reported))


class Both:
    """Rule bits and boosts kept on both sides."""

    def __init__(self, book: RuleBook, names: tuple[str, ...], columns: Columns) -> None:
        self.book, self.names, self.columns = book, names, columns
        self.bits = np.full(len(columns.state), bits.UNASSESSED, np.uint32)
        self.boost = np.zeros(len(columns.state), np.float32)
        self.device_bits, self.device_boost = put(self.bits), put(self.boost)

    def assess(self, values: NDArray[np.float32], slots: NDArray[np.int32] | None, reported: NDArray[np.bool_]) -> None:
        at = np.arange(len(values), dtype=np.int32) if slots is None else slots
        found = bits.assess(self.book, self.names, values, reported, self.bits[at])
        self.bits[at] = found | bits.built_in(self.columns, at, NOW_MS)
        self.boost[at] = bits.boosts(self.book, found)
        assess(
            put(values), None if slots is None else put(slots), tables(self.book, self.names, reported),
            row_state(self.columns), now_ms=NOW_MS, rule_bits=self.device_bits, boost=self.device_boost,
        )  # fmt: skip
        self.check()

    def check(self) -> None:
        assert np.array_equal(get(self.device_bits).view(np.uint32), self.bits)
        assert np.array_equal(get(self.device_boost), self.boost)


def values_near(book: RuleBook, names: tuple[str, ...], rng: np.random.Generator, rows: int) -> NDArray[np.float32]:
    """Features at, beside and between the thresholds of the rules, so that bits change and stay."""
    values = np.zeros((rows, len(names)), np.float32)
    for f, name in enumerate(names):
        edges = [0.0, *(e for r in book.rules.values() for c in r.when if c.feature == name
                        for e in (c.above, c.below, c.until) if e is not None)]  # fmt: skip
        near = np.float32(rng.choice(edges, rows)) + rng.choice([-1.0, 0.0, 1.0], rows) * rng.choice(
            [0.0, 1e-3, 9], rows
        )
        values[:, f] = near
    return values


def test_the_shipped_rules_give_the_same_bits_and_boosts_as_features_go_up_and_down() -> None:
    rng = np.random.default_rng(0)
    both = Both(SHIPPED, SHIPPED_FEATURES, random_table(rng, 150))
    held = np.zeros(150, np.uint32)
    for _ in range(6):
        reported = rng.random(len(SHIPPED_FEATURES)) < 0.97
        both.assess(values_near(SHIPPED, SHIPPED_FEATURES, rng, 150), None, reported)
        held |= both.bits
    every_rule = ((1 << len(SHIPPED.rules)) - 1) << 5
    most = np.bitwise_or.reduce(held) & every_rule
    assert bin(most).count("1") >= len(SHIPPED.rules) - 1, "view_bots, with five conditions, may not have been met"
    assert not (both.bits & bits.UNASSESSED).any()


def test_some_rows_in_any_order_leave_the_others_unassessed() -> None:
    rng = np.random.default_rng(1)
    both = Both(SHIPPED, SHIPPED_FEATURES, random_table(rng, 40))
    slots = rng.permutation(40)[:17].astype(np.int32)
    both.assess(values_near(SHIPPED, SHIPPED_FEATURES, rng, 17), slots, np.ones(len(SHIPPED_FEATURES), np.bool_))
    assert np.count_nonzero(both.bits == bits.UNASSESSED) == 23
    assert int(bits.UNASSESSED) == UNASSESSED


_CONDITION = st.builds(
    lambda feature, above, edge, gap: Condition(
        feature=feature, until=edge - gap if above else edge + gap, **{"above" if above else "below": edge}
    ),
    st.sampled_from(NAMES), st.booleans(), st.integers(-2, 2).map(float), st.sampled_from([0.0, 1.0, 2.5]),
)  # fmt: skip
_RULE = st.builds(
    lambda when, exclude, boost: Rule(when=tuple(when), exclude=exclude, boost=boost),
    st.lists(_CONDITION, min_size=1, max_size=3), st.booleans(), st.floats(-10, 10, width=32),
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(st.lists(_RULE, max_size=4), st.integers(0, 1 << 30), st.lists(st.booleans(), min_size=3, max_size=3))
def test_any_rules_give_the_same_bits_and_boosts(rules: list[Rule], seed: int, reported: list[bool]) -> None:
    book = RuleBook({f"r{i}": rule for i, rule in enumerate(rules)}, {}, "")
    rng = np.random.default_rng(seed)
    both = Both(book, NAMES, random_table(rng, 9))
    for _ in range(3):
        values = rng.integers(-3, 4, (9, 3)).astype(np.float32)
        values[rng.random((9, 3)) < 0.05] = np.nan
        both.assess(values, None, np.array(reported))


def test_the_last_bit_of_all_is_a_rule_like_any_other() -> None:
    rule = Rule(when=(Condition(feature="x", above=1.0, until=0.0),), boost=0.1)
    book = RuleBook({f"r{i}": rule for i in range(MAX_RULES)}, {}, "")
    both = Both(book, NAMES, random_table(np.random.default_rng(2), 3))
    for x in (2.0, 0.5, -1.0):  # enters, stays, leaves
        both.assess(np.full((3, 3), x, np.float32), None, np.ones(3, np.bool_))
        assert bool(both.bits[0] >> 31) == (x > 0)


def test_a_moderation_shows_at_once_and_touches_no_other_bit() -> None:
    rng = np.random.default_rng(3)
    columns = random_table(rng, 50)
    before = rng.integers(0, 1 << 32, 50, dtype=np.uint32)
    device_bits = put(before)
    slots = rng.permutation(50)[:30].astype(np.int32)
    refresh_built_in(put(slots), row_state(columns), now_ms=NOW_MS, rule_bits=device_bits)
    expected = before.copy()
    kept = before[slots] & ~np.uint32(0b1111)
    expected[slots] = kept | bits.built_in(columns, slots, NOW_MS)
    assert np.array_equal(get(device_bits).view(np.uint32), expected)


def test_a_table_of_the_wrong_size_is_named() -> None:
    columns = random_table(np.random.default_rng(4), 3)
    with pytest.raises(ValueError, match=r"reported: must have shape \[3\]"):
        assess(
            put(np.zeros((3, 3), np.float32)), None, tables(RuleBook({}, {}, ""), NAMES, np.ones(2, np.bool_)),
            row_state(columns), now_ms=NOW_MS,
            rule_bits=put(np.zeros(3, np.uint32)), boost=put(np.zeros(3, np.float32)),
        )  # fmt: skip
