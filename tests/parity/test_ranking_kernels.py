"""Merge, blend, groups and the last check: equal to their references on the same cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kernels.blend import BlendWeights, blend, blend_reference
from kernels.groups import (
    by_group,
    eligible_members,
    eligible_members_reference,
    first_eligible,
    first_of_groups,
    first_of_groups_reference,
)
from kernels.merge import merge_candidates, merge_candidates_reference
from kernels.proposals import join_proposals, join_proposals_reference
from kernels.verify import (
    Drop,
    FilterColumns,
    RowColumns,
    check_rows,
    eligible_rows,
    verify_picks,
    verify_picks_reference,
)

NOW = 1_000_000


def ragged(rng: np.random.Generator, rows: int, most: int, high: int, low: int = 0) -> tuple[np.ndarray, np.ndarray]:
    lengths = rng.integers(0, most + 1, rows)
    values = rng.integers(low, high, lengths.sum()).astype(np.int32)
    return values, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


@pytest.mark.parametrize("seed", range(20))
def test_merge_equals_the_reference_and_loses_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, n_slots = int(rng.integers(1, 7)), int(rng.integers(1, 40))
    slots, offsets = ragged(rng, rows, 60, n_slots, low=-1)
    sources = (1 << rng.integers(0, 6, len(slots))).astype(np.uint32)
    excluded, excluded_offsets = ragged(rng, rows, 10, n_slots, low=-1)
    arguments = (slots, sources, offsets, excluded, excluded_offsets, n_slots)
    fast, plain = merge_candidates(*arguments), merge_candidates_reference(*arguments)
    for a, b in zip(fast, plain, strict=True):
        assert np.array_equal(a, b)
    for b in range(rows):
        offered = slots[offsets[b] : offsets[b + 1]]
        assert fast[2][b] + fast[3][b] == len(np.unique(offered[offered >= 0]))


def test_merge_refuses_slots_outside_the_table() -> None:
    one = np.array([0, 1], np.int64)
    with pytest.raises(ValueError, match="slots: below 5"):
        merge_candidates(
            np.array([5], np.int32), np.ones(1, np.uint32), one, np.zeros(0, np.int32), np.zeros(2, np.int64), 5
        )


def weights(rng: np.random.Generator, rows: int) -> BlendWeights:
    return BlendWeights(*(rng.random(rows).astype(np.float32) for _ in range(6)))


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (17, 50)])
def test_blend_equals_the_reference(rows: int, width: int) -> None:
    rng = np.random.default_rng(rows)
    n, dim = 64, 8
    slots = rng.integers(0, n, (rows, width)).astype(np.int32)
    slots[0, width // 2 :] = -1
    queries = rng.normal(size=(rows, dim)).astype(np.float32)
    queries[rows // 2] = 0
    trend = rng.random(n).astype(np.float32)
    trend[::5] = np.nan
    trend[3] = np.inf
    arguments: tuple[Any, ...] = (
        slots, rng.integers(0, 16, (rows, width)).astype(np.uint32), queries, trend,
        rng.normal(size=n).astype(np.float32), (NOW - rng.integers(0, 2_000, n)).astype(np.int64),
        rng.normal(size=(n, dim)).astype(np.float32), weights(rng, rows),
    )  # fmt: skip
    named = {"followed_bit": 2, "fresh_bit": 8, "now_ms": NOW, "fresh_age_ms": 1_000}
    for fast, plain in zip(blend(*arguments, **named), blend_reference(*arguments, **named), strict=True):
        np.testing.assert_allclose(fast, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(10))
def test_groups_equal_the_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, most = 50, int(rng.integers(0, 6))
    order, group = rng.permutation(n).astype(np.int32)[: rng.integers(0, n)], rng.integers(0, 5, n).astype(np.int32)
    masks = rng.random((2, int(rng.integers(0, n)))) < 0.6
    grouped = by_group(order, group, 5)
    assert np.array_equal(
        first_of_groups(grouped, masks[0], most), first_of_groups_reference(order, group, masks[0], most)
    )
    in_order = [s for s in order.tolist() if s < masks.shape[1] and masks[1, s]]
    assert first_eligible(order, masks[1], most).tolist() == in_order[:most]
    wanted, offsets = ragged(rng, 4, 3, 7, low=-1)  # some that nobody knows
    mask_of = rng.integers(0, 2, 4).astype(np.int32)
    slots, ends = eligible_members(grouped, wanted, offsets, masks, mask_of, most)
    each = [wanted[offsets[b] : offsets[b + 1]].tolist() for b in range(4)]
    assert [slots[ends[b] : ends[b + 1]].tolist() for b in range(4)] == eligible_members_reference(
        order, group, [[g for g in groups if 0 <= g < 5] for groups in each], masks, mask_of, most
    )
    assert len(slots) == ends[-1]


def test_groups_refuse_what_does_not_fit_by_name() -> None:
    order, group, one = np.arange(3, dtype=np.int32), np.zeros(3, np.int32), np.zeros(1, np.int32)
    with pytest.raises(ValueError, match=r"^order: 0 to 1"):
        by_group(order, group[:2], 1)
    with pytest.raises(ValueError, match=r"^group: 0 to 0"):
        by_group(order, group + np.int32(1), 1)
    grouped, offsets = by_group(order, group, 1), np.array([0, 1])
    with pytest.raises(ValueError, match=r"^offsets:"):
        eligible_members(grouped, one, np.array([0, 2]), np.ones((1, 3), bool), one, 1)
    with pytest.raises(ValueError, match=r"^mask_of:"):
        eligible_members(grouped, one, offsets, np.ones((1, 3), bool), one + np.int32(1), 1)


@pytest.mark.parametrize("seed", range(10))
def test_joined_proposals_equal_the_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    batch, n_views = int(rng.integers(0, 6)), int(rng.integers(1, 4))
    views = [
        (rng.integers(0, 99, m).astype(np.int32), rng.integers(1, 16, m).astype(np.uint32))
        for m in rng.integers(0, 9, n_views)
    ]
    view_of, limits = rng.integers(0, n_views, batch).astype(np.int32), rng.integers(0, 12, batch).astype(np.int32)
    found = [ragged(rng, batch, 5, 99), ragged(rng, batch, 0, 99), ragged(rng, batch, 7, 99)]
    arguments = (views, view_of, limits, found, [1 << 4, 1 << 7, 1 << 31])
    for got, wanted in zip(join_proposals(*arguments), join_proposals_reference(*arguments), strict=True):
        np.testing.assert_array_equal(got, wanted)
        assert got.dtype == wanted.dtype


def test_joining_refuses_what_does_not_fit_by_name() -> None:
    view = (np.arange(3, dtype=np.int32), np.ones(3, np.uint32))
    of, limits, found = np.zeros(2, np.int32), np.ones(2, np.int32), (np.arange(2, dtype=np.int32), np.array([0, 1, 2]))
    for bad in (np.array([0, 1], np.int32), np.array([0, -1], np.int32)):
        with pytest.raises(ValueError, match=r"^view_of:"):
            join_proposals([view], bad, limits, [found], [1])
    with pytest.raises(ValueError, match=r"^limits:"):
        join_proposals([view], of, limits[:1], [found], [1])
    for ends in ([0, 1, 3], [0, 3, 2], [1, 1, 2]):
        with pytest.raises(ValueError, match=r"^found:"):
            join_proposals([view], of, limits, [(found[0], np.array(ends))], [1])


def random_rows(rng: np.random.Generator, n: int) -> RowColumns:
    return RowColumns(
        state=rng.choice([1, 1, 1, 1, 0, 2, 3], n).astype(np.uint8),
        lease_expires_ms=(NOW + rng.integers(-2, 9, n)).astype(np.int64),
        rule_bits=rng.choice([0, 0, 0, 0, 1, 4, 32], n).astype(np.uint32),
        region=rng.choice([0, 0, 0, 1, 2], n).astype(np.int32),
        age_rating=rng.choice([0, 0, 16, 18], n).astype(np.int32),
        language=rng.integers(0, 4, n).astype(np.int32),
        category=rng.integers(0, 6, n).astype(np.int32),
    )


FILTERS = FilterColumns(
    region=np.array([-1, 1, 2], np.int32),
    max_age_rating=np.array([18, 16, 18], np.int32),
    any_language=np.array([True, False, False]),
    languages=np.array([[0, 0, 0], [0, 1, 1], [0, 0, 0]], bool),
    any_category=np.array([True, True, False]),
    categories=np.array([[0] * 5, [0] * 5, [0, 1, 1, 0, 1]], bool),
)


@pytest.mark.parametrize("seed", range(20))
def test_the_last_check_equals_the_reference_and_accounts_for_every_pick(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, 40)
    b, width = int(rng.integers(1, 6)), int(rng.integers(1, 30))
    picks = rng.integers(0, 40, (b, width)).astype(np.int32)
    n_picks = rng.integers(0, width + 1, b).astype(np.int32)
    limits = rng.integers(0, 12, b).astype(np.int32)
    arguments = (picks, n_picks, limits, rng.integers(0, 3, b).astype(np.int32), rows, FILTERS, 0b100101, NOW)
    fast, plain = verify_picks(*arguments), verify_picks_reference(*arguments)
    for a, c in zip(fast, plain, strict=True):
        assert np.array_equal(a, c)
    kept, counts, drops = fast
    for i in range(b):
        offered = drops[i, : n_picks[i]]
        assert np.count_nonzero(offered == Drop.KEPT) == counts[i] <= limits[i]
        shown = picks[i, kept[i, : counts[i]]]
        assert (rows.state[shown] == 1).all() and (rows.lease_expires_ms[shown] > NOW).all()


def test_retrieval_and_the_last_check_use_one_predicate() -> None:
    rows = random_rows(np.random.default_rng(1), 500)
    for v in range(3):
        every = np.arange(500, dtype=np.int32)[None]
        eligible = check_rows(rows, every[0], FILTERS, v, 0b101, NOW) == 0
        _, _, drops = verify_picks(
            every, np.array([500], np.int32), np.array([500], np.int32), np.array([v], np.int32),
            rows, FILTERS, 0b101, NOW,
        )  # fmt: skip
        assert np.array_equal(eligible, drops[0] == Drop.KEPT)


@pytest.mark.parametrize("seed", range(10))
def test_the_masks_of_the_search_are_the_predicate_of_the_last_check(seed: int) -> None:
    rows = random_rows(np.random.default_rng(seed), 300)
    bits = (rows.rule_bits & np.uint32(0b101)) == 0
    showable = ((rows.state == 1) & (rows.lease_expires_ms > NOW) & bits)[:250]
    found = 0
    for v in range(3):
        expected = check_rows(rows, np.arange(250, dtype=np.int32), FILTERS, v, 0b101, NOW) == Drop.KEPT
        assert np.array_equal(eligible_rows(rows, showable, FILTERS, v), expected)
        found += int(expected.sum())
    assert 0 < found < 3 * 250, "a case that tells nothing"


def test_a_name_interned_after_the_filter_was_built_does_not_match_it() -> None:
    rows = random_rows(np.random.default_rng(2), 1)._replace(
        state=np.ones(1, np.uint8), lease_expires_ms=np.array([NOW + 1]), rule_bits=np.zeros(1, np.uint32),
        region=np.zeros(1, np.int32), age_rating=np.zeros(1, np.int32), language=np.array([7], np.int32),
    )  # fmt: skip
    one = np.zeros(1, np.int32)
    assert check_rows(rows, one, FILTERS, 0, 0, NOW)[0] == Drop.KEPT
    assert check_rows(rows, one, FILTERS, 1, 0, NOW)[0] == Drop.LANGUAGE
    assert not eligible_rows(rows, np.ones(1, bool), FILTERS, 1)[0]


def test_a_missing_pick_inside_the_slate_is_refused() -> None:
    rows = random_rows(np.random.default_rng(3), 4)
    one = np.ones(1, np.int32)
    with pytest.raises(ValueError, match="picks: 0 to 3"):
        verify_picks(np.array([[-1]], np.int32), one, one, np.zeros(1, np.int32), rows, FILTERS, 0, NOW)
