"""`kernels.counters` on the GPU: events into decayed counters, gauges and sketches; all rows or some at a time.

Events of one batch usually meet in the same rows. Sums of floats depend on their order, so `scatter_decayed` has two
modes; everything else here is a maximum or a last-one-wins by place in the batch, which no order of execution changes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.aot import Compiled
from kernels.checks_gpu import require_tensor
from kernels.counters import HALF_LIVES_MS, LANDMARK_STEP_MS, N_COUNTERS

N_HALF_LIVES = len(HALF_LIVES_MS)
SKETCH_REGISTERS = 128

_BLOCK = 128
_WIDE = 1024  # values per program where each is independent of the others
_STEP = tl.constexpr(4)  # entries a walking lane loads at once
_HALVES = tl.constexpr(N_HALF_LIVES)
_REGISTERS = tl.constexpr(SKETCH_REGISTERS)
_REGISTER_BITS = tl.constexpr(SKETCH_REGISTERS.bit_length() - 1)
_REST = tl.constexpr((1 << (64 - (SKETCH_REGISTERS.bit_length() - 1))) - 1)
_MAX_RANK = tl.constexpr(51)  # kernels.sessions.observe gives up after 50 zeros
_SCALE = tl.constexpr((0.7213 / (1.0 + 1.079 / SKETCH_REGISTERS)) * SKETCH_REGISTERS**2 * 2.0**51)
_FEW = tl.constexpr(2.5 * SKETCH_REGISTERS)


# --- counters -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["entries"])
def _add_atomically(counters_ptr, keys_ptr, amounts_ptr, entries, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    h = tl.arange(0, 4)
    key = tl.load(keys_ptr + at, mask=at < entries, other=0)
    inside = (at < entries)[:, None] & (h < _HALVES)[None, :]
    amount = tl.load(amounts_ptr + at[:, None] * _HALVES + h[None, :], mask=inside, other=0.0)
    tl.atomic_add(counters_ptr + key[:, None] * _HALVES + h[None, :], amount, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=["entries"])
def _add_in_order(counters_ptr, sorted_ptr, order_ptr, amounts_ptr, entries, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    h = tl.arange(0, 4)[None, :]
    key = tl.load(sorted_ptr + at, mask=at < entries, other=-1)
    before = tl.load(sorted_ptr + at - 1, mask=(at > 0) & (at < entries), other=-1)
    # One lane per counter that the batch touches: the one that stands on its first entry.
    walking = (at < entries) & (key != before)
    cell = key[:, None] * _HALVES + h
    owned = walking[:, None] & (h < _HALVES)
    total = tl.load(counters_ptr + cell, mask=owned, other=0.0)
    while tl.max(walking.to(tl.int32), axis=0) != 0:
        for i in tl.static_range(_STEP):
            here = at + i
            # An independent load per step: only the masks, not the addresses, wait for the step before.
            walking = walking & (tl.load(sorted_ptr + here, mask=here < entries, other=-1) == key)
            event = tl.load(order_ptr + here, mask=walking, other=0)
            adds = walking[:, None] & (h < _HALVES)
            amount = tl.load(amounts_ptr + event[:, None] * _HALVES + h, mask=adds, other=0.0)
            total = tl.where(adds, total + amount, total)
        at += _STEP
    tl.store(counters_ptr + cell, total, mask=owned)


def scatter_decayed(counters: torch.Tensor, keys: torch.Tensor, amounts: torch.Tensor, *, deterministic: bool) -> None:
    """Adds m entries of :func:`kernels.counters.grow_events` to ``counters`` float32[C, N_COUNTERS, 3].

    Args:
        keys: int32[m] in 0 .. C * N_COUNTERS - 1, in the order of the events. amounts: float32[m, 3].
        deterministic: entries of one counter are added in their order, so the result equals the CPU's bit for
            bit, and itself when the log is applied again. Otherwise in any order, off by rounding.

    Raises:
        ValueError: an argument has the wrong dtype, shape, layout or device; the message names it.

    Cost: 16 bytes read per entry and one or two 32-byte sectors of the table read and written, so at most 144
    bytes: 100 M entries/s are 14 GB/s, and memory is no limit. Deterministic mode first sorts the keys by a radix
    sort (stable; torch takes about 24 bytes per entry for it), then one lane per counter walks its entries: a
    counter with k entries in the batch takes k dependent additions, and bounds the time when k is large.
    """
    device = counters.device
    require_tensor("counters", counters, torch.float32, (None, N_COUNTERS, N_HALF_LIVES), device)
    require_tensor("keys", keys, torch.int32, (None,), device)
    require_tensor("amounts", amounts, torch.float32, (keys.shape[0], N_HALF_LIVES), device)
    entries = keys.shape[0]
    if entries == 0:
        return
    grid = (triton.cdiv(entries, _BLOCK),)
    if not deterministic:
        _add_atomically[grid](counters, keys, amounts, entries, BLOCK=_BLOCK)
        return
    in_order, order = torch.sort(keys, stable=True)
    _add_in_order[grid](counters, in_order, order, amounts, entries, BLOCK=_BLOCK)


# --- gauges and sketches --------------------------------------------------------------------------


@triton.jit
def _raise_register(words_ptr, row, register, rank, wanted):
    """Byte ``register`` of each row becomes at least ``rank``: there are no 8-bit atomics, so the word around it."""
    pointer = words_ptr + row * (_REGISTERS // 4) + register // 4
    shift = (register % 4) * 8
    word = tl.load(pointer, mask=wanted, other=0)
    waiting = wanted & (((word >> shift) & 0xFF) < rank)
    while tl.max(waiting.to(tl.int32), axis=0) != 0:
        raised = (word & ~(0xFF << shift)) | (rank << shift)
        # A lane that waits for nothing swaps a word for itself; what it sees does not matter.
        seen = tl.atomic_cas(pointer, word, tl.where(waiting, raised, word), sem="relaxed")
        waiting = waiting & (seen != word) & (((seen >> shift) & 0xFF) < rank)
        word = seen


@triton.jit(do_not_specialize=["events"])
def _observe(
    slots_ptr, time_ptr, viewers_ptr, hash_ptr, chat_ptr,
    last_event_ptr, viewers_ms_ptr, viewer_words_ptr, chatter_words_ptr,
    events, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < events
    row = tl.load(slots_ptr + at, mask=inside, other=0)
    time = tl.load(time_ptr + at, mask=inside, other=0)
    # Looking first spares most atomics on a busy row; an old value read here is only ever too small.
    newer = inside & (time > tl.load(last_event_ptr + row, mask=inside, other=0))
    tl.atomic_max(last_event_ptr + row, time, mask=newer, sem="relaxed")
    counted = inside & (tl.load(viewers_ptr + at, mask=inside, other=-1.0) >= 0.0)
    newer = counted & (time > tl.load(viewers_ms_ptr + row, mask=counted, other=0))
    tl.atomic_max(viewers_ms_ptr + row, time, mask=newer, sem="relaxed")

    hashed = tl.load(hash_ptr + at, mask=inside, other=0)
    seen = inside & (hashed != 0)
    if tl.max(seen.to(tl.int32), axis=0) != 0:
        register = (hashed & (_REGISTERS - 1)).to(tl.int32)
        # uint64 lives in int64: what the arithmetic shift brings in at the top is masked away.
        rest = (hashed >> _REGISTER_BITS) & _REST
        zeros = tl.zeros((BLOCK,), tl.int32)
        for power in tl.static_range(6):  # halving 32 … 1: trailing zeros of a 64-bit word
            empty = (rest & ((1 << (32 >> power)) - 1)) == 0
            zeros += tl.where(empty, 32 >> power, 0)
            rest = tl.where(empty, rest >> (32 >> power), rest)
        rank = tl.minimum(zeros + 1, _MAX_RANK)
        _raise_register(viewer_words_ptr, row, register, rank, seen)
        chat = tl.load(chat_ptr + at, mask=seen, other=0) != 0
        _raise_register(chatter_words_ptr, row, register, rank, seen & chat)


@triton.jit(do_not_specialize=["events"])
def _claim_gauge(slots_ptr, time_ptr, viewers_ptr, viewers_ms_ptr, winner_ptr, events, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    counted = (at < events) & (tl.load(viewers_ptr + at, mask=at < events, other=-1.0) >= 0.0)
    row = tl.load(slots_ptr + at, mask=counted, other=0)
    latest = tl.load(viewers_ms_ptr + row, mask=counted, other=0)
    wins = counted & (tl.load(time_ptr + at, mask=counted, other=-1) == latest)
    tl.atomic_max(winner_ptr + row, at, mask=wins, sem="relaxed")


@triton.jit(do_not_specialize=["events"])
def _set_gauge(slots_ptr, viewers_ptr, viewers_now_ptr, winner_ptr, events, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < events
    viewers = tl.load(viewers_ptr + at, mask=inside, other=-1.0)
    row = tl.load(slots_ptr + at, mask=inside, other=0)
    won = inside & (viewers >= 0.0) & (tl.load(winner_ptr + row, mask=inside, other=-1) == at)
    tl.store(viewers_now_ptr + row, viewers, mask=won)
    # At most one event of a row has won, and a row with a winner has one: the column is -1 again for the next batch.
    tl.store(winner_ptr + row, tl.full((BLOCK,), -1, tl.int32), mask=won)


def observe(
    slots: torch.Tensor,
    time_ms: torch.Tensor,
    viewers: torch.Tensor,
    viewer_hash: torch.Tensor,
    is_chat: torch.Tensor,
    *,
    last_event_ms: torch.Tensor,
    viewers_now: torch.Tensor,
    viewers_ms: torch.Tensor,
    viewer_registers: torch.Tensor,
    chatter_registers: torch.Tensor,
    winner: torch.Tensor,
) -> None:
    """:func:`kernels.sessions.observe`, equal to it bit for bit in whatever order the GPU runs.

    Args:
        slots: int32[n], in range. time_ms: int64[n]. viewers: float32[n], -1: not a viewer count.
        viewer_hash: int64[n], 0: none. is_chat: uint8[n].
        last_event_ms, viewers_ms: int64[C]. viewers_now: float32[C].
        viewer_registers, chatter_registers: uint8[C, 128].
        winner: int32[C], -1 everywhere before and after: place in the batch of each row's latest viewer count.

    Three launches, because a row's latest time must be settled before the last event of that time can be found.

    Raises:
        ValueError: an argument has the wrong dtype, shape, layout or device; the message names it.

    Cost: 25 bytes per event three times (they stay in L2), and 4 to 6 scattered sectors of 32 bytes.
    """
    n, device = slots.shape[0], slots.device
    require_tensor("slots", slots, torch.int32, (None,), device)
    require_tensor("time_ms", time_ms, torch.int64, (n,), device)
    require_tensor("viewers", viewers, torch.float32, (n,), device)
    require_tensor("viewer_hash", viewer_hash, torch.int64, (n,), device)
    require_tensor("is_chat", is_chat, torch.uint8, (n,), device)
    require_tensor("last_event_ms", last_event_ms, torch.int64, (None,), device)
    rows = last_event_ms.shape[0]
    require_tensor("viewers_now", viewers_now, torch.float32, (rows,), device)
    require_tensor("viewers_ms", viewers_ms, torch.int64, (rows,), device)
    require_tensor("viewer_registers", viewer_registers, torch.uint8, (rows, SKETCH_REGISTERS), device)
    require_tensor("chatter_registers", chatter_registers, torch.uint8, (rows, SKETCH_REGISTERS), device)
    require_tensor("winner", winner, torch.int32, (rows,), device)
    if n == 0:
        return
    grid = (triton.cdiv(n, _BLOCK),)
    _observe[grid](
        slots, time_ms, viewers, viewer_hash, is_chat, last_event_ms, viewers_ms,
        viewer_registers.view(torch.int32), chatter_registers.view(torch.int32), n, BLOCK=_BLOCK,
    )  # fmt: skip
    _claim_gauge[grid](slots, time_ms, viewers, viewers_ms, winner, n, BLOCK=_BLOCK)
    _set_gauge[grid](slots, viewers, viewers_now, winner, n, BLOCK=_BLOCK)


@triton.jit
def distinct_of_rows(registers_ptr, row, inside, BLOCK: tl.constexpr, STRIP: tl.constexpr):
    """HyperLogLog estimate float32[BLOCK] of each row, looking at STRIP registers at once; also for the features.

    The harmonic sum is one of integers (a rank is at most 51), hence exact in any order.
    """
    total = tl.zeros((BLOCK,), tl.int64)
    zeros = tl.zeros((BLOCK,), tl.int32)
    strip = tl.arange(0, STRIP)[None, :]
    for start in range(0, _REGISTERS, STRIP):
        at = row.to(tl.int64)[:, None] * _REGISTERS + (start + strip)
        rank = tl.load(registers_ptr + at, mask=inside[:, None] & (strip >= 0), other=0).to(tl.int32)
        zeros += tl.sum((rank == 0).to(tl.int32), axis=1)
        one = tl.full((BLOCK, STRIP), 1, tl.int64)
        places = tl.maximum(rank * -1 + _MAX_RANK, 0)  # tensor first: the interpreter wants it so
        total += tl.sum(one << places.to(tl.int64), axis=1)
    wide = tl.zeros((BLOCK,), tl.float64)
    estimate = (wide + _SCALE) / total.to(tl.float64)
    few = (estimate <= _FEW) & (zeros > 0)
    linear = tl.log((wide + _REGISTERS) / tl.maximum(zeros, 1).to(tl.float64)) * _REGISTERS
    return tl.where(few, linear, estimate).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def _estimate(registers_ptr, out_ptr, rows, BLOCK: tl.constexpr, STRIP: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + row, distinct_of_rows(registers_ptr, row, row < rows, BLOCK, STRIP), mask=row < rows)


_ESTIMATE = {"BLOCK": _BLOCK, "STRIP": 16}  # 8 warps: with 4, the 64-bit strip takes 128 registers per thread


def estimate_distinct(registers: torch.Tensor, *, out: torch.Tensor) -> None:
    """:func:`kernels.sessions.estimate_distinct` of uint8[n, 128] into ``out`` float32[n].

    Agrees with the CPU to 1e-6 relative (float64 inside, another logarithm and another order of the sum).

    Raises:
        ValueError: an argument has the wrong dtype, shape, layout or device; the message names it.

    Cost: 132 bytes per row; a logarithm per row.
    """
    require_tensor("registers", registers, torch.uint8, (None, SKETCH_REGISTERS), registers.device)
    rows = registers.shape[0]
    require_tensor("out", out, torch.float32, (rows,), registers.device)
    if rows:
        _estimate[(triton.cdiv(rows, _BLOCK),)](registers, out, rows, **_ESTIMATE, num_warps=8)


# --- rows -----------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["values", "down_1", "down_2", "down_3"])
def _rescale(counters_ptr, values, down_1, down_2, down_3, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    h = at % _HALVES
    down = tl.where(h == 0, down_1, tl.where(h == 1, down_2, down_3)).to(tl.int64)
    # 2^-down by its bits: float64 holds the product exactly, so it is rounded once, as ldexp does.
    factor = ((1023 - down) << 52).to(tl.float64, bitcast=True)
    value = tl.load(counters_ptr + at, mask=at < values, other=0.0)
    tl.store(counters_ptr + at, (value.to(tl.float64) * factor).to(tl.float32), mask=at < values)


_MOST_DOWN = 1000
"""A float32 times 2^-1000 is zero, and 2^-1000 is still an ordinary float64."""


def move_landmark(counters: torch.Tensor, old_ms: int, new_ms: int) -> None:
    """:func:`kernels.counters.move_landmark` of ``counters`` float32[n, N_COUNTERS, 3] in place, bit for bit.

    Raises:
        ValueError: the move is not a positive multiple of LANDMARK_STEP_MS, or ``counters`` is no such tensor.

    Cost: 8 bytes per value, 336 per row.
    """
    require_tensor("counters", counters, torch.float32, (None, N_COUNTERS, N_HALF_LIVES), counters.device)
    step = new_ms - old_ms
    if step <= 0 or step % LANDMARK_STEP_MS:
        raise ValueError(f"new_ms: a positive multiple of {LANDMARK_STEP_MS} after old_ms, not {step}")
    values = counters.numel()
    if values:
        down = [min(step // half_life, _MOST_DOWN) for half_life in HALF_LIVES_MS]
        _rescale[(triton.cdiv(values, _WIDE),)](counters, values, *down, BLOCK=_WIDE)


@triton.jit(do_not_specialize=["listed"])
def _clear(
    slots_ptr, last_event_ptr, viewers_ptr, viewers_ms_ptr, counters_ptr, viewer_words_ptr, chatter_words_ptr,
    listed, BLOCK: tl.constexpr, ROW: tl.constexpr, ROW_PADDED: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < listed
    row = tl.load(slots_ptr + at, mask=inside, other=0).to(tl.int64)
    tl.store(last_event_ptr + row, tl.zeros((BLOCK,), tl.int64), mask=inside)
    tl.store(viewers_ms_ptr + row, tl.zeros((BLOCK,), tl.int64), mask=inside)
    tl.store(viewers_ptr + row, tl.zeros((BLOCK,), tl.float32), mask=inside)
    column = tl.arange(0, ROW_PADDED)[None, :]
    nothing = tl.zeros((BLOCK, ROW_PADDED), tl.float32)
    tl.store(counters_ptr + row[:, None] * ROW + column, nothing, mask=inside[:, None] & (column < ROW))
    word = row[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    empty = tl.zeros((BLOCK, WORDS), tl.int32)
    tl.store(viewer_words_ptr + word, empty, mask=inside[:, None])
    tl.store(chatter_words_ptr + word, empty, mask=inside[:, None])


_ROW = N_COUNTERS * N_HALF_LIVES
_CLEAR = {
    "BLOCK": 32,
    "ROW": _ROW,
    "ROW_PADDED": triton.next_power_of_2(_ROW),
    "WORDS": SKETCH_REGISTERS // 4,
}


def clear_rows(
    slots: torch.Tensor,
    *,
    last_event_ms: torch.Tensor,
    viewers: torch.Tensor,
    viewers_ms: torch.Tensor,
    counters: torch.Tensor,
    viewer_registers: torch.Tensor,
    chatter_registers: torch.Tensor,
) -> None:
    """Zeroes what happened in the sessions of rows ``slots`` int32[n] (a row may be listed twice).

    Raises:
        ValueError: an argument has the wrong dtype, shape, layout or device; the message names it.

    Cost: 448 bytes written per row.
    """
    device = slots.device
    require_tensor("slots", slots, torch.int32, (None,), device)
    require_tensor("last_event_ms", last_event_ms, torch.int64, (None,), device)
    rows = last_event_ms.shape[0]
    require_tensor("viewers", viewers, torch.float32, (rows,), device)
    require_tensor("viewers_ms", viewers_ms, torch.int64, (rows,), device)
    require_tensor("counters", counters, torch.float32, (rows, N_COUNTERS, N_HALF_LIVES), device)
    require_tensor("viewer_registers", viewer_registers, torch.uint8, (rows, SKETCH_REGISTERS), device)
    require_tensor("chatter_registers", chatter_registers, torch.uint8, (rows, SKETCH_REGISTERS), device)
    listed = slots.shape[0]
    if listed:
        _clear[(triton.cdiv(listed, _CLEAR["BLOCK"]),)](
            slots, last_event_ms, viewers, viewers_ms, counters,
            viewer_registers.view(torch.int32), chatter_registers.view(torch.int32), listed, **_CLEAR,
        )  # fmt: skip


AOT = [
    Compiled(_add_atomically, "*fp32 *i32 *fp32 i32", {"BLOCK": _BLOCK}),
    Compiled(_add_in_order, "*fp32 *i32 *i64 *fp32 i32", {"BLOCK": _BLOCK}),
    Compiled(_observe, "*i32 *i64 *fp32 *i64 *u8 *i64 *i64 *i32 *i32 i32", {"BLOCK": _BLOCK}),
    Compiled(_claim_gauge, "*i32 *i64 *fp32 *i64 *i32 i32", {"BLOCK": _BLOCK}),
    Compiled(_set_gauge, "*i32 *fp32 *fp32 *i32 i32", {"BLOCK": _BLOCK}),
    Compiled(_estimate, "*u8 *fp32 i32", _ESTIMATE, num_warps=8),
    Compiled(_rescale, "*fp32 i32 i32 i32 i32", {"BLOCK": _WIDE}),
    Compiled(_clear, "*i32 *i64 *fp32 *i64 *fp32 *i32 *i32 i32", _CLEAR),
]
