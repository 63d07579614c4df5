"""The last check before a reply: against the newest columns, closed on doubt, gaps back-filled."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kernels.checks import require_array
from kernels.eligibility import Drop, FilterColumns, RowColumns, check_values, codes_of_rows
from kernels.fence import LIVE

COMPILED_WITH = "c8d35161d04b7270"  # eligibility.py; see vectors.py


@njit(cache=True, nogil=True)
def _verify(
    picks: NDArray[np.int32],
    n_picks: NDArray[np.int32],
    limits: NDArray[np.int32],
    filter_of: NDArray[np.int32],
    row: RowColumns,
    f: FilterColumns,
    exclude_bits: np.uint32,
    now_ms: int,
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.uint8]]:
    rows, width = picks.shape
    kept = np.full((rows, width), -1, dtype=np.int32)
    counts = np.zeros(rows, dtype=np.int32)
    drops = np.zeros((rows, width), dtype=np.uint8)
    for b in range(rows):
        codes = codes_of_rows(row, picks[b, : n_picks[b]], f, filter_of[b], exclude_bits, now_ms)
        n = 0
        for i in range(n_picks[b]):
            if n == limits[b]:
                drops[b, i] = 8
                continue
            drops[b, i] = codes[i]
            if codes[i] == 0:
                kept[b, n] = i
                n += 1
        counts[b] = n
    return kept, counts, drops


def verify_picks(
    picks: NDArray[np.int32],
    n_picks: NDArray[np.int32],
    limits: NDArray[np.int32],
    filter_of: NDArray[np.int32],
    row: RowColumns,
    filters: FilterColumns,
    exclude_bits: int,
    now_ms: int,
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.uint8]]:
    """Checks slates and closes their gaps from the reserve behind them.

    Args:
        picks: int32[B, P] slots, best first: the slate and behind it its reserve; n_picks int32[B] of them.
        limits: int32[B], places wanted. filter_of: int32[B], row of ``filters``.

    Returns:
        kept int32[B, P]: columns of ``picks`` that are shown, in order, padded with -1;
        counts int32[B]; drops uint8[B, P]: a `Drop` per pick. kept + dropped = offered.

    Raises:
        ValueError: shapes do not fit, or a pick is outside the table.
    """
    rows, width = picks.shape
    for name, column in (("n_picks", n_picks), ("limits", limits), ("filter_of", filter_of)):
        if column.shape != (rows,):
            raise ValueError(f"{name}: shape ({rows},) wanted, got {column.shape}")
    if rows and int(n_picks.max()) > width:
        raise ValueError(f"n_picks: at most {width} allowed, got {int(n_picks.max())}")
    used = picks[np.arange(width)[None, :] < n_picks[:, None]]
    if len(used) and not (int(used.min()) >= 0 and int(used.max()) < len(row.state)):
        raise ValueError(f"picks: 0 to {len(row.state) - 1} allowed")
    kept, counts, drops = _verify(picks, n_picks, limits, filter_of, row, filters, np.uint32(exclude_bits), now_ms)
    return kept, counts, drops


def verify_picks_reference(
    picks: NDArray[np.int32],
    n_picks: NDArray[np.int32],
    limits: NDArray[np.int32],
    filter_of: NDArray[np.int32],
    row: RowColumns,
    filters: FilterColumns,
    exclude_bits: int,
    now_ms: int,
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.uint8]]:
    """Plain version of `verify_picks`."""
    kept = np.full(picks.shape, -1, np.int32)
    drops = np.zeros(picks.shape, np.uint8)
    counts = np.zeros(len(picks), np.int32)
    for b, (slots, v) in enumerate(zip(picks, filter_of, strict=True)):
        for i, s in enumerate(slots[: n_picks[b]]):
            language, category = row.language[s], row.category[s]
            tests = (
                (Drop.NOT_NEEDED, counts[b] == limits[b]),
                (Drop.NOT_LIVE, row.state[s] != LIVE),
                (Drop.LEASE_EXPIRED, row.lease_expires_ms[s] <= now_ms),
                (Drop.RULE, row.rule_bits[s] & np.uint32(exclude_bits) != 0),
                (Drop.REGION, row.region[s] not in (0, filters.region[v])),
                (Drop.AGE_RATING, row.age_rating[s] > filters.max_age_rating[v]),
                (
                    Drop.LANGUAGE,
                    not filters.any_language[v] and language not in np.flatnonzero(filters.languages[v]),
                ),
                (
                    Drop.CATEGORY,
                    not filters.any_category[v] and category not in np.flatnonzero(filters.categories[v]),
                ),
            )
            drops[b, i] = next((drop for drop, hit in tests if hit), Drop.KEPT)
            if drops[b, i] == Drop.KEPT:
                kept[b, counts[b]] = i
                counts[b] += 1
    return kept, counts, drops


class Shown(NamedTuple):
    """Slates as they are shown; L = longest of them, at least 1.

    slots int32[B, L] padded with -1, counts int32[B]; scores float32[B, L], sources uint32[B, L] and exploration
    float32[B, L], all 0 in padding. pick_slots int32[B, P] padded with -1, drops uint8[B, P]: a `Drop` per pick.
    """

    slots: NDArray[np.int32]
    counts: NDArray[np.int32]
    scores: NDArray[np.float32]
    sources: NDArray[np.uint32]
    exploration: NDArray[np.float32]
    pick_slots: NDArray[np.int32]
    drops: NDArray[np.uint8]


@njit(cache=True, nogil=True)
def _show(
    picks: NDArray[np.int32],
    n_slate: NDArray[np.int32],
    n_reserve: NDArray[np.int32],
    chances: NDArray[np.float32],
    slots: NDArray[np.int32],
    utility: NDArray[np.float32],
    sources: NDArray[np.uint32],
    limits: NDArray[np.int32],
    filter_of: NDArray[np.int32],
    row: RowColumns,
    f: FilterColumns,
    exclude_bits: np.uint32,
    now_ms: int,
) -> tuple[
    int, NDArray[np.int32], NDArray[np.int32], NDArray[np.float32], NDArray[np.uint32], NDArray[np.float32],
    NDArray[np.int32], NDArray[np.uint8],
]:  # fmt: skip
    state, lease, bits = row.state, row.lease_expires_ms, row.rule_bits
    region, age, language, category = row.region, row.age_rating, row.language, row.category
    rows, width = picks.shape
    kept = np.empty((rows, width), np.int32)
    counts = np.zeros(rows, np.int32)
    pick_slots = np.full((rows, width), -1, np.int32)
    drops = np.zeros((rows, width), np.uint8)
    longest = 1
    problem = 0
    for b in range(rows):
        v = filter_of[b]
        languages, categories = f.languages[v], f.categories[v]
        f_region, f_age = f.region[v], f.max_age_rating[v]
        any_language, any_category = f.any_language[v], f.any_category[v]
        n = 0
        for i in range(min(n_slate[b] + n_reserve[b], width)):
            candidate = picks[b, i]
            if candidate < 0 or candidate >= slots.shape[1]:
                problem = 1
                continue
            s = slots[b, candidate]
            if s < 0 or s >= state.shape[0]:
                problem = 2
                continue
            pick_slots[b, i] = s
            if n == limits[b]:
                drops[b, i] = 8
                continue
            drop = check_values(
                state[s], lease[s], bits[s], region[s], age[s], language[s], category[s], f_region, f_age,
                any_language, languages, any_category, categories, exclude_bits, now_ms,
            )  # fmt: skip
            drops[b, i] = drop
            if drop == 0:
                kept[b, n] = i
                n += 1
        counts[b] = n
        longest = max(longest, n)
    out_slots = np.full((rows, longest), -1, np.int32)
    out_scores = np.zeros((rows, longest), np.float32)
    out_sources = np.zeros((rows, longest), np.uint32)
    out_chances = np.zeros((rows, longest), np.float32)
    for b in range(rows):
        for place in range(counts[b]):
            i = kept[b, place]
            candidate = picks[b, i]
            out_slots[b, place] = pick_slots[b, i]
            out_scores[b, place] = utility[b, candidate]
            out_sources[b, place] = sources[b, candidate]
            out_chances[b, place] = chances[b, i]
    return problem, out_slots, counts, out_scores, out_sources, out_chances, pick_slots, drops


def verify_slates(
    picks: NDArray[np.int32],
    n_slate: NDArray[np.int32],
    n_reserve: NDArray[np.int32],
    exploration: NDArray[np.float32],
    slots: NDArray[np.int32],
    utility: NDArray[np.float32],
    sources: NDArray[np.uint32],
    limits: NDArray[np.int32],
    filter_of: NDArray[np.int32],
    row: RowColumns,
    filters: FilterColumns,
    exclude_bits: int,
    now_ms: int,
) -> Shown:
    """What `verify_picks` does to the choice of `kernels.slate`, and what is shown then, gathered.

    Args:
        picks, n_slate, n_reserve, exploration: see `kernels.slate.Slates`, [B, P] and [B].
        slots, utility, sources: the candidates that ``picks`` are columns of, [B, K].
        limits: int32[B], places wanted. filter_of: int32[B], row of ``filters``.

    Raises:
        ValueError: an argument has the wrong dtype or shape, or a pick is outside its candidates or the table.

    Cost: one pass over the picks, about 45 bytes each.
    """
    require_array("picks", picks, np.int32, (None, None))
    rows = (picks.shape[0],)
    require_array("n_slate", n_slate, np.int32, rows)
    require_array("n_reserve", n_reserve, np.int32, rows)
    require_array("exploration", exploration, np.float32, picks.shape)
    require_array("slots", slots, np.int32, (picks.shape[0], None))
    require_array("utility", utility, np.float32, slots.shape)
    require_array("sources", sources, np.uint32, slots.shape)
    require_array("limits", limits, np.int32, rows)
    require_array("filter_of", filter_of, np.int32, rows)
    problem, *shown = _show(
        picks, n_slate, n_reserve, exploration, slots, utility, sources, limits, filter_of, row, filters,
        np.uint32(exclude_bits), now_ms,
    )  # fmt: skip
    if problem:
        allowed = slots.shape[1] if problem == 1 else len(row.state)
        raise ValueError(f"{'picks' if problem == 1 else 'slots'}: 0 to {allowed - 1} allowed where they are used")
    return Shown(*shown)


def verify_slates_reference(
    picks: NDArray[np.int32],
    n_slate: NDArray[np.int32],
    n_reserve: NDArray[np.int32],
    exploration: NDArray[np.float32],
    slots: NDArray[np.int32],
    utility: NDArray[np.float32],
    sources: NDArray[np.uint32],
    limits: NDArray[np.int32],
    filter_of: NDArray[np.int32],
    row: RowColumns,
    filters: FilterColumns,
    exclude_bits: int,
    now_ms: int,
) -> Shown:
    """Plain version of `verify_slates`."""
    used = np.arange(picks.shape[1]) < (n_slate + n_reserve)[:, None]
    at = np.where(used, picks, 0)
    pick_slots = np.where(used, np.take_along_axis(slots, at, axis=1), np.int32(-1))
    kept, counts, drops = verify_picks_reference(
        pick_slots, n_slate + n_reserve, limits, filter_of, row, filters, exclude_bits, now_ms
    )
    kept = kept[:, : max(1, int(counts.max(initial=0)))]
    shown, column = kept >= 0, np.maximum(kept, 0)
    candidate = np.take_along_axis(at, column, axis=1)
    return Shown(
        slots=np.where(shown, np.take_along_axis(slots, candidate, axis=1), np.int32(-1)),
        counts=counts,
        scores=np.where(shown, np.take_along_axis(utility, candidate, axis=1), np.float32(0)),
        sources=np.where(shown, np.take_along_axis(sources, candidate, axis=1), np.uint32(0)),
        exploration=np.where(shown, np.take_along_axis(exploration, column, axis=1), np.float32(0)),
        pick_slots=pick_slots,
        drops=drops,
    )
