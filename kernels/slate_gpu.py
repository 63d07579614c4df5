"""`kernels.slate` on the GPU: one kernel puts candidates in order, one fills slates, a program per request.

Order. A candidate's place in (utility descending, id ascending) is the number of candidates before it, counted
over all pairs: no sort, no ties left, and ids are read only where utilities are equal.

Greedy. Lanes stand in that order, so the best of equal utility is the first lane, and a draw from the pool is a
running count; only values that tie across unequal utilities compare ids. The embeddings of the first lanes, the head,
stay in registers: after each choice one pass over them gives their cosines with it. Where not all fit, the lanes
behind the head learn of choices only when one of them could be best (lazy greedy, as on the CPU: a value computed
earlier is an upper bound now), which is seldom, because they stand behind. Products and sums are rounded apart and
added in one order, so a cosine does not depend on where its row is held.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.aot import Compiled
from kernels.checks_gpu import require_tensor
from kernels.slate import Outcome

ID_WORDS = 8
_BLOCK = 64
_ORDER_WARPS = 8
_HELD_FLOATS = 512 * 64
"""The most that stays in registers, half of an SM's: all that 8 warps can hold beside what they work with."""
_FLOATS_PER_THREAD = 128

_SLATE, _EXPLORATION = tl.constexpr(int(Outcome.SLATE)), tl.constexpr(int(Outcome.EXPLORATION))
_RESERVE, _BELOW_LIMIT = tl.constexpr(int(Outcome.RESERVE)), tl.constexpr(int(Outcome.BELOW_LIMIT))
_CREATOR_CAP, _CATEGORY_CAP = tl.constexpr(int(Outcome.CREATOR_CAP)), tl.constexpr(int(Outcome.CATEGORY_CAP))
_NOWHERE = tl.constexpr(0x7FFF_FFFF)
_NOBODY = tl.constexpr(-(2**63))
_WORDS = tl.constexpr(ID_WORDS)
_TURN, _POOL = tl.constexpr(1 << 3), tl.constexpr(1 << 16)  # units of these in `taken`
_MOST = 1 << 13
"""More places, and more candidates, than this do not fit `taken`."""


@triton.jit
def _worth(utility):
    """Non-finite sinks to -inf; -0.0 equals 0.0."""
    finite = tl.abs(utility) < float("inf")  # false for NaN
    return tl.where(finite, utility + 0.0, float("-inf"))


@triton.jit
def _ascending(value):
    """int32 in the order of float32 values that are neither NaN nor -0.0."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _place_keys(slots_ptr, utility_ptr, at, inside):
    """(slots, int32 keys: ascending is utility descending, padding last)."""
    slot = tl.load(slots_ptr + at, mask=inside, other=-1)
    key = ~_ascending(_worth(tl.load(utility_ptr + at, mask=inside, other=0.0)))
    return slot, tl.where(slot >= 0, key, _NOWHERE)


@triton.jit
def _order(
    slots_ptr, utility_ptr, id_words_ptr, limits_ptr, order_ptr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    if tl.load(limits_ptr + b) > 0:
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        slot_i, key_i = _place_keys(slots_ptr, utility_ptr, b * WIDTH + i, i < WIDTH)
        words_i = id_words_ptr + tl.maximum(slot_i, 0).to(tl.int64) * _WORDS
        before = tl.zeros((BLOCK, BLOCK), tl.int32)
        for start in range(0, WIDTH, BLOCK):
            j = start + tl.arange(0, BLOCK)
            slot_j, key_j = _place_keys(slots_ptr, utility_ptr, b * WIDTH + j, j < WIDTH)
            same = key_i[:, None] == key_j[None, :]
            # Padding, and a slot that is there twice, go by index.
            ahead = (key_j[None, :] < key_i[:, None]) | (same & (j[None, :] < i[:, None]))
            tied = same & (slot_i[:, None] >= 0) & (slot_j[None, :] >= 0) & (i[:, None] != j[None, :])
            word = 0
            words_j = id_words_ptr + tl.maximum(slot_j, 0).to(tl.int64) * _WORDS
            while (word < _WORDS) & (tl.max(tl.max(tied.to(tl.int32), axis=1), axis=0) != 0):
                word_i = tl.load(words_i + word)[:, None]
                word_j = tl.load(words_j + word)[None, :]
                ahead = tl.where(tied & (word_i != word_j), word_j < word_i, ahead)
                tied = tied & (word_i == word_j)
                word += 1
            before += (ahead & (j < WIDTH)[None, :]).to(tl.int32)
        place = tl.sum(before, axis=1)
        packed = (slot_i.to(tl.int64) << 32) | i.to(tl.int64)
        tl.store(order_ptr + b * WIDTH + place, packed, mask=i < WIDTH)


@triton.jit
def _splitmix64(state):
    """64 random bits from a uint64 state that the caller advances by the golden gamma."""
    z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _cosines(embedding_ptr, row, valid, chosen, DIM: tl.constexpr, DIM_PADDED: tl.constexpr):
    """Inner products of rows with one that was chosen; a quad of floats at a time, in the order of `held` below."""
    cosine = tl.zeros(row.shape, tl.float32)
    for first in range(0, DIM_PADDED, 4):
        d = first + tl.arange(0, 4)
        its = tl.load(embedding_ptr + chosen * DIM + d, mask=d < DIM, other=0.0)
        quads = tl.load(
            embedding_ptr + row[:, None] * DIM + d[None, :], mask=valid[:, None] & (d < DIM)[None, :], other=0.0
        )
        cosine += tl.sum(quads * its[None, :], axis=1)
    return cosine


@triton.jit
def _raised(penalty, cosine, segment, SEGMENTS: tl.constexpr):
    """penalty [SEGMENTS * n], that of one segment raised to cosine [n] where this is greater; NaN raises nothing."""
    everywhere = tl.where(tl.arange(0, SEGMENTS)[:, None] == segment, cosine[None, :], 0.0)
    everywhere = tl.reshape(everywhere, penalty.shape)
    return tl.where(everywhere > penalty, everywhere, penalty)


@triton.jit
def _greedy(
    order_ptr, utility_ptr, sources_ptr, creators_ptr, categories_ptr, embedding_ptr, id_words_ptr,
    limits_ptr, explore_ptr, seeds_ptr, creator_caps_ptr, category_caps_ptr, diversity_ptr,
    picks_ptr, exploration_ptr, n_slate_ptr, n_reserve_ptr, outcome_ptr,
    width, picks_width, reserve, explorable_bit,
    SEGMENTS: tl.constexpr, HEAD: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, PICKS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    limit = tl.load(limits_ptr + b)
    order_ptr += b * width
    picks_ptr += b * picks_width
    # Lanes are in order; the first HEAD are the head, whose embeddings are held.
    lane = tl.arange(0, SEGMENTS * HEAD)
    in_head = tl.arange(0, HEAD)
    packed = tl.load(order_ptr + lane, mask=(lane < width) & (limit > 0), other=-1)
    slot = (packed >> 32).to(tl.int32)
    valid = slot >= 0
    candidate = b * width + packed.to(tl.int32)
    row = tl.maximum(slot, 0).to(tl.int64)
    worth = _worth(tl.load(utility_ptr + candidate, mask=valid, other=0.0))
    explorable = valid & ((tl.load(sources_ptr + candidate, mask=valid, other=0) & explorable_bit) != 0)
    creator = tl.load(creators_ptr + row, mask=valid, other=-1)
    category = tl.load(categories_ptr + row, mask=valid, other=0)
    creator_cap, category_cap = tl.load(creator_caps_ptr + b), tl.load(category_caps_ptr + b)
    weight = tl.load(diversity_ptr + b)
    # A row as quads of floats, [HEAD, D / 4, 4]: so laid out, a thread has whole rows and sums without its neighbours.
    quad = tl.arange(0, DIM_PADDED // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    head = tl.load(order_ptr + in_head, mask=(in_head < width) & (limit > 0), other=-1) >> 32
    held = tl.load(
        embedding_ptr + tl.maximum(head, 0)[:, None, None] * DIM + quad[None, :, :],
        mask=(head >= 0)[:, None, None] & (quad < DIM)[None, :, :], other=0.0,
    )  # fmt: skip

    penalty = tl.zeros((SEGMENTS * HEAD,), tl.float32)
    of_creator = tl.zeros((SEGMENTS * HEAD,), tl.int32)  # chosen ones with this lane's creator
    of_category = tl.zeros((SEGMENTS * HEAD,), tl.int32)
    # 0 is free, -1 no candidate; else the outcome, which one of that outcome, and the pool's size for a draw.
    taken = tl.where(valid, 0, -1)
    places = tl.minimum(tl.load(explore_ptr + b), limit)
    places = tl.minimum(places, tl.sum(explorable.to(tl.int32), axis=0))
    state = tl.load(seeds_ptr + b).to(tl.uint64, bitcast=True)
    n_greedy = 0
    n_drawn = 0
    n_spare = 0
    compared = 0  # chosen ones that the penalties behind the head know of
    going = limit > 0
    while going:
        # limit - places greedily, then the draws, then greedily what the draws left open, then the reserve.
        drawing = (n_greedy == limit - places) & (n_drawn < places)
        n_chosen = n_greedy + n_drawn + n_spare
        within = (of_creator < creator_cap) & ((category == 0) | (of_category < category_cap))
        free = (taken == 0) & within
        found = False
        best = 0
        kind = 0
        nth = 0
        size = 0
        if drawing:
            its = tl.load(order_ptr + lane, mask=free, other=0).to(tl.int32)
            its_sources = tl.load(sources_ptr + b * width + its, mask=free, other=0)
            pool = (free & ((its_sources & explorable_bit) != 0)).to(tl.int32)
            size = tl.sum(pool, axis=0)
            if size > 0:
                found = True
                state += 0x9E3779B97F4A7C15
                left = (((_splitmix64(state) >> 32) * size.to(tl.uint64)) >> 32).to(tl.int32)
                counted = tl.cumsum(pool, axis=0)
                best = tl.sum(((pool != 0) & (counted == left + 1)).to(tl.int32) * lane, axis=0)
                kind = _EXPLORATION
                nth = n_drawn
                n_drawn += 1
            else:
                places = n_drawn
        else:
            value = _ascending(worth - tl.where(weight > 0.0, weight * penalty, 0.0))
            key = (value.to(tl.int64) << 32) | (SEGMENTS * HEAD - 1 - lane).to(tl.int64)
            top = tl.max(tl.where(free, key, _NOBODY), axis=0)
            tied = free & (value == (top >> 32).to(tl.int32))
            stale = False
            if SEGMENTS > 1:
                stale = (weight > 0.0) & (compared < n_chosen) & (tl.max(tl.where(tied, lane, 0), axis=0) >= HEAD)
            if top == _NOBODY:
                going = False
            elif stale:
                # One behind the head may be best, by a value that can only be too high: compute it, then look again.
                while compared < n_chosen:
                    earlier = tl.load(order_ptr + tl.load(picks_ptr + compared)) >> 32
                    for s in tl.static_range(1, SEGMENTS):
                        behind = s * HEAD + in_head
                        its_slot = tl.load(order_ptr + behind, mask=behind < width, other=-1) >> 32
                        cosine = _cosines(
                            embedding_ptr, tl.maximum(its_slot, 0), its_slot >= 0, earlier, DIM, DIM_PADDED
                        )
                        penalty = _raised(penalty, cosine, s, SEGMENTS)
                    compared += 1
            else:
                found = True
                best = SEGMENTS * HEAD - 1 - (top & 0xFFFFFFFF).to(tl.int32)
                highest = tl.max(tl.where(tied, worth, float("-inf")), axis=0)
                lowest = tl.min(tl.where(tied, worth, float("inf")), axis=0)
                if highest != lowest:
                    word = 0
                    its_row = tl.load(order_ptr + lane, mask=tied, other=0) >> 32
                    while (word < _WORDS) & (tl.sum(tied.to(tl.int32), axis=0) > 1):
                        words = tl.load(id_words_ptr + its_row * _WORDS + word, mask=tied, other=0)
                        least = tl.min(tl.where(tied, words, 0x7FFFFFFFFFFFFFFF), axis=0)
                        tied = tied & (words == least)
                        word += 1
                    best = tl.min(tl.where(tied, lane, SEGMENTS * HEAD), axis=0)
                if n_greedy + n_drawn == limit:
                    kind = _RESERVE
                    nth = n_spare
                    n_spare += 1
                else:
                    kind = _SLATE
                    nth = n_greedy
                    n_greedy += 1
        if found:
            tl.store(picks_ptr + n_chosen, best)  # in order of choice, until the end
            chosen = tl.load(order_ptr + best) >> 32
            taken = tl.where(lane == best, kind + nth * _TURN + size * _POOL, taken)
            of_creator += (creator == tl.load(creators_ptr + chosen)).to(tl.int32)
            of_category += (category == tl.load(categories_ptr + chosen)).to(tl.int32)
            if weight > 0.0:
                its = tl.load(embedding_ptr + chosen * DIM + quad, mask=quad < DIM, other=0.0)
                cosine = tl.sum(tl.sum(held * its[None, :, :], axis=2), axis=1)
                penalty = _raised(penalty, cosine, 0, SEGMENTS)
            if (n_greedy + n_drawn == limit) & (n_spare == reserve):
                going = False

    tl.debug_barrier()  # before the picks are written over
    length = n_greedy + n_drawn
    picked = taken > 0
    outcome = tl.maximum(taken, 0) % _TURN
    turn = tl.maximum(taken, 0) % _POOL // _TURN
    of_pool = tl.maximum(taken, 0) // _POOL
    chance = tl.where(of_pool > 0, 1.0 / tl.maximum(of_pool, 1).to(tl.float64), 0.0).to(tl.float32)
    at = tl.where(outcome == _EXPLORATION, (turn + 1) * length // (n_drawn + 1), turn)
    j = 0
    while j < n_drawn:
        # Greedy picks make way for the draws, which stand at ascending places.
        at += ((outcome == _SLATE) & ((j + 1) * length // (n_drawn + 1) <= at)).to(tl.int32)
        j += 1
    at = tl.where(outcome == _RESERVE, length + turn, at)
    candidate = tl.where(limit > 0, tl.load(order_ptr + lane, mask=lane < width, other=0).to(tl.int32), lane)
    tl.store(picks_ptr + at, candidate, mask=picked)
    tl.store(exploration_ptr + b * picks_width + at, chance, mask=picked)
    place = tl.arange(0, PICKS)
    unused = (place >= length + n_spare) & (place < picks_width)
    tl.store(picks_ptr + place, -1, mask=unused)
    tl.store(exploration_ptr + b * picks_width + place, 0.0, mask=unused)
    tl.store(n_slate_ptr + b, length)
    tl.store(n_reserve_ptr + b, n_spare)
    full = tl.where((category != 0) & (of_category >= category_cap), _CATEGORY_CAP, _BELOW_LIMIT)
    full = tl.where(of_creator >= creator_cap, _CREATOR_CAP, full)
    outcome = tl.where(picked, outcome, tl.where(taken == 0, full, 0))
    tl.store(outcome_ptr + b * width + candidate, outcome.to(tl.uint8), mask=lane < width)


def select_slates(
    slots: torch.Tensor,
    utility: torch.Tensor,
    sources: torch.Tensor,
    creators: torch.Tensor,
    categories: torch.Tensor,
    embeddings: torch.Tensor,
    id_words: torch.Tensor,
    limits: torch.Tensor,
    explore_slots: torch.Tensor,
    seeds: torch.Tensor,
    creator_caps: torch.Tensor,
    category_caps: torch.Tensor,
    diversity: torch.Tensor,
    reserve: int,
    *,
    explorable_bit: int,
    order: torch.Tensor,
    picks: torch.Tensor,
    exploration: torch.Tensor,
    n_slate: torch.Tensor,
    n_reserve: torch.Tensor,
    outcome: torch.Tensor,
) -> None:
    """:func:`kernels.slate.select_slates` into the columns of :class:`kernels.slate.Slates`.

    A row with limit 0 is padding: it gets no slate and no reserve, and all its outcomes are PADDING.

    Args:
        slots: int32[B, K] in [-1, C); -1 (anywhere) is padding, no slot twice in a row. utility: float32[B, K].
        sources: int32[B, K], bit set; a candidate with ``explorable_bit`` may fill an exploration place.
        creators, categories: int32[C]. embeddings: float32[C, D], rows of unit length or all zero.
        id_words: int64[C, 8], the zero-padded ids as big-endian words, each XOR 1 << 63.
        limits, explore_slots (>= 0), creator_caps, category_caps (>= 1): int32[B]. seeds: int64[B], bits of uint64.
        diversity: float32[B], finite, >= 0. reserve: >= 0. Values of tensors are not looked at.
        order: int64[B, K], work buffer.
        picks: int32[B, W], exploration: float32[B, W]; W at least the greatest limit + reserve.
        n_slate, n_reserve: int32[B]. outcome: uint8[B, K].

    Equals the CPU but for cosines: they are float32 sums here and float64 sums there, so a cosine may differ by
    D / 2 · 2^-23 at most (4e-6 at D = 64; 1e-7 is usual), a value by diversity times that, and where two values
    are closer than this, the other one may be chosen. Equal rows have equal cosines, and the rest of a value is
    rounded as on the CPU, so exact ties are the same ties.

    Raises:
        ValueError: an argument has the wrong dtype, shape, layout or device; the message names it.

    Cost: order: K² comparisons per row, 4 instructions each. Greedy: (limit + reserve) · 2 K D flops per row;
    12 K bytes of candidates and 4 K D of embeddings once. With K D > 32,768 half as many rows are in the head, and
    the rest is read from L2 again for each choice that it must learn of.

    On an H100 a step at K = 512, D = 64 is 128 products and 128 sums per thread of 8 warps, 512 cycles of an SM's
    four schedulers; 16 broadcast loads of the chosen row, 128 cycles; two to four reductions with their barriers,
    400; two dependent reads of L2 (the row's slot, its columns), 500. 70 steps take about 110,000 cycles, 65 µs at
    1.7 GHz; 256 requests are two turns of 132 SMs (registers let one program stay on each), 0.13 ms; order adds
    0.01 ms. The floors: 1.2 GFLOP at 60 TFLOP/s, 0.02 ms; 34 MB of embeddings at 3 TB/s, 0.01 ms. Latency of the
    chain of choices bounds it, not arithmetic. Reasoned from instruction counts, not measured.
    """
    batch, width = slots.shape
    device = slots.device
    require_tensor("slots", slots, torch.int32, (None, None), device)
    require_tensor("utility", utility, torch.float32, (batch, width), device)
    require_tensor("sources", sources, torch.int32, (batch, width), device)
    require_tensor("creators", creators, torch.int32, (None,), device)
    require_tensor("categories", categories, torch.int32, creators.shape, device)
    require_tensor("embeddings", embeddings, torch.float32, (creators.shape[0], None), device)
    require_tensor("id_words", id_words, torch.int64, (creators.shape[0], ID_WORDS), device)
    columns = (limits, explore_slots, creator_caps, category_caps)
    for name, column in zip(("limits", "explore_slots", "creator_caps", "category_caps"), columns, strict=True):
        require_tensor(name, column, torch.int32, (batch,), device)
    require_tensor("seeds", seeds, torch.int64, (batch,), device)
    require_tensor("diversity", diversity, torch.float32, (batch,), device)
    require_tensor("order", order, torch.int64, (batch, width), device)
    require_tensor("picks", picks, torch.int32, (batch, None), device)
    require_tensor("exploration", exploration, torch.float32, picks.shape, device)
    require_tensor("n_slate", n_slate, torch.int32, (batch,), device)
    require_tensor("n_reserve", n_reserve, torch.int32, (batch,), device)
    require_tensor("outcome", outcome, torch.uint8, (batch, width), device)
    if width > _MOST or picks.shape[1] > _MOST:
        raise ValueError(f"slots, picks: at most {_MOST} wide, got {width} and {picks.shape[1]}")
    if not 0 <= reserve <= picks.shape[1]:
        raise ValueError(f"reserve: 0 to {picks.shape[1]} (the width of picks) allowed, got {reserve}")
    if batch == 0:
        return
    if width:
        _order[(batch, triton.cdiv(width, _BLOCK))](
            slots, utility, id_words, limits, order, WIDTH=width, BLOCK=_BLOCK, num_warps=_ORDER_WARPS
        )
    constants = _constants(width, embeddings.shape[1], picks.shape[1])
    _greedy[(batch,)](
        order, utility, sources, creators, categories, embeddings, id_words,
        limits, explore_slots, seeds, creator_caps, category_caps, diversity,
        picks, exploration, n_slate, n_reserve, outcome,
        width, picks.shape[1], reserve, explorable_bit,
        **constants, num_warps=_warps(constants), enable_fp_fusion=False,
    )  # fmt: skip


def _constants(width: int, dim: int, picks_width: int) -> dict[str, int]:
    """What the greedy kernel is compiled for."""
    k, dim_padded = triton.next_power_of_2(max(16, width)), triton.next_power_of_2(max(4, dim))
    # All rows; or if those are too many, half as many as fit, so that registers are left for more lanes.
    head = k if k * dim_padded <= _HELD_FLOATS else min(k, max(16, _HELD_FLOATS // 2 // dim_padded))
    return {
        "SEGMENTS": k // head,
        "HEAD": head,
        "DIM": dim,
        "DIM_PADDED": dim_padded,
        "PICKS": triton.next_power_of_2(max(1, picks_width)),
    }


def _warps(constants: dict[str, int]) -> int:
    """As many as hold 128 floats of embeddings per thread, of its 255 registers; 8 fill an SM."""
    threads = constants["SEGMENTS"] * constants["HEAD"] * constants["DIM_PADDED"] // _FLOATS_PER_THREAD
    return min(8, max(1, threads // 32))


def _greedy_at(width: int) -> Compiled:
    constants = _constants(width, 64, 120)
    types = (
        "*i64 *fp32 *i32 *i32 *i32 *fp32 *i64 *i32 *i32 *i64 *i32 *i32 *fp32 *i32 *fp32 *i32 *i32 *u8 i32 i32 i32 i32"
    )
    return Compiled(_greedy, types, constants, num_warps=_warps(constants), fp_fusion=False, label=f"K={width}")


AOT = [
    Compiled(_order, "*i32 *fp32 *i64 *i32 *i64", {"WIDTH": 512, "BLOCK": _BLOCK}, num_warps=_ORDER_WARPS),
    _greedy_at(256),
    _greedy_at(512),
    _greedy_at(1024),
]
