"""Greedy slate selection for a whole batch: diversity, caps, exploration and reserve.

Maximal marginal relevance (Carbonell and Goldstein, 1998): each step takes the candidate with the greatest
``utility − diversity · max(0, greatest cosine with a selected one)``. That penalty only grows while the slate
grows, so a value computed earlier is an upper bound now, and the utility is one always. The kernel
(`kernels/greedy.py`) computes anew only where that bound reaches the best value seen (lazy greedy; Minoux, 1978),
sixteen candidates at a time, in float32, and in float64 where that leaves more than one. The result is that of the
eager reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from kernels import candidate_order, greedy
from kernels.candidate_order import rank_candidates
from kernels.checks import require_array

ID_BYTES = 64


class Outcome(IntEnum):
    """What became of a candidate; each has exactly one."""

    PADDING = 0  # not a candidate
    SLATE = 1  # chosen for its value
    EXPLORATION = 2  # chosen by chance
    RESERVE = 3  # next in line, used when a chosen one must go
    CREATOR_CAP = 4  # not chosen; by now its creator has as many places as allowed
    CATEGORY_CAP = 5  # not chosen; the same for its category
    BELOW_LIMIT = 6  # not chosen; others were better


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

    Cost: 12·B·K bytes of candidates, 4·D bytes for each that is near the best once, and 2·D flops for each cosine:
    some ten thousand per row while diversity is moderate, (limit + reserve)·K at worst.
    """
    problem = greedy.Problem(
        slots, utility, explorable, creators, categories, embeddings, ids, limits, explore_slots, seeds,
        creator_caps, category_caps, diversity,
    )  # fmt: skip
    keys = _check(problem, reserve)
    keys.sort(axis=1)
    return Slates(*greedy.choose(keys, problem, reserve, greedy.scratch_for(problem, reserve)))


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
    problem = greedy.Problem(
        slots, utility, explorable, creators, categories, embeddings, ids, limits, explore_slots, seeds,
        creator_caps, category_caps, diversity,
    )  # fmt: skip
    _check(problem, reserve)
    slates = _empty(slots, limits, reserve)
    for b in range(slots.shape[0]):
        valid = np.flatnonzero(slots[b] >= 0)
        row = slots[b, valid]
        if np.unique(row).size != row.size:
            raise ValueError(f"slots: row {b} has a slot twice")
        worth = np.where(np.isfinite(utility[b, valid]), utility[b, valid], np.float32(-np.inf))
        names = [ids[slot].tobytes() for slot in row]
        eager = _EagerGreedy(
            worth, names, creators[row], categories[row], embeddings[row],
            int(creator_caps[b]), int(category_caps[b]), diversity[b],
        )  # fmt: skip
        limit = int(limits[b])
        places = min(int(explore_slots[b]), limit, int(explorable[b, valid].sum()))
        slate = eager.take(limit - places)
        pool_order = sorted(range(row.size), key=lambda i: (-worth[i], names[i]))
        state = int(seeds[b])
        drawn: list[tuple[int, float]] = []
        for _ in range(places):
            allowed = eager.allowed()
            pool = [i for i in pool_order if allowed[i] and explorable[b, valid[i]]]
            if not pool:
                break
            state, bits = _splitmix64_reference(state)
            pick = pool[((bits >> 32) * len(pool)) >> 32]
            eager.choose(pick)
            drawn.append((pick, 1.0 / len(pool)))
        slate += eager.take(limit - len(slate) - len(drawn))
        chosen = [(i, 0.0) for i in slate]
        length = len(slate) + len(drawn)
        for j, draw in enumerate(drawn):
            chosen.insert((j + 1) * length // (len(drawn) + 1), draw)
        spare = eager.take(reserve)
        slates.n_slate[b], slates.n_reserve[b] = length, len(spare)
        picks = [*(i for i, _ in chosen), *spare]
        slates.picks[b, : len(picks)] = valid[picks]
        slates.exploration[b, :length] = [propensity for _, propensity in chosen]
        outcome = np.where(eager.category_full(), Outcome.CATEGORY_CAP, Outcome.BELOW_LIMIT)
        outcome[eager.creator_full()] = Outcome.CREATOR_CAP
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


def _check(problem: greedy.Problem, reserve: int) -> NDArray[np.uint64]:
    """Raises for the first bad argument; returns the candidates' keys, see `rank_candidates`."""
    require_array("slots", problem.slots, np.int32, (None, None))
    cells, table = problem.slots.shape, problem.creators.shape
    require_array("utility", problem.utility, np.float32, cells)
    require_array("explorable", problem.explorable, np.bool_, cells)
    require_array("creators", problem.creators, np.int32, (None,))
    require_array("categories", problem.categories, np.int32, table)
    require_array("embeddings", problem.embeddings, np.float32, (table[0], None))
    require_array("ids", problem.ids, np.uint8, (table[0], ID_BYTES))
    for name, dtype in _PER_ROW.items():
        require_array(name, getattr(problem, name), dtype, cells[:1])
    if reserve < 0:
        raise ValueError(f"reserve: must not be negative, got {reserve}")
    keys = np.empty(cells, np.uint64)
    found = rank_candidates(
        problem.slots, problem.utility, table[0], problem.limits, problem.explore_slots, problem.creator_caps,
        problem.category_caps, problem.diversity, keys,
    )  # fmt: skip
    if found != candidate_order.OK:
        raise ValueError(_PROBLEMS[found].format(table[0]))
    return keys


_PER_ROW = {
    "limits": np.int32, "explore_slots": np.int32, "seeds": np.uint64, "creator_caps": np.int32,
    "category_caps": np.int32, "diversity": np.float32,
}  # fmt: skip
_PROBLEMS = {
    candidate_order.BAD_LIMIT: "limits: must be at least 0",
    candidate_order.BAD_EXPLORE_SLOTS: "explore_slots: must be at least 0",
    candidate_order.BAD_CREATOR_CAP: "creator_caps: must be at least 1",
    candidate_order.BAD_CATEGORY_CAP: "category_caps: must be at least 1",
    candidate_order.BAD_DIVERSITY: "diversity: must be finite and not negative",
    candidate_order.BAD_SLOT: "slots: must lie in [-1, {})",
}


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


assert [Outcome.SLATE, Outcome.BELOW_LIMIT] == [greedy.SLATE, greedy.BELOW_LIMIT]  # the numbers written out there
