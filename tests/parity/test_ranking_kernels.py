"""Merge, blend, groups and the last check: equal to their references on the same cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kernels.blend import BlendWeights, blend, blend_reference
from kernels.eligibility import Drop, FilterColumns, RowColumns, check_rows, eligible_rows
from kernels.groups import (
    by_group,
    eligible_members,
    eligible_members_reference,
    first_eligible,
    first_of_groups,
    first_of_groups_reference,
)
from kernels.merge import (
    Proposed,
    Seen,
    Views,
    merge_candidates,
    merge_candidates_reference,
    merge_proposals,
    merge_proposals_reference,
)
from kernels.tally import count_batch, count_batch_reference
from kernels.verify import verify_picks, verify_picks_reference, verify_slates, verify_slates_reference

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


def proposals(rng: np.random.Generator, n_slots: int) -> tuple[Any, ...]:
    """Arguments of `merge_proposals` but the scratch: lists of every length, shared, overlapping and empty ones too."""
    rows, n_views, n_sources = (int(n) for n in rng.integers([0, 1, 0], [7, 4, 4]))
    lists = [rng.permutation(n_slots)[: rng.integers(0, n_slots + 1)] for _ in range(n_views)]
    starts = np.cumsum([0, *map(len, lists)]).astype(np.int64)
    views = Views(np.concatenate(lists).astype(np.int32), rng.integers(1, 64, starts[-1]).astype(np.uint32), starts)
    view_of = rng.integers(0, n_views, rows).astype(np.int32)
    view_limits = rng.integers(0, np.diff(starts)[view_of] + 1).astype(np.int32)
    lengths = rng.integers(0, 12, (n_sources, rows))
    offsets = np.zeros((n_sources, rows + 1), np.int64)
    first = 0
    for s in range(n_sources):
        offsets[s] = first + np.concatenate([[0], np.cumsum(lengths[s])])
        first = int(offsets[s, -1])
    found = rng.integers(-1, n_slots, first).astype(np.int32)
    bits = (1 << np.arange(n_sources)).astype(np.uint32)
    return views, view_of, view_limits, Proposed(found, offsets, bits), *ragged(rng, rows, 10, n_slots, low=-1)


@pytest.mark.parametrize("seed", range(40))
def test_merging_in_place_equals_merging_one_list_and_remembers_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n_slots = int(rng.integers(1, 30))
    seen = Seen(n_slots)
    for _ in range(4):  # the same scratch: no request may meet another's marks
        arguments = proposals(rng, n_slots)
        fast, plain = merge_proposals(*arguments, seen), merge_proposals_reference(*arguments, seen)
        for a, b in zip(fast, plain, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_the_marks_of_a_merge_are_cleared_when_their_numbers_run_out() -> None:
    seen = Seen(5)
    seen._next = (1 << 31) - 3
    arguments = (
        Views(np.array([1, 2], np.int32), np.ones(2, np.uint32), np.array([0, 2])), np.zeros(2, np.int32),
        np.full(2, 2, np.int32), Proposed(np.array([2], np.int32), np.array([[0, 1, 1]]), np.full(1, 2, np.uint32)),
        np.zeros(0, np.int32), np.zeros(3, np.int64),
    )  # fmt: skip
    for _ in range(3):
        slots, sources, counts, _ = merge_proposals(*arguments, seen)
        assert (slots.tolist(), sources.tolist(), counts.tolist()) == ([[1, 2]] * 2, [[1, 3], [1, 1]], [2, 2])
    assert seen._next < 10


@pytest.mark.parametrize(
    ("field", "bad", "named"),
    [
        ("views", [1, 5], "slots: below 5"), ("proposed", [5], "slots: below 5"), ("excluded", [5], "excluded"),
        ("view_of", [1], "view_of: 0 to 0"), ("view_limits", [3], "view_limits"),
    ],
)  # fmt: skip
def test_merging_refuses_what_is_out_of_range(field: str, bad: list[int], named: str) -> None:
    value = {"views": [1, 2], "proposed": [3], "excluded": [0], "view_of": [0], "view_limits": [2], field: bad}
    column = {name: np.array(numbers, np.int32) for name, numbers in value.items()}
    with pytest.raises(ValueError, match=f"^{named}"):
        merge_proposals(
            Views(column["views"], np.ones(2, np.uint32), np.array([0, 2])), column["view_of"],
            column["view_limits"], Proposed(column["proposed"], np.array([[0, 1]]), np.ones(1, np.uint32)),
            column["excluded"], np.array([0, 1]), Seen(5),
        )  # fmt: skip


def chosen_slates(rng: np.random.Generator) -> tuple[Any, ...]:
    """Arguments of `verify_slates`, with short, empty and padded slates."""
    b, candidates, width = int(rng.integers(0, 6)), 25, int(rng.integers(1, 20))
    slots = np.stack([rng.permutation(40)[:candidates] for _ in range(b)] or [np.zeros(candidates)]).astype(np.int32)
    picks = np.stack([rng.permutation(candidates)[:width] for _ in range(b)] or [np.zeros(width)]).astype(np.int32)
    n_slate = rng.integers(0, width + 1, b).astype(np.int32)
    n_reserve = rng.integers(0, width + 1 - n_slate).astype(np.int32)
    picks = np.where(np.arange(width) < (n_slate + n_reserve)[:, None], picks[:b], -1).astype(np.int32)
    utility = rng.normal(size=(b, candidates)).astype(np.float32)
    return (
        picks, n_slate, n_reserve, rng.random((b, width), np.float32), slots[:b], utility,
        rng.integers(0, 64, (b, candidates)).astype(np.uint32), rng.integers(0, 12, b).astype(np.int32),
        rng.integers(0, 3, b).astype(np.int32), random_rows(rng, 40), FILTERS, 0b100101, NOW,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(30))
def test_what_is_shown_equals_the_reference(seed: int) -> None:
    arguments = chosen_slates(np.random.default_rng(seed))
    fast, plain = verify_slates(*arguments), verify_slates_reference(*arguments)
    for name in fast._fields:
        got, wanted = getattr(fast, name), getattr(plain, name)
        assert got.dtype == wanted.dtype, name
        np.testing.assert_array_equal(got, wanted, err_msg=name)


def test_a_pick_outside_its_candidates_or_the_table_is_refused() -> None:
    rng = np.random.default_rng(5)
    arguments = chosen_slates(rng)
    while not (arguments[1] > 0).any():
        arguments = chosen_slates(rng)
    b = int(np.flatnonzero(arguments[1])[0])
    picks, slots = arguments[0].copy(), arguments[4].copy()
    picks[b, 0] = slots.shape[1]
    with pytest.raises(ValueError, match=r"^picks: 0 to 24"):
        verify_slates(picks, *arguments[1:])
    slots[b, arguments[0][b, 0]] = 40
    with pytest.raises(ValueError, match=r"^slots: 0 to 39"):
        verify_slates(*arguments[:4], slots, *arguments[5:])


@pytest.mark.parametrize("seed", range(20))
def test_a_batch_is_counted_as_the_reference_counts_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    b, k, p, width = (int(n) for n in rng.integers([0, 0, 0, 0], [5, 90, 20, 9]))
    arguments = (
        rng.integers(0, 2**32, (b, k)).astype(np.uint32), rng.integers(0, 7, (b, k)).astype(np.uint8),
        rng.integers(-1, 9, (b, p)).astype(np.int32), rng.integers(0, 9, (b, p)).astype(np.uint8),
        rng.integers(-1, 9, (b, width)).astype(np.int32), rng.integers(0, 2**32, (b, width)).astype(np.uint32),
        np.maximum(rng.normal(size=(b, width)), 0).astype(np.float32), rng.integers(0, 9, b).astype(np.int32),
    )  # fmt: skip
    for fast, plain in zip(count_batch(*arguments), count_batch_reference(*arguments), strict=True):
        np.testing.assert_array_equal(fast, plain)
