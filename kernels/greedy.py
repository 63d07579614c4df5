"""The compiled loop behind :func:`kernels.slate.select_slates`: lazy greedy choice, row by row.

Positions, in order of utility, are taken sixteen at a time. Cosines are summed in float32, sixteen lanes at once
(`kernels/cosines.py`), and are wrong by less than a known amount; so they rule out nearly everyone, and only where two
or more might be best are values computed as they are defined, in float64. Groups none of whose stale values, which
only fall, can be best are left alone.

Why it looks as it does: Numba counts references to arrays with locked instructions wherever a function that takes
arrays is called in a loop and is not made part of its caller, and wherever an array is sliced. Ten arrays handed to
one call per choice cost more than all cosines. So the choice stands in one function, and what it calls is forced
inline. Whose address is taken is an argument: see `kernels.vectors`. Nothing here checks shapes; values are checked by
`rank_candidates`.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kernels.candidate_order import HALF, LOW, PADDED, id_before, order_ties_by_id
from kernels.cosines import LANES, at_least, lay_side_by_side, meet, worth_now
from kernels.lines import zeros_in_lines
from kernels.vectors import lowest_bit

COMPILED_WITH = "eeec74e79dac9468"  # candidate_order.py, cosines.py and vectors.py; see the last
SLATE, EXPLORATION, RESERVE, CREATOR_CAP, CATEGORY_CAP, BELOW_LIMIT = range(1, 7)
"""Members of `kernels.slate.Outcome`: Numba reads plain integers."""

_GOLDEN_GAMMA = np.uint64(0x9E37_79B9_7F4A_7C15)
_LANE_BYTES = 4 * LANES
_ROUNDING = np.float32(2.0**-20)
"""More than float32 may lose, relative to what is added, between worth, penalty and value."""
_BY_CREATOR, _BY_CATEGORY = np.uint8(1), np.uint8(2)


@njit(cache=True, nogil=True, forceinline=True)
def _splitmix64(state: np.uint64) -> np.uint64:
    """64 random bits from a state that the caller advances by the golden gamma."""
    z = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@njit(cache=True, nogil=True, forceinline=True, fastmath={"reassoc", "contract"})
def _cosine(embeddings: NDArray[np.float32], slot: int, other: int) -> np.float32:
    """As it is defined. Products are exact in float64, so the order of the sum, which the compiler may choose, changes
    the result about once in 10^8 cosines, and never between runs on one kind of processor."""
    total = 0.0
    for d in range(embeddings.shape[1]):
        total += np.float64(embeddings[slot, d]) * np.float64(embeddings[other, d])
    return np.float32(total)


@njit(cache=True, nogil=True, forceinline=True)
def _take_place(
    value: int,
    taken: NDArray[np.int32],
    n_taken: int,
    cap: int,
    of_positions: NDArray[np.int32],
    n: int,
    full: NDArray[np.uint8],
    mark: np.uint8,
    worth: NDArray[np.float32],
    left: NDArray[np.int32],
) -> None:
    """Notes that a value took a place; if it is now at its cap, its positions are full and no longer left."""
    taken[n_taken] = value
    places = 0
    for i in range(n_taken + 1):
        places += taken[i] == value
    if places == cap:
        for p in range(n):
            if of_positions[p] == value:
                full[p] |= mark
                left[p // LANES] -= int(worth[p] == worth[p])
                worth[p] = np.nan


class Problem(NamedTuple):
    """What `kernels.slate.select_slates` is asked, and says of it."""

    slots: NDArray[np.int32]
    utility: NDArray[np.float32]
    explorable: NDArray[np.bool_]
    creators: NDArray[np.int32]
    categories: NDArray[np.int32]
    embeddings: NDArray[np.float32]
    ids: NDArray[np.uint8]
    limits: NDArray[np.int32]
    explore_slots: NDArray[np.int32]
    seeds: NDArray[np.uint64]
    creator_caps: NDArray[np.int32]
    category_caps: NDArray[np.int32]
    diversity: NDArray[np.float32]


class Scratch(NamedTuple):
    """What one row's choice needs, by position (utility descending, then id), by sixteen of them, or by choice.

    lanes float32[4, P]: worth (the utility; NaN: chosen, or at a cap), value (worth less the penalty, as far as that is
    known), closest and second; which int32[P]: see `cosines.meet`. sides float32[P / 16, D, 16]: embeddings side by
    side, and chosen float32[C, D]: of the choices, D rounded up to sixteens, zero there. rows_at int64[16]: addresses.
    """

    lanes: NDArray[np.float32]
    which: NDArray[np.int32]
    sides: NDArray[np.float32]
    rows_at: NDArray[np.int64]
    chosen: NDArray[np.float32]


_kept = threading.local()
"""The scratch of each thread: pages that the system has to clear cost as much as a small batch."""


def scratch_for(problem: Problem, reserve: int) -> Scratch:
    """This thread's, large enough for ``problem``."""
    width, dim = problem.slots.shape[1], problem.embeddings.shape[1]
    most = min(int(problem.limits.max(initial=0)) + reserve, width)
    kept: tuple[int, int, int] = getattr(_kept, "sizes", (0, 0, 0))
    if kept[0] < width or kept[1] < most or kept[2] != dim:  # what was written for another dim is not zero beyond it
        if kept[2] == dim:
            width, most = max(width, kept[0]), max(most, kept[1])
        groups, sixteens = -(-width // LANES), -(-dim // LANES)
        _kept.sizes = groups * LANES, most, dim
        _kept.scratch = Scratch(
            lanes=zeros_in_lines((4, groups * LANES), np.float32),
            which=zeros_in_lines((groups * LANES,), np.int32),
            sides=zeros_in_lines((groups, sixteens * LANES, LANES), np.float32),
            rows_at=np.zeros(LANES, np.int64),
            chosen=zeros_in_lines((most, sixteens * LANES), np.float32),
        )
    scratch: Scratch = _kept.scratch
    return scratch


@njit(cache=True, nogil=True)
def choose(
    keys: NDArray[np.uint64], problem: Problem, reserve: int, scratch: Scratch
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int32], NDArray[np.int32], NDArray[np.uint8]]:
    """The fields of `kernels.slate.Slates`; ``keys`` is what `rank_candidates` fills, sorted per row."""
    slots, utility, explorable, creators, categories, embeddings, ids = (
        problem.slots, problem.utility, problem.explorable, problem.creators, problem.categories, problem.embeddings,
        problem.ids,
    )  # fmt: skip
    limits, explore_slots, seeds, creator_caps, category_caps, diversity = (
        problem.limits, problem.explore_slots, problem.seeds, problem.creator_caps, problem.category_caps,
        problem.diversity,
    )  # fmt: skip
    batch, width = slots.shape
    longest = np.int64(0)
    for b in range(batch):
        longest = max(longest, limits[b])
    picks = np.full((batch, longest + reserve), -1, np.int32)
    exploration = np.zeros((batch, longest + reserve), np.float32)
    n_slate = np.zeros(batch, np.int32)
    n_reserve = np.zeros(batch, np.int32)
    outcome = np.zeros((batch, width), np.uint8)
    lanes, which, sides, rows_at, chosen = scratch
    worth, closest, second = lanes[0], lanes[2], lanes[3]
    most, dim, whole = chosen.shape[0], embeddings.shape[1], embeddings.shape[1] // LANES * LANES
    line_bytes = 4 * lanes.shape[1]
    worth_at = scratch.lanes.ctypes.data
    value_at, closest_at, second_at = worth_at + line_bytes, worth_at + 2 * line_bytes, worth_at + 3 * line_bytes
    which_at, sides_at, pointers_at = (
        scratch.which.ctypes.data, scratch.sides.ctypes.data, scratch.rows_at.ctypes.data,
    )  # fmt: skip
    chosen_at, table_at = scratch.chosen.ctypes.data, problem.embeddings.ctypes.data
    doubt = np.float32((dim + 8) * 2.0**-23)  # of a cosine: twice what a sum of so many can lose
    # By position.
    padded = worth.shape[0]
    order = np.empty(width, np.int32)  # its candidate
    slot_of = np.empty(padded, np.int32)
    creator_of = np.empty(width, np.int32)
    category_of = np.empty(width, np.int32)
    full = np.empty(width, np.uint8)
    penalty = np.empty(width, np.float32)  # greatest cosine, as it is defined, with the first `compared` choices
    compared = np.empty(width, np.int32)
    near = np.empty(padded, np.int32)  # positions that may be best
    pool = np.empty(width, np.int32)  # explorable positions
    # By sixteen positions.
    top = np.empty(padded // LANES, np.float32)  # worth of the first
    bound = np.empty(padded // LANES, np.float32)  # no value is above
    met = np.empty(padded // LANES, np.int32)  # choices that `closest` knows
    left = np.empty(padded // LANES, np.int32)  # positions that may still be chosen
    # By choice.
    slot_chosen = np.empty(most, np.int32)
    creators_taken = np.empty(most, np.int32)
    categories_taken = np.empty(most, np.int32)
    greedy = np.empty(most, np.int32)
    drawn = np.empty(most, np.int32)
    chance = np.empty(most, np.float32)

    for b in range(batch):
        n = 0
        while n < width and keys[b, n] != PADDED:
            order[n] = np.int32(keys[b, n] & LOW)
            utility_then = utility[b, order[n]]
            worth[n] = utility_then if np.isfinite(utility_then) else np.float32(-np.inf)
            n += 1
        order_ties_by_id(order, worth, slots, b, ids, n)
        n_pool = 0
        if explore_slots[b] > 0:
            for p in range(n):
                pool[n_pool] = p
                n_pool += int(explorable[b, order[p]])
        groups = -(-n // LANES)
        for p in range(n):
            slot = slots[b, order[p]]
            slot_of[p] = slot
            creator_of[p] = creators[slot]
            category_of[p] = categories[slot]
        for p in range(n):
            full[p] = 0
            penalty[p] = 0.0
            compared[p] = 0
        for p in range(n, groups * LANES):
            worth[p] = np.nan
            slot_of[p] = slot_of[0]
        for p in range(groups * LANES):
            closest[p] = 0.0
            second[p] = -np.inf
            which[p] = -1
        for g in range(groups):
            top[g] = bound[g] = worth[g * LANES]
            met[g] = 0
            left[g] = min(LANES, n - g * LANES)
        weight = diversity[b]
        limit = int(limits[b])
        places = min(int(explore_slots[b]), limit, n_pool)
        state = seeds[b]
        n_chosen = n_greedy = n_drawn = n_spare = 0
        first = laid = 0  # groups: the first with somebody left, and how many lie side by side
        # Phases: 0 greedy up to limit − places, 1 draws, 2 greedy up to the limit, 3 reserve.
        phase = 0
        while True:
            if phase == 0 and n_greedy == limit - places:
                phase = 1
            if phase == 1 and n_drawn == places:
                phase = 2
            if phase == 2 and n_greedy + n_drawn == limit:
                phase = 3
            if phase == 3 and n_spare == reserve:
                break
            if phase == 1:
                n_left = 0
                for i in range(n_pool):
                    p = pool[i]
                    pool[n_left] = p
                    n_left += int(worth[p] == worth[p])
                n_pool = n_left
                if n_pool == 0:
                    places = n_drawn
                    continue
                state += _GOLDEN_GAMMA
                best = int(pool[np.int64(((_splitmix64(state) >> HALF) * np.uint64(n_pool)) >> HALF)])
                drawn[n_drawn] = best
                chance[n_drawn] = np.float32(1.0 / n_pool)
                n_drawn += 1
                outcome[b, order[best]] = EXPLORATION
            else:
                while first < groups and left[first] == 0:
                    first += 1
                if first == groups:
                    if phase >= 2:
                        break
                    places = 0  # no candidate is within its caps: nothing to draw either
                    limit = n_greedy
                    continue
                greatest = least = np.float32(-np.inf)
                end = first
                while end < groups and top[end] >= least:
                    g, end = end, end + 1
                    if left[g] == 0 or bound[g] < least:
                        continue
                    at = g * _LANE_BYTES
                    if weight > 0 and met[g] < n_chosen:
                        while laid <= g:
                            for i in range(LANES):
                                rows_at[i] = table_at + np.int64(slot_of[laid * LANES + i]) * (4 * dim)
                            side_at = sides_at + laid * sides.shape[1] * _LANE_BYTES
                            lay_side_by_side(pointers_at, side_at, whole // LANES)
                            for d in range(whole, dim):
                                for i in range(LANES):
                                    sides[laid, d, i] = embeddings[slot_of[laid * LANES + i], d]
                            laid += 1
                        meet(
                            sides_at + g * sides.shape[1] * _LANE_BYTES, sides.shape[1], chosen_at, np.int64(met[g]),
                            n_chosen, closest_at + at, second_at + at, which_at + at,
                        )  # fmt: skip
                        met[g] = n_chosen
                    bound[g] = worth_now(worth_at + at, closest_at + at, weight, value_at + at)
                    if bound[g] > greatest:
                        greatest = bound[g]
                        lost = np.float32(2.0) * weight * doubt + _ROUNDING * (abs(greatest) + weight + weight)
                        least = greatest - lost
                n_near = 0
                for g in range(first, end):
                    if left[g] == 0 or bound[g] < least:
                        continue
                    bits = at_least(value_at + g * _LANE_BYTES, least)
                    while bits:
                        near[n_near] = g * LANES + lowest_bit(bits)
                        bits &= bits - np.uint64(1)
                        n_near += 1
                best = int(near[0])
                best_value = np.float32(-np.inf)
                for i in range(n_near if n_near > 1 else 0):
                    p = int(near[i])
                    if weight > 0 and closest[p] - second[p] > np.float32(2.0) * doubt:
                        known = np.float32(0.0)
                        if which[p] >= 0:
                            known = max(known, _cosine(embeddings, slot_of[p], slot_chosen[which[p]]))
                        exact = worth[p] - weight * known
                    elif weight > 0:
                        for j in range(compared[p], n_chosen):
                            cosine = _cosine(embeddings, slot_of[p], slot_chosen[j])
                            if cosine > penalty[p]:
                                penalty[p] = cosine
                        compared[p] = n_chosen
                        exact = worth[p] - weight * penalty[p]
                    else:
                        exact = worth[p]
                    better = i == 0 or exact > best_value
                    # Of equal worth, the earlier position has the lower id.
                    if i > 0 and exact == best_value and worth[p] != worth[best]:
                        better = id_before(ids, slot_of[p], slot_of[best])
                    if better:
                        best, best_value = p, exact
                greedy[n_greedy + n_spare] = best
                if phase == 3:
                    n_spare += 1
                    outcome[b, order[best]] = RESERVE
                else:
                    n_greedy += 1
                    outcome[b, order[best]] = SLATE
            worth[best] = np.nan
            left[best // LANES] -= 1
            slot = slot_of[best]
            slot_chosen[n_chosen] = slot
            for d in range(dim):
                chosen[n_chosen, d] = embeddings[slot, d]
            creator, category = creator_of[best], category_of[best]
            _take_place(
                creator, creators_taken, n_chosen, creator_caps[b], creator_of, n, full, _BY_CREATOR, worth, left
            )
            cap = category_caps[b] if category != 0 else most + 1
            _take_place(category, categories_taken, n_chosen, cap, category_of, n, full, _BY_CATEGORY, worth, left)
            n_chosen += 1

        length = n_greedy + n_drawn
        next_greedy = next_drawn = 0
        for place in range(length):
            if next_drawn < n_drawn and place == (next_drawn + 1) * length // (n_drawn + 1):
                picks[b, place] = order[drawn[next_drawn]]
                exploration[b, place] = chance[next_drawn]
                next_drawn += 1
            else:
                picks[b, place] = order[greedy[next_greedy]]
                next_greedy += 1
        for i in range(n_spare):
            picks[b, length + i] = order[greedy[n_greedy + i]]
        n_slate[b] = length
        n_reserve[b] = n_spare
        for p in range(n):
            if outcome[b, order[p]] == 0:
                if full[p] & _BY_CREATOR:
                    outcome[b, order[p]] = CREATOR_CAP
                else:
                    outcome[b, order[p]] = CATEGORY_CAP if full[p] else BELOW_LIMIT
    return picks, exploration, n_slate, n_reserve, outcome
