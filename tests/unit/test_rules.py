"""The rules file: what it refuses, and that a stream does not flicker around a threshold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.fence import MODERATED_BLOCKED, MODERATED_SPAM
from server.config import RankSettings, TableSettings
from server.errors import ConfigError
from server.live.features import FeatureSet
from server.rules import bits
from server.rules.rulebook import BUILT_IN, RuleBook
from tests.events import T0, apply, event, new_table, small_settings, started

FEATURES = ("x", "y")
ON = np.uint32(1 << len(BUILT_IN))
REPORTED = np.ones(2, bool)


def book(tmp_path: Path, text: str) -> RuleBook:
    path = tmp_path / "rules.toml"
    path.write_text(text)
    return RuleBook.load(path, FEATURES)


DEFAULT = "[surface.default]\n"


def test_the_shipped_rules_are_valid() -> None:
    features = FeatureSet.load(TableSettings().features_file)
    shipped = RuleBook.load(RankSettings().rules_file, features.names)
    assert {"default", "chart", "kids"} <= set(shipped.surfaces) and "view_bots" in shipped.rules


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "surface.default is missing"),
        ("x = 1\n" + DEFAULT, "unknown ['x']"),
        ("[surface.default]\ntrend_wieght = 1.0", "surface.default: trend_wieght"),
        ("[surface.default]\ncategory_share = 0.0", "category_share"),
        (DEFAULT + "[rule.a]\nexclude = true", "rule.a: when"),
        (DEFAULT + "[rule.a]\nwhen = [{ feature = 'z', above = 1, until = 1 }]", "'z' is not declared"),
        (DEFAULT + "[rule.a]\nwhen = [{ feature = 'x', until = 1 }]", "exactly one of above and below"),
        (DEFAULT + "[rule.a]\nwhen = [{ feature = 'x', above = 1, until = 2 }]", "at most above (1.0)"),
        (DEFAULT + "[rule.a]\nwhen = [{ feature = 'x', below = 1, until = 0 }]", "at least below (1.0)"),
        (DEFAULT + "[rule.blocked]\nwhen = [{ feature = 'x', above = 1, until = 1 }]", "built in"),
        (DEFAULT + "rule = 3", "rule"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place_and_what_is_allowed(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        book(tmp_path, text)
    assert told in str(refused.value)


def test_surfaces_inherit_from_the_default(tmp_path: Path) -> None:
    surfaces = book(tmp_path, "[surface.default]\ncreator_cap = 7\n[surface.b]\ndiversity = 0.9\n").surfaces
    assert surfaces["b"].creator_cap == 7 and surfaces["b"].diversity == 0.9


RULE = """[rule.a]
exclude = true
when = [{ feature = 'x', above = 10, until = 5 }, { feature = 'y', below = 1, until = 2 }]
"""


def test_a_rule_enters_beyond_its_threshold_and_leaves_only_past_until(tmp_path: Path) -> None:
    rules = book(tmp_path, DEFAULT + RULE)
    state = np.zeros(1, np.uint32)
    for x, y, expected in (
        (11, 2, 0),
        (11, 0, ON),
        (6, 1.5, ON),
        (5, 2, ON),
        (4.9, 0, 0),
        (6, 0, 0),
        (11, 0, ON),
        (11, 2.1, 0),
    ):
        state = bits.assess(rules, FEATURES, np.array([[x, y]], np.float32), REPORTED, state)
        assert state[0] == expected, (x, y)


def test_silence_is_no_evidence_where_nobody_reports_the_signal(tmp_path: Path) -> None:
    rules = book(tmp_path, DEFAULT + RULE)
    suspicious, before = np.array([[11, 0]], np.float32), np.zeros(1, np.uint32)
    assert bits.assess(rules, FEATURES, suspicious, REPORTED, before)[0] == ON
    assert bits.assess(rules, FEATURES, suspicious, np.array([True, False]), before)[0] == 0


def test_what_is_reported_follows_from_the_events_seen_on_the_platform() -> None:
    features = FeatureSet.load(TableSettings().features_file)
    table = new_table(small_settings())
    apply(table, started("s", 1), event("s", 2, viewer_count={"count": 9}), event("s", 3, liked={}))
    reported = dict(zip(features.names, features.reported(table.counters_seen).tolist(), strict=True))
    assert reported["viewers"] and reported["likes_per_viewer_5m"] and reported["age_minutes"]
    assert not reported["chats_per_minute_5m"] and not reported["conversion_30m"]


@given(st.lists(st.tuples(st.floats(0, 20, width=32), st.booleans()), min_size=1, max_size=20))
def test_rows_are_judged_independently(rows: list[tuple[float, bool]]) -> None:
    rules = RuleBook.load(_rule_file(), FEATURES)
    values = np.array([[x, 0] for x, _ in rows], np.float32)
    before = np.array([ON if on else 0 for _, on in rows], np.uint32)
    together = bits.assess(rules, FEATURES, values, REPORTED, before)
    alone = [bits.assess(rules, FEATURES, values[i : i + 1], REPORTED, before[i : i + 1])[0] for i in range(len(rows))]
    assert together.tolist() == alone


def _rule_file() -> Path:
    import tempfile

    path = Path(tempfile.gettempdir()) / "liverank-test-rules.toml"
    path.write_text(DEFAULT + RULE)
    return path


def test_every_excluded_row_is_counted_for_exactly_one_rule(tmp_path: Path) -> None:
    rules = book(tmp_path, DEFAULT + RULE + "[rule.b]\nboost = -1\nwhen = [{ feature = 'x', above = 1, until = 1 }]\n")
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 1 << 7, 500).astype(np.uint32)
    excluded = int(np.count_nonzero(rows & np.uint32(rules.exclude_bits)))
    assert sum(bits.count_by_first_rule(rules, rows).values()) == excluded
    assert rules.exclude_bits == 0b111111, "a rule that only boosts excludes nobody"
    assert bits.boosts(rules, np.array([0, 1 << 6], np.uint32)).tolist() == [0.0, -1.0]


def test_built_in_bits_come_straight_from_the_table() -> None:
    table = new_table(small_settings())
    apply(table, *(started(s, i + 1) for i, s in enumerate("abcd")))
    apply(table, event("b", 11, epoch=1, ended={}))
    table.columns.moderation[2] = MODERATED_BLOCKED
    table.columns.moderation[3] = MODERATED_SPAM
    slots = np.arange(4, dtype=np.int32)
    assert bits.built_in(table.columns, slots, T0).tolist() == [0, bits.ENDED, bits.BLOCKED, bits.SPAM_MARKED]
    lapsed = bits.built_in(table.columns, slots[:1], T0 + 10_000)
    assert lapsed.tolist() == [bits.STALE], "even before a tick has said so"
