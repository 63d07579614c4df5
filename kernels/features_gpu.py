"""`FeatureSet.compute` on the GPU: one kernel evaluates any declaration, a row per lane.

The declaration is a table of codes (kernels/programs.py). A program walks it for a block of rows; all its lanes take
the same branch, because the code is the same for every row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.aot import Compiled
from kernels.checks_gpu import require_tensor
from kernels.counters import COUNTERS, HALF_LIVES_MS, MIN_AGE_MS, N_COUNTERS, decay_factors
from kernels.counters_gpu import N_HALF_LIVES, SKETCH_REGISTERS, distinct_of_rows
from kernels.programs import PER_MINUTE, Code, Number, Op

_BLOCK = 128
_STRIP = tl.constexpr(8)  # of sketch registers; 16 would double the registers that a thread takes
_ROW = tl.constexpr(N_COUNTERS * N_HALF_LIVES)
_HALVES = tl.constexpr(N_HALF_LIVES)
_CODES, _NUMBERS = tl.constexpr(len(Code)), tl.constexpr(len(Number))
_VIEWERS, _REPORTS = tl.constexpr(COUNTERS.index("viewers")), tl.constexpr(COUNTERS.index("viewer_reports"))
_MIN_AGE_MS = tl.constexpr(MIN_AGE_MS)
_HALF_1, _HALF_2, _HALF_3 = (tl.constexpr(float(h)) for h in HALF_LIVES_MS)
_PER_MINUTE_1, _PER_MINUTE_2, _PER_MINUTE_3 = (tl.constexpr(p) for p in PER_MINUTE)
_OF, _PER = tl.constexpr(int(Code.OF)), tl.constexpr(int(Code.PER))
_FAST, _MID, _SLOW = tl.constexpr(int(Code.FAST)), tl.constexpr(int(Code.MID)), tl.constexpr(int(Code.SLOW))
_STALE_AFTER_MS = tl.constexpr(int(Code.STALE_AFTER_MS))
_PRIOR = tl.constexpr(int(Number.PRIOR))
_AGE, _STALENESS, _GAUGE = tl.constexpr(int(Op.AGE)), tl.constexpr(int(Op.STALENESS)), tl.constexpr(int(Op.GAUGE))
_LEVEL, _VELOCITY = tl.constexpr(int(Op.LEVEL)), tl.constexpr(int(Op.VELOCITY))
_ACCELERATION, _DIFFERENCE = tl.constexpr(int(Op.ACCELERATION)), tl.constexpr(int(Op.DIFFERENCE))
_RATIO, _PER_VIEWER = tl.constexpr(int(Op.RATIO)), tl.constexpr(int(Op.PER_VIEWER))
_UNIQUE, _ATTRIBUTE = tl.constexpr(int(Op.UNIQUE)), tl.constexpr(int(Op.ATTRIBUTE))
_PRESENT, _MISSING, _STALE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # server.live.features.State


class FeatureColumns(NamedTuple):
    """The device columns that features are made of, C rows; attributes as int32[C]."""

    started_ms: torch.Tensor  # int64[C]
    last_event_ms: torch.Tensor  # int64[C]
    viewers: torch.Tensor  # float32[C]
    viewers_ms: torch.Tensor  # int64[C]
    counters: torch.Tensor  # float32[C, N_COUNTERS, 3]
    viewer_registers: torch.Tensor  # uint8[C, 128]
    chatter_registers: torch.Tensor  # uint8[C, 128]
    age_rating: torch.Tensor  # int32[C]
    language: torch.Tensor  # int32[C]
    category: torch.Tensor  # int32[C]


@triton.jit
def _of_half(h, first, second, third):
    """The one of three that belongs to half-life number ``h``."""
    return tl.where(h == 0, first, tl.where(h == 1, second, third))


@triton.jit
def _sum(counters_ptr, row, inside, counter, h, decay):
    """Decayed sum of a counter, float32[BLOCK]."""
    return tl.load(counters_ptr + row * _ROW + counter * _HALVES + h, mask=inside, other=0.0) * decay


@triton.jit
def _saturation(age_ms, half_life_ms):
    """float32[BLOCK], see kernels.counters.saturation."""
    return (1.0 - tl.exp2(age_ms.to(tl.float64) * -1.0 / half_life_ms)).to(tl.float32)


@triton.jit
def _level(counters_ptr, row, inside, counter, h, decay, per_minute, full):
    """Mean of the viewer gauge or per-minute rate of another counter; and which rows have one, as int32."""
    total = _sum(counters_ptr, row, inside, counter, h, decay)
    if counter == _VIEWERS:
        reports = _sum(counters_ptr, row, inside, _REPORTS, h, decay)
        level = tl.div_rn(total, tl.maximum(reports, 1e-6))
        seen = (reports > 1e-6).to(tl.int32)
    else:
        level = tl.div_rn(total * per_minute, full)
        seen = (total > 0.0).to(tl.int32)
    return level, seen


@triton.jit(do_not_specialize=["rows", "now_ms"])
def _compute(
    slots_ptr, started_ptr, last_event_ptr, viewers_ptr, viewers_ms_ptr, counters_ptr,
    viewer_registers_ptr, chatter_registers_ptr, age_rating_ptr, language_ptr, category_ptr,
    codes_ptr, numbers_ptr, values_ptr, states_ptr,
    rows, now_ms: tl.int64, decay_1, decay_2, decay_3,
    FEATURES: tl.constexpr, ALL_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < rows
    row = (at if ALL_ROWS else tl.load(slots_ptr + at, mask=inside, other=0)).to(tl.int64)
    age_ms = now_ms - tl.load(started_ptr + row, mask=inside, other=0)
    window_ms = tl.maximum(age_ms, _MIN_AGE_MS)
    full_1 = _saturation(window_ms, _HALF_1)
    full_2 = _saturation(window_ms, _HALF_2)
    full_3 = _saturation(window_ms, _HALF_3)
    for f in range(FEATURES):
        code = codes_ptr + f * _CODES
        op = tl.load(code)
        of = tl.load(code + _OF)
        prior = tl.load(numbers_ptr + f * _NUMBERS + _PRIOR)
        value = tl.zeros((BLOCK,), tl.float32)
        present = inside.to(tl.int32)
        stale = tl.zeros((BLOCK,), tl.int32)
        if op == _AGE:
            value = tl.maximum(age_ms.to(tl.float64) / 60000.0, 0.0).to(tl.float32)
        elif op == _STALENESS:
            last = tl.load(last_event_ptr + row, mask=inside, other=0)
            value = tl.maximum((now_ms - last).to(tl.float64) / 1000.0, 0.0).to(tl.float32)
            present = (last > 0).to(tl.int32)
        elif op == _GAUGE:
            reported_ms = tl.load(viewers_ms_ptr + row, mask=inside, other=0)
            value = tl.load(viewers_ptr + row, mask=inside, other=0.0)
            present = (reported_ms > 0).to(tl.int32)
            stale = (now_ms - reported_ms > tl.load(code + _STALE_AFTER_MS)).to(tl.int32)
        elif op == _RATIO:
            h = tl.load(code + _FAST)
            decay = _of_half(h, decay_1, decay_2, decay_3)
            per = _sum(counters_ptr, row, inside, tl.load(code + _PER), h, decay)
            value = tl.div_rn(_sum(counters_ptr, row, inside, of, h, decay), per + prior)
            present = (per > 0.0).to(tl.int32)
        elif op == _UNIQUE:
            if of == 0:
                value = distinct_of_rows(viewer_registers_ptr, row, inside, BLOCK, _STRIP)
            else:
                value = distinct_of_rows(chatter_registers_ptr, row, inside, BLOCK, _STRIP)
            present = (value > 0.0).to(tl.int32)
        elif op == _ATTRIBUTE:
            if of == 0:
                value = tl.load(age_rating_ptr + row, mask=inside, other=0).to(tl.float32)
            elif of == 1:
                value = tl.load(language_ptr + row, mask=inside, other=0).to(tl.float32)
            else:
                value = tl.load(category_ptr + row, mask=inside, other=0).to(tl.float32)
        else:
            h = tl.load(code + _FAST)
            decay = _of_half(h, decay_1, decay_2, decay_3)
            per_minute = _of_half(h, _PER_MINUTE_1, _PER_MINUTE_2, _PER_MINUTE_3)
            full = _of_half(h, full_1, full_2, full_3)
            fast, present = _level(counters_ptr, row, inside, of, h, decay, per_minute, full)
            if op == _LEVEL:
                value = fast
            elif op == _PER_VIEWER:
                viewers, present = _level(counters_ptr, row, inside, _VIEWERS, h, decay, per_minute, full)
                value = tl.div_rn(fast, viewers + prior)
            else:
                h = tl.load(code + _SLOW)
                decay = _of_half(h, decay_1, decay_2, decay_3)
                per_minute = _of_half(h, _PER_MINUTE_1, _PER_MINUTE_2, _PER_MINUTE_3)
                full = _of_half(h, full_1, full_2, full_3)
                slow, _ = _level(counters_ptr, row, inside, of, h, decay, per_minute, full)
                if op == _DIFFERENCE:
                    value = fast - slow
                elif op == _VELOCITY:
                    value = tl.div_rn(fast + 1.0, slow + 1.0)
                else:
                    h = tl.load(code + _MID)
                    decay = _of_half(h, decay_1, decay_2, decay_3)
                    per_minute = _of_half(h, _PER_MINUTE_1, _PER_MINUTE_2, _PER_MINUTE_3)
                    full = _of_half(h, full_1, full_2, full_3)
                    mid, _ = _level(counters_ptr, row, inside, of, h, decay, per_minute, full)
                    value = tl.div_rn(tl.div_rn(fast + 1.0, mid + 1.0), tl.div_rn(mid + 1.0, slow + 1.0))
        # A difference with itself is 0 for finite values and NaN for the others.
        there = (present != 0) & (value - value == 0.0)
        value = tl.where(there, value, tl.load(numbers_ptr + f * _NUMBERS))
        state = tl.where(there, tl.where(stale != 0, _STALE, _PRESENT), _MISSING)
        out = at.to(tl.int64) * FEATURES + f
        tl.store(values_ptr + out, value, mask=inside)
        tl.store(states_ptr + out, state.to(tl.uint8), mask=inside)


def compute(
    columns: FeatureColumns,
    slots: torch.Tensor | None,
    codes: torch.Tensor,
    numbers: torch.Tensor,
    *,
    now_ms: int,
    landmark_ms: int,
    values: torch.Tensor,
    states: torch.Tensor,
) -> None:
    """Features of n rows into ``values`` float32[n, F] and ``states`` uint8[n, F], as ``FeatureSet.compute``.

    Args:
        slots: int32[n], in range; None: rows 0 .. n - 1.
        codes: int64[F, 7], numbers: float32[F, 2]: the tables of a `FeatureProgram`.

    Agrees with the CPU to 1e-6 relative, a difference to 1e-6 of the larger operand: every float32 operation is
    rounded as NumPy rounds it (no fused multiply-add, divisions exact), so what differs is the last bit of a float64
    power (before it is rounded to float32) and of a distinct estimate. States are equal: each rests on a comparison
    of values that both sides compute alike.

    Raises:
        ValueError: an argument has the wrong dtype, shape, layout or device; the message names it.

    Cost: 468 bytes read per row (168 counters, 256 registers, the rest times and attributes) and 5 F written; about
    60 float32 operations and 4 float64 functions per row. On a GPU the lanes of a warp read counters of 32 rows,
    168 bytes apart: each load touches 32 sectors, of which a block's 21 KB stay in L1 until they are used up. The
    floor on an H100 for 1 M rows and 34 features is 640 MB, 0.2 ms.
    """
    device = columns.started_ms.device
    require_tensor("started_ms", columns.started_ms, torch.int64, (None,), device)
    table = columns.started_ms.shape[0]
    require_tensor("last_event_ms", columns.last_event_ms, torch.int64, (table,), device)
    require_tensor("viewers", columns.viewers, torch.float32, (table,), device)
    require_tensor("viewers_ms", columns.viewers_ms, torch.int64, (table,), device)
    require_tensor("counters", columns.counters, torch.float32, (table, N_COUNTERS, N_HALF_LIVES), device)
    require_tensor("viewer_registers", columns.viewer_registers, torch.uint8, (table, SKETCH_REGISTERS), device)
    require_tensor("chatter_registers", columns.chatter_registers, torch.uint8, (table, SKETCH_REGISTERS), device)
    for name in ("age_rating", "language", "category"):
        require_tensor(name, getattr(columns, name), torch.int32, (table,), device)
    require_tensor("codes", codes, torch.int64, (None, len(Code)), device)
    features = codes.shape[0]
    require_tensor("numbers", numbers, torch.float32, (features, len(Number)), device)
    require_tensor("values", values, torch.float32, (None, features), device)
    rows = values.shape[0]
    require_tensor("states", states, torch.uint8, (rows, features), device)
    if slots is not None:
        require_tensor("slots", slots, torch.int32, (rows,), device)
    elif rows > table:
        raise ValueError(f"values: at most the table's {table} rows, got {rows}")
    if rows == 0 or features == 0:
        return
    decay = (float(factor) for factor in decay_factors(now_ms, landmark_ms))
    _compute[(triton.cdiv(rows, _BLOCK),)](
        values if slots is None else slots, *columns, codes, numbers, values, states, rows, now_ms, *decay,
        FEATURES=features, ALL_ROWS=slots is None, BLOCK=_BLOCK, enable_fp_fusion=False,
    )  # fmt: skip


_TYPES = "*i64 *i64 *fp32 *i64 *fp32 *u8 *u8 *i32 *i32 *i32 *i64 *fp32 *fp32 *u8 i32 i64 fp32 fp32 fp32"
AOT = [
    Compiled(_compute, f"*fp32 {_TYPES}", {"FEATURES": 34, "ALL_ROWS": True, "BLOCK": _BLOCK}, label="all rows"),
    Compiled(_compute, f"*i32 {_TYPES}", {"FEATURES": 34, "ALL_ROWS": False, "BLOCK": _BLOCK}, label="slots"),
]
