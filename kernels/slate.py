"""Greedy slate selection for a whole batch: diversity, caps, exploration and reserve.

Maximal marginal relevance (Carbonell and Goldstein, 1998): each step takes the candidate with the greatest
``utility − diversity · max(0, greatest cosine with a selected one)``. That penalty only grows while the slate
grows, so a value computed earlier is an upper bound now, and the utility is one always. The kernel looks at
candidates in order of utility, computes only cosines that can still change the choice, and stops at the first
utility below the best value found (lazy greedy; Minoux, 1978). The result is that of the eager reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kernels.checks import require_array

ID_BYTES = 64
_PADDED = np.uint64(0xFFFF_FFFF_FFFF_FFFF)


class Outcome(IntEnum):
    """What became of a candidate; each has exactly one."""

    PADDING = 0  # not a candidate
    SLATE = 1  # chosen for its value
    EXPLORATION = 2  # chosen by chance
    RESERVE = 3  # next in line, used when a chosen one must go
    CREATOR_CAP = 4  # not chosen; by now its creator has as many places as allowed
    CATEGORY_CAP = 5  # not chosen; the same for its category
    BELOW_LIMIT = 6  # not chosen; others were better


# Numba reads plain integers, not enum members.
_SLATE, _EXPLORATION, _RESERVE = int(Outcome.SLATE), int(Outcome.EXPLORATION), int(Outcome.RESERVE)
_CREATOR_CAP, _CATEGORY_CAP = int(Outcome.CREATOR_CAP), int(Outcome.CATEGORY_CAP)
_BELOW_LIMIT = int(Outcome.BELOW_LIMIT)


@dataclass(frozen=True)
class Slates:
    """The choice for each row of the batch; W = greatest limit + reserve.

    ``picks`` int32[B, W]: indices into the row's candidates; n_slate of the slate in order, then n_reserve of
    the reserve best first, then -1. ``exploration`` float32[B, W]: the probability with which a pick was
    drawn, 0 for one that was not. ``n_slate``, ``n_reserve`` int32[B]. ``outcome`` uint8[B, K]: see
    :class:`Outcome`.
    """

    picks: NDArray[np.int32]
    exploration: NDArray[np.float32]
    n_slate: NDArray[np.int32]
    n_reserve: NDArray[np.int32]
    outcome: NDArray[np.uint8]


def select_slates(
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
) -> Slates:
    """Chooses a slate and its reserve for every row.

    A non-finite utility ranks below every finite one. Equal values go by stream id, ascending bytes. Then
    m = min(explore_slots, limit, explorable candidates) places are kept for exploration: after limit − m
    greedy picks, m streams are drawn one by one, each uniformly from the explorable candidates that are not
    chosen and within their caps (splitmix64 from the row's seed; the pool is in order of utility, then id). A
    place for which the pool is empty goes back to greedy. Draw j of d stands at place ⌊(j + 1)·n_slate / (d +
    1)⌋. The reserve continues greedily; caps and diversity count the slate. The order of candidates in a row
    does not matter.

    Args:
        slots: int32[B, K] in [-1, C), -1 is padding. A slot twice in a row is the caller's error: it could be
            chosen twice (the reference refuses it).
        utility: float32[B, K].
        explorable: bool[B, K], may fill an exploration place.
        creators, categories: int32[C], per table row. Category 0 is unknown and never capped.
        embeddings: float32[C, D], rows of unit length or all zero.
        ids: uint8[C, 64], zero-padded.
        limits: int32[B] >= 0, length of the slate. explore_slots: int32[B] >= 0. seeds: uint64[B].
        creator_caps, category_caps: int32[B] >= 1, places that one creator, one category may have.
        diversity: float32[B], finite, >= 0.
        reserve: >= 0.

    Raises:
        ValueError: an argument has the wrong dtype, shape or range; the message names it.

    Cost: 12·B·K bytes of candidates, 4·D bytes and 2·D flops for each cosine needed: a few hundred per row
    while diversity is moderate, (limit + reserve)·K at worst.
    """
    _check(
        slots, utility, explorable, creators, categories, embeddings, ids, limits, explore_slots, seeds,
        creator_caps, category_caps, diversity, reserve,
    )  # fmt: skip
    slates = _empty(slots, limits, reserve)
    if slots.size == 0:
        return slates
    keys = np.sort(_sort_keys(slots, utility), axis=1)
    _select(
        keys, slots, utility, explorable, creators, categories, embeddings, ids, limits, explore_slots, seeds,
        creator_caps, category_caps, diversity, reserve,
        slates.picks, slates.exploration, slates.n_slate, slates.n_reserve, slates.outcome,
    )  # fmt: skip
    return slates


def select_slates_reference(
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
) -> Slates:
    """What :func:`select_slates` returns, with every value computed at every step."""
    _check(
        slots, utility, explorable, creators, categories, embeddings, ids, limits, explore_slots, seeds,
        creator_caps, category_caps, diversity, reserve,
    )  # fmt: skip
    slates = _empty(slots, limits, reserve)
    for b in range(slots.shape[0]):
        valid = np.flatnonzero(slots[b] >= 0)
        row = slots[b, valid]
        if np.unique(row).size != row.size:
            raise ValueError(f"slots: row {b} has a slot twice")
        worth = np.where(np.isfinite(utility[b, valid]), utility[b, valid], np.float32(-np.inf))
        names = [ids[slot].tobytes() for slot in row]
        greedy = _EagerGreedy(
            worth, names, creators[row], categories[row], embeddings[row],
            int(creator_caps[b]), int(category_caps[b]), diversity[b],
        )  # fmt: skip
        limit = int(limits[b])
        places = min(int(explore_slots[b]), limit, int(explorable[b, valid].sum()))
        slate = greedy.take(limit - places)
        pool_order = sorted(range(row.size), key=lambda i: (-worth[i], names[i]))
        state = int(seeds[b])
        drawn: list[tuple[int, float]] = []
        for _ in range(places):
            allowed = greedy.allowed()
            pool = [i for i in pool_order if allowed[i] and explorable[b, valid[i]]]
            if not pool:
                break
            state, bits = _splitmix64_reference(state)
            pick = pool[((bits >> 32) * len(pool)) >> 32]
            greedy.choose(pick)
            drawn.append((pick, 1.0 / len(pool)))
        slate += greedy.take(limit - len(slate) - len(drawn))
        chosen = [(i, 0.0) for i in slate]
        length = len(slate) + len(drawn)
        for j, draw in enumerate(drawn):
            chosen.insert((j + 1) * length // (len(drawn) + 1), draw)
        spare = greedy.take(reserve)
        slates.n_slate[b], slates.n_reserve[b] = length, len(spare)
        picks = [*(i for i, _ in chosen), *spare]
        slates.picks[b, : len(picks)] = valid[picks]
        slates.exploration[b, :length] = [propensity for _, propensity in chosen]
        outcome = np.where(greedy.category_full(), Outcome.CATEGORY_CAP, Outcome.BELOW_LIMIT)
        outcome[greedy.creator_full()] = Outcome.CREATOR_CAP
        outcome[slate] = Outcome.SLATE
        outcome[[i for i, _ in drawn]] = Outcome.EXPLORATION
        outcome[spare] = Outcome.RESERVE
        slates.outcome[b, valid] = outcome
    return slates


class _EagerGreedy:
    """One row of the reference: every remaining value is current after every choice."""

    def __init__(
        self,
        worth: NDArray[np.float32],
        names: list[bytes],
        creators: NDArray[np.int32],
        categories: NDArray[np.int32],
        embeddings: NDArray[np.float32],
        creator_cap: int,
        category_cap: int,
        diversity: np.float32,
    ) -> None:
        self._worth, self._names = worth, names
        self._creators, self._categories, self._embeddings = creators, categories, embeddings
        self._creator_cap, self._category_cap, self._diversity = creator_cap, category_cap, diversity
        self._penalty = np.zeros(worth.size, np.float32)
        self._chosen = np.zeros(worth.size, np.bool_)

    def creator_full(self) -> NDArray[np.bool_]:
        taken = self._creators[self._chosen]
        full: NDArray[np.bool_] = (self._creators[:, None] == taken).sum(axis=1) >= self._creator_cap
        return full

    def category_full(self) -> NDArray[np.bool_]:
        taken = self._categories[self._chosen]
        places = (self._categories[:, None] == taken).sum(axis=1)
        full: NDArray[np.bool_] = (places >= self._category_cap) & (self._categories != 0)
        return full

    def allowed(self) -> NDArray[np.bool_]:
        return ~(self._chosen | self.creator_full() | self.category_full())

    def choose(self, i: int) -> None:
        self._chosen[i] = True
        exact = self._embeddings.astype(np.float64) @ self._embeddings[i].astype(np.float64)
        cosines = exact.astype(np.float32)
        self._penalty = np.where(cosines > self._penalty, cosines, self._penalty)

    def take(self, wanted: int) -> list[int]:
        taken: list[int] = []
        for _ in range(wanted):
            allowed = np.flatnonzero(self.allowed())
            if allowed.size == 0:
                break
            values = self._worth - self._diversity * self._penalty if self._diversity > 0 else self._worth
            best = min(allowed, key=lambda i: (-values[i], self._names[i]))
            self.choose(int(best))
            taken.append(int(best))
        return taken


def _splitmix64_reference(state: int) -> tuple[int, int]:
    """The next state and 64 random bits (Steele, Lea and Flood, 2014)."""
    mask = 2**64 - 1
    state = (state + 0x9E3779B97F4A7C15) & mask
    z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return state, z ^ (z >> 31)


def _check(
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
) -> None:
    require_array("slots", slots, np.int32, (None, None))
    require_array("utility", utility, np.float32, slots.shape)
    require_array("explorable", explorable, np.bool_, slots.shape)
    require_array("creators", creators, np.int32, (None,))
    require_array("categories", categories, np.int32, creators.shape)
    require_array("embeddings", embeddings, np.float32, (creators.shape[0], None))
    require_array("ids", ids, np.uint8, (creators.shape[0], ID_BYTES))
    require_array("seeds", seeds, np.uint64, (slots.shape[0],))
    require_array("diversity", diversity, np.float32, (slots.shape[0],))
    least = {"limits": 0, "explore_slots": 0, "creator_caps": 1, "category_caps": 1}
    columns = (limits, explore_slots, creator_caps, category_caps)
    for (name, minimum), column in zip(least.items(), columns, strict=True):
        require_array(name, column, np.int32, (slots.shape[0],))
        if column.size and column.min() < minimum:
            raise ValueError(f"{name}: must be at least {minimum}")
    if not (np.isfinite(diversity) & (diversity >= 0)).all():
        raise ValueError("diversity: must be finite and not negative")
    if reserve < 0:
        raise ValueError(f"reserve: must not be negative, got {reserve}")
    if slots.size and (slots.min() < -1 or slots.max() >= creators.shape[0]):
        raise ValueError(f"slots: must lie in [-1, {creators.shape[0]})")


def _empty(slots: NDArray[np.int32], limits: NDArray[np.int32], reserve: int) -> Slates:
    batch = slots.shape[0]
    width = (int(limits.max()) if batch else 0) + reserve
    return Slates(
        picks=np.full((batch, width), -1, np.int32),
        exploration=np.zeros((batch, width), np.float32),
        n_slate=np.zeros(batch, np.int32),
        n_reserve=np.zeros(batch, np.int32),
        outcome=np.full(slots.shape, Outcome.PADDING, np.uint8),
    )


def _sort_keys(slots: NDArray[np.int32], utility: NDArray[np.float32]) -> NDArray[np.uint64]:
    """uint64[B, K]: ascending keys are utility descending, then candidate index, which the low half holds."""
    worth = np.where(np.isfinite(utility), utility, np.float32(-np.inf)) + np.float32(0.0)  # -0.0 equals 0.0
    bits = worth.view(np.uint32)
    descending = np.where(bits >> 31 == 1, bits, bits ^ np.uint32(0x7FFF_FFFF))
    keys = (descending.astype(np.uint64) << np.uint64(32)) | np.arange(slots.shape[1], dtype=np.uint64)
    return np.where(slots >= 0, keys, _PADDED)


@njit(cache=True, nogil=True)
def _splitmix64(state: np.uint64) -> np.uint64:
    """64 random bits from a state that the caller advances by the golden gamma."""
    z = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@njit(cache=True, nogil=True)
def _id_before(ids: NDArray[np.uint8], one: int, other: int) -> bool:
    for i in range(ids.shape[1]):
        if ids[one, i] != ids[other, i]:
            return bool(ids[one, i] < ids[other, i])
    return False


@njit(cache=True, nogil=True)
def _order_ties_by_id(
    order: NDArray[np.int32],
    worth: NDArray[np.float32],
    row: NDArray[np.int32],
    ids: NDArray[np.uint8],
    n: int,
) -> None:
    """Binary insertion within each run of equal worth; ``row`` int32[K] gives a candidate's slot."""
    start = 0
    for p in range(1, n):
        if worth[p] != worth[start]:
            start = p
            continue
        low, high, moved = start, p, order[p]
        while low < high:
            middle = (low + high) // 2
            if _id_before(ids, row[moved], row[order[middle]]):
                high = middle
            else:
                low = middle + 1
        for i in range(p, low, -1):
            order[i] = order[i - 1]
        order[low] = moved


@njit(cache=True, nogil=True, fastmath={"reassoc"})
def _cosine(one: NDArray[np.float64], other: NDArray[np.float32]) -> np.float32:
    # Reassociation alone lets the compiler use vectors (5 times faster) and keeps NaN. Products are exact in
    # float64, so another order of the sum changes the float32 result about once in 10^8 cosines, and never
    # between runs on one kind of processor.
    total = 0.0
    for i in range(one.shape[0]):
        total += one[i] * other[i]
    return np.float32(total)


@njit(cache=True, nogil=True)
def _among(values: NDArray[np.int32], count: int, value: int) -> bool:
    found = False
    for i in range(count):
        found |= values[i] == value
    return found


@njit(cache=True, nogil=True)
def _best(
    first: int,
    n: int,
    worth: NDArray[np.float32],
    row: NDArray[np.int32],
    free: NDArray[np.bool_],
    penalty: NDArray[np.float32],
    compared: NDArray[np.int32],
    chosen: NDArray[np.float64],
    n_chosen: int,
    creators: NDArray[np.int32],
    categories: NDArray[np.int32],
    full: NDArray[np.int32],
    n_full: NDArray[np.int64],
    embeddings: NDArray[np.float32],
    ids: NDArray[np.uint8],
    weight: np.float32,
) -> int:
    """Position of the best free candidate within its caps, or -1; positions go by worth, then id."""
    best = -1
    best_value = np.float32(-np.inf)
    for p in range(first, n):
        if not free[p]:
            continue
        value = worth[p]
        if best >= 0 and value < best_value:
            break  # so is every later one
        if weight > 0:
            value = worth[p] - weight * penalty[p]
        if best >= 0 and value < best_value:
            continue  # its penalty can only have grown
        slot = row[p]
        category = categories[slot]
        if _among(full[0], n_full[0], creators[slot]) or (category != 0 and _among(full[1], n_full[1], category)):
            free[p] = False  # places are never given back
            continue
        if weight > 0:
            while compared[p] < n_chosen:
                cosine = _cosine(chosen[compared[p]], embeddings[slot])
                compared[p] += 1
                if cosine > penalty[p]:
                    penalty[p] = cosine
                    value = worth[p] - weight * cosine
                    if best >= 0 and value < best_value:
                        break
        if best < 0 or value > best_value:
            best, best_value = p, value
        elif value == best_value and worth[p] != worth[best] and _id_before(ids, slot, row[best]):
            best = p  # of equal worth, the earlier position has the lower id
    return best


@njit(cache=True, nogil=True)
def _count_place(value: int, taken: NDArray[np.int32], n: int, cap: int, full: NDArray[np.int32]) -> int:
    """Notes that a value took place n; returns 1, having put it in ``full``, if it is now at its cap."""
    taken[n] = value
    places = 0
    for i in range(n + 1):
        places += taken[i] == value
    if places != cap:
        return 0
    full[0] = value
    return 1


@njit(cache=True, nogil=True)
def _select(
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
    picks: NDArray[np.int32],
    exploration: NDArray[np.float32],
    n_slate: NDArray[np.int32],
    n_reserve: NDArray[np.int32],
    outcome: NDArray[np.uint8],
) -> None:
    batch, width = slots.shape
    most = min(picks.shape[1], width)
    order = np.empty(width, np.int32)  # position → candidate
    worth = np.empty(width, np.float32)  # and all that follow: by position
    row = np.empty(width, np.int32)
    free = np.empty(width, np.bool_)
    penalty = np.empty(width, np.float32)
    compared = np.empty(width, np.int32)
    chosen = np.empty((most, embeddings.shape[1]), np.float64)
    taken = np.empty((2, most), np.int32)  # creators, categories of the chosen
    full = np.empty((2, most + 1), np.int32)  # those at their cap
    n_full = np.empty(2, np.int64)
    greedy = np.empty(most, np.int32)
    drawn = np.empty(most, np.int32)
    chance = np.empty(most, np.float32)

    for b in range(batch):
        n = 0
        n_explorable = 0
        while n < width and keys[b, n] != _PADDED:
            candidate = np.int32(keys[b, n] & np.uint64(0xFFFFFFFF))
            order[n] = candidate
            value = utility[b, candidate]
            worth[n] = value if np.isfinite(value) else np.float32(-np.inf)
            n_explorable += int(explorable[b, candidate])
            n += 1
        _order_ties_by_id(order, worth, slots[b], ids, n)
        for p in range(n):
            row[p] = slots[b, order[p]]
        free[:n] = True
        penalty[:n] = 0.0
        compared[:n] = 0
        n_full[:] = 0
        limit = int(limits[b])
        places = min(int(explore_slots[b]), limit, n_explorable)
        state = seeds[b]
        first = n_chosen = n_greedy = n_drawn = n_spare = 0
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
                pool = 0
                for p in range(n):
                    if free[p] and explorable[b, order[p]]:
                        category = categories[row[p]]
                        if _among(full[0], n_full[0], creators[row[p]]) or (
                            category != 0 and _among(full[1], n_full[1], category)
                        ):
                            free[p] = False
                        else:
                            pool += 1
                if pool == 0:
                    places = n_drawn
                    continue
                state += np.uint64(0x9E3779B97F4A7C15)
                left = np.int64(((_splitmix64(state) >> np.uint64(32)) * np.uint64(pool)) >> np.uint64(32))
                best = -1
                while left >= 0:
                    best += 1
                    if free[best] and explorable[b, order[best]]:
                        left -= 1
                drawn[n_drawn] = best
                chance[n_drawn] = np.float32(1.0 / pool)
                n_drawn += 1
                outcome[b, order[best]] = _EXPLORATION
            else:
                while first < n and not free[first]:
                    first += 1
                best = _best(
                    first, n, worth, row, free, penalty, compared, chosen, n_chosen, creators, categories,
                    full, n_full, embeddings, ids, diversity[b],
                )  # fmt: skip
                if best < 0:
                    if phase >= 2:
                        break
                    places = 0  # no candidate is within its caps: nothing to draw either
                    limit = n_greedy
                    continue
                greedy[n_greedy + n_spare] = best
                if phase == 3:
                    n_spare += 1
                    outcome[b, order[best]] = _RESERVE
                else:
                    n_greedy += 1
                    outcome[b, order[best]] = _SLATE
            free[best] = False
            slot = row[best]
            for i in range(embeddings.shape[1]):
                chosen[n_chosen, i] = embeddings[slot, i]
            n_full[0] += _count_place(creators[slot], taken[0], n_chosen, creator_caps[b], full[0, n_full[0] :])
            n_full[1] += _count_place(categories[slot], taken[1], n_chosen, category_caps[b], full[1, n_full[1] :])
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
                category = categories[row[p]]
                if _among(full[0], n_full[0], creators[row[p]]):
                    outcome[b, order[p]] = _CREATOR_CAP
                elif category != 0 and _among(full[1], n_full[1], category):
                    outcome[b, order[p]] = _CATEGORY_CAP
                else:
                    outcome[b, order[p]] = _BELOW_LIMIT
