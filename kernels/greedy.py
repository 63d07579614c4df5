"""The compiled loop behind :func:`kernels.slate.select_slates`: lazy greedy choice, row by row.

Why it looks as it does: Numba counts references to arrays with locked instructions wherever a function that takes
arrays is called in a loop and is not made part of its caller, and wherever an array is sliced. Ten arrays handed to
one call per choice cost more than all cosines. So the choice stands in one function, and what it calls is forced
inline. Nothing here checks shapes; values are checked by `rank_candidates`.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

SLATE, EXPLORATION, RESERVE, CREATOR_CAP, CATEGORY_CAP, BELOW_LIMIT = range(1, 7)
"""Members of `kernels.slate.Outcome`: Numba reads plain integers."""
OK, BAD_LIMIT, BAD_EXPLORE_SLOTS, BAD_CREATOR_CAP, BAD_CATEGORY_CAP, BAD_DIVERSITY, BAD_SLOT = range(7)

_PADDED = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
_HALF, _LOW = np.uint64(32), np.uint64(0xFFFF_FFFF)
_SIGN, _NOT_SIGN = np.uint64(0x8000_0000), np.uint64(0x7FFF_FFFF)
_EXPONENT, _MINUS_INFINITY = np.uint64(0x7F80_0000), np.uint64(0xFF80_0000)
_GOLDEN_GAMMA = np.uint64(0x9E37_79B9_7F4A_7C15)
_COMMON_DIM = 64
_AT_ONCE = 8
"""Cosines between two looks at whether they still matter: fewer cost a mispredicted branch, more are wasted."""
_BY_CREATOR, _BY_CATEGORY = np.uint8(1), np.uint8(2)


@njit(cache=True, nogil=True)
def rank_candidates(
    slots: NDArray[np.int32],
    utility: NDArray[np.float32],
    n_rows: int,
    limits: NDArray[np.int32],
    explore_slots: NDArray[np.int32],
    creator_caps: NDArray[np.int32],
    category_caps: NDArray[np.int32],
    diversity: NDArray[np.float32],
    keys: NDArray[np.uint64],
) -> int:
    """Fills ``keys`` uint64[B, K]: ascending ones are utility descending, then candidate, which the low half holds.

    Returns the first problem with the values, or OK.
    """
    bits = utility.view(np.uint32)
    problem = OK
    for b in range(slots.shape[0]):
        lowest, highest = np.int32(0), np.int32(-1)
        for i in range(slots.shape[1]):
            lowest, highest = min(lowest, slots[b, i]), max(highest, slots[b, i])
            value = np.uint64(bits[b, i])
            if value & _EXPONENT == _EXPONENT:
                value = _MINUS_INFINITY
            elif value == _SIGN:  # -0.0 equals 0.0
                value = np.uint64(0)
            descending = value if value & _SIGN else value ^ _NOT_SIGN
            key = (descending << _HALF) | np.uint64(i)
            keys[b, i] = key if slots[b, i] >= 0 else _PADDED
        if lowest < -1 or highest >= n_rows:
            problem = BAD_SLOT
    for b in range(limits.shape[0]):
        if not (diversity[b] >= 0 and diversity[b] < np.inf):
            problem = BAD_DIVERSITY
        if category_caps[b] < 1:
            problem = BAD_CATEGORY_CAP
        if creator_caps[b] < 1:
            problem = BAD_CREATOR_CAP
        if explore_slots[b] < 0:
            problem = BAD_EXPLORE_SLOTS
        if limits[b] < 0:
            problem = BAD_LIMIT
    return problem


@njit(cache=True, nogil=True, forceinline=True)
def _splitmix64(state: np.uint64) -> np.uint64:
    """64 random bits from a state that the caller advances by the golden gamma."""
    z = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@njit(cache=True, nogil=True, forceinline=True)
def _id_before(ids: NDArray[np.uint8], one: int, other: int) -> bool:
    for i in range(ids.shape[1]):
        if ids[one, i] != ids[other, i]:
            return bool(ids[one, i] < ids[other, i])
    return False


@njit(cache=True, nogil=True, forceinline=True)
def _order_ties_by_id(
    order: NDArray[np.int32],
    worth: NDArray[np.float32],
    slots: NDArray[np.int32],
    b: int,
    ids: NDArray[np.uint8],
    n: int,
) -> None:
    """Binary insertion within each run of equal worth."""
    start = 0
    for p in range(1, n):
        if worth[p] != worth[start]:
            start = p
            continue
        low, high, moved = start, p, order[p]
        while low < high:
            middle = (low + high) // 2
            if _id_before(ids, slots[b, moved], slots[b, order[middle]]):
                high = middle
            else:
                low = middle + 1
        for i in range(p, low, -1):
            order[i] = order[i - 1]
        order[low] = moved


@njit(cache=True, nogil=True, forceinline=True, fastmath={"reassoc", "contract"})
def _closest(
    vectors: NDArray[np.float32],
    p: int,
    chosen: NDArray[np.float64],
    first: int,
    last: int,
    penalty: np.float32,
) -> np.float32:
    """The greatest of ``penalty`` and the cosines of ``vectors[p]`` with ``chosen[first:last]``.

    Reassociation lets the compiler use vectors (5 times faster) and keeps NaN. Products are exact in float64, so
    another order of the sum changes the float32 result about once in 10^8 cosines, and never between runs on one
    kind of processor.
    """
    if vectors.shape[1] == _COMMON_DIM:
        for j in range(first, last):
            total = 0.0
            for d in range(_COMMON_DIM):  # of constant length: straight vector code, the row stays in registers
                total += np.float64(vectors[p, d]) * chosen[j, d]
            cosine = np.float32(total)
            if cosine > penalty:
                penalty = cosine
        return penalty
    for j in range(first, last):
        total = 0.0
        for d in range(vectors.shape[1]):
            total += np.float64(vectors[p, d]) * chosen[j, d]
        cosine = np.float32(total)
        if cosine > penalty:
            penalty = cosine
    return penalty


@njit(cache=True, nogil=True, forceinline=True)
def _take_place(
    value: int,
    taken: NDArray[np.int32],
    n: int,
    cap: int,
    of_candidates: NDArray[np.int32],
    full: NDArray[np.uint8],
    mark: np.uint8,
) -> None:
    """Notes that a value took place n; if it is now at its cap, marks its candidates as full."""
    taken[n] = value
    places = 0
    for i in range(n + 1):
        places += taken[i] == value
    if places == cap:
        for i in range(of_candidates.shape[0]):
            full[i] |= mark if of_candidates[i] == value else np.uint8(0)


@njit(cache=True, nogil=True)
def choose(
    keys: NDArray[np.uint64],
    slots: NDArray[np.int32],
    utility: NDArray[np.float32],
    explorable: NDArray[np.bool_],
    creators: NDArray[np.int32],
    categories: NDArray[np.int32],
    embeddings: NDArray[np.float32],
    ids: NDArray[np.uint8],
    limits: NDArray[np.int32],
    explore_slots: NDArray[np.int32],
    seeds: NDArray[np.uint64],
    creator_caps: NDArray[np.int32],
    category_caps: NDArray[np.int32],
    diversity: NDArray[np.float32],
    reserve: int,
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int32], NDArray[np.int32], NDArray[np.uint8]]:
    """The fields of `kernels.slate.Slates`; ``keys`` is what `rank_candidates` fills, sorted per row."""
    batch, width = slots.shape
    longest = np.int64(0)
    for b in range(batch):
        longest = max(longest, limits[b])
    picks = np.full((batch, longest + reserve), -1, np.int32)
    exploration = np.zeros((batch, longest + reserve), np.float32)
    n_slate = np.zeros(batch, np.int32)
    n_reserve = np.zeros(batch, np.int32)
    outcome = np.zeros((batch, width), np.uint8)
    most, dim = min(longest + reserve, width), embeddings.shape[1]
    # By candidate: creator, category, and whether they are at their cap.
    creator_of = np.empty(width, np.int32)
    category_of = np.empty(width, np.int32)
    full = np.empty(width, np.uint8)
    # By position, which goes by utility, then id.
    order = np.empty(width, np.int32)  # its candidate
    worth = np.empty(width, np.float32)
    bound = np.empty(width, np.float32)  # its value is not above; NaN: chosen, or found to be full
    penalty = np.empty(width, np.float32)  # greatest cosine with the first `compared` choices
    compared = np.empty(width, np.int32)
    vectors = np.empty((width, dim), np.float32)  # embeddings of the positions before `end`
    near = np.empty(width, np.int32)  # positions that may be best
    pool = np.empty(width, np.int32)  # explorable positions
    # By choice.
    chosen = np.empty((most, dim), np.float64)
    creators_taken = np.empty(most, np.int32)
    categories_taken = np.empty(most, np.int32)
    greedy = np.empty(most, np.int32)
    drawn = np.empty(most, np.int32)
    chance = np.empty(most, np.float32)

    for b in range(batch):
        n = 0
        while n < width and keys[b, n] != _PADDED:
            order[n] = np.int32(keys[b, n] & _LOW)
            utility_then = utility[b, order[n]]
            worth[n] = utility_then if np.isfinite(utility_then) else np.float32(-np.inf)
            n += 1
        _order_ties_by_id(order, worth, slots, b, ids, n)
        n_pool = 0
        if explore_slots[b] > 0:
            for p in range(n):
                pool[n_pool] = p
                n_pool += int(explorable[b, order[p]])
        for i in range(width):
            slot = slots[b, i]
            creator_of[i] = creators[slot] if slot >= 0 else 0
            category_of[i] = categories[slot] if slot >= 0 else 0
            full[i] = 0
        for p in range(n):
            bound[p] = worth[p]
            penalty[p] = 0.0
            compared[p] = 0
        weight = diversity[b]
        limit = int(limits[b])
        places = min(int(explore_slots[b]), limit, n_pool)
        state = seeds[b]
        n_chosen = n_greedy = n_drawn = n_spare = 0
        first = end = 0  # the window: who may be best is in it
        rival = -1  # second best of the last choice: most often the best of the next
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
            best = -1
            if phase == 1:
                left = 0
                for i in range(n_pool):
                    p = pool[i]
                    pool[left] = p
                    left += int(bound[p] == bound[p] and full[order[p]] == 0)
                n_pool = left
                if n_pool == 0:
                    places = n_drawn
                    continue
                state += _GOLDEN_GAMMA
                best = int(pool[np.int64(((_splitmix64(state) >> _HALF) * np.uint64(n_pool)) >> _HALF)])
                drawn[n_drawn] = best
                chance[n_drawn] = np.float32(1.0 / n_pool)
                n_drawn += 1
                outcome[b, order[best]] = EXPLORATION
                if best == rival:
                    rival = -1
            else:
                # Someone whose exact value nobody worse than it can be best with.
                if rival < 0 or full[order[rival]] != 0:
                    while first < n and (bound[first] != bound[first] or full[order[first]] != 0):
                        bound[first] = np.nan
                        first += 1
                    rival = first
                if rival == n:
                    rival = -1
                    if phase >= 2:
                        break
                    places = 0  # no candidate is within its caps: nothing to draw either
                    limit = n_greedy
                    continue
                best, rival = rival, -1
                while True:  # first the one, then whoever its value lets into the window
                    known = end > best
                    if known and compared[best] < n_chosen and weight > 0:
                        penalty[best] = _closest(vectors, best, chosen, compared[best], n_chosen, penalty[best])
                        compared[best] = n_chosen
                        bound[best] = worth[best] - weight * penalty[best]
                    if known and (end == n or worth[end] < bound[best]):
                        break
                    slot = slots[b, order[end]]
                    for d in range(dim):
                        vectors[end, d] = embeddings[slot, d]
                    end += 1
                best_value = bound[best]
                rival_value = np.float32(-np.inf)
                n_near = np.uint64(0)
                for q in range(np.uint64(first), np.uint64(end)):  # without a branch; unsigned: see kernels/topk.py
                    near[n_near] = q
                    n_near += np.uint64(bound[q] >= best_value)
                for i in range(np.int64(n_near)):
                    p = near[i]
                    if p == best or bound[p] < best_value:
                        continue
                    if full[order[p]] != 0:
                        bound[p] = np.nan  # places are never given back
                        continue
                    while weight > 0 and compared[p] < n_chosen and bound[p] >= best_value:
                        last = min(compared[p] + _AT_ONCE, n_chosen)
                        penalty[p] = _closest(vectors, p, chosen, compared[p], last, penalty[p])
                        compared[p] = last
                        bound[p] = worth[p] - weight * penalty[p]
                    value = bound[p]
                    better = value > best_value
                    if value == best_value:
                        # Of equal worth, the earlier position has the lower id.
                        if worth[p] == worth[best]:
                            better = p < best
                        else:
                            better = _id_before(ids, slots[b, order[p]], slots[b, order[best]])
                    if better:
                        rival, rival_value = best, best_value
                        best, best_value = p, value
                    elif (compared[p] == n_chosen or weight == 0) and (rival < 0 or value > rival_value):
                        rival, rival_value = p, value
                greedy[n_greedy + n_spare] = best
                if phase == 3:
                    n_spare += 1
                    outcome[b, order[best]] = RESERVE
                else:
                    n_greedy += 1
                    outcome[b, order[best]] = SLATE
            bound[best] = np.nan
            candidate = order[best]
            slot = slots[b, candidate]
            for d in range(dim):
                chosen[n_chosen, d] = embeddings[slot, d]
            creator, category = creator_of[candidate], category_of[candidate]
            _take_place(creator, creators_taken, n_chosen, creator_caps[b], creator_of, full, _BY_CREATOR)
            cap = category_caps[b] if category != 0 else most + 1
            _take_place(category, categories_taken, n_chosen, cap, category_of, full, _BY_CATEGORY)
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
        for i in range(width):
            if outcome[b, i] == 0 and slots[b, i] >= 0:
                if full[i] & _BY_CREATOR:
                    outcome[b, i] = CREATOR_CAP
                else:
                    outcome[b, i] = CATEGORY_CAP if full[i] else BELOW_LIMIT
    return picks, exploration, n_slate, n_reserve, outcome
