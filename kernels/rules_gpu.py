"""Rule bits and boosts on the GPU (`server.rules.bits`): one kernel over rows, all rules of the file at once.

The rules are a table (`kernels.programs.RuleProgram`); reloading the file changes the table, not the kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels import fence
from kernels.aot import Compiled
from kernels.checks_gpu import require_tensor
from kernels.programs import N_BUILT_IN

_BLOCK = 128
_LIVE, _SUSPECT = tl.constexpr(fence.LIVE), tl.constexpr(fence.SUSPECT)
_FREE, _ENDED_STATE = tl.constexpr(fence.FREE), tl.constexpr(fence.ENDED)
_MODERATED_BLOCKED = tl.constexpr(int(fence.MODERATED_BLOCKED))
_MODERATED_SPAM = tl.constexpr(int(fence.MODERATED_SPAM))
_N_BUILT_IN = tl.constexpr(N_BUILT_IN)
_ENDED, _STALE, _BLOCKED, _SPAM_MARKED, _UNASSESSED = (tl.constexpr(1 << i) for i in range(N_BUILT_IN))
_ALL_BUILT_IN = tl.constexpr((1 << N_BUILT_IN) - 1)

UNASSESSED = 1 << (N_BUILT_IN - 1)
"""The bit of a row that no rule has looked at yet."""


class RuleTables(NamedTuple):
    """A `kernels.programs.RuleProgram` on the device, and what producers report."""

    starts: torch.Tensor  # int32[R + 1]
    features: torch.Tensor  # int32[M]
    above: torch.Tensor  # uint8[M]
    enters: torch.Tensor  # float32[M]
    leaves: torch.Tensor  # float32[M]
    boosts: torch.Tensor  # float32[R]
    reported: torch.Tensor  # uint8[F]


class RowState(NamedTuple):
    """The liveness columns that built-in bits follow from, C rows."""

    state: torch.Tensor  # uint8[C]
    lease_expires_ms: torch.Tensor  # int64[C]
    moderation: torch.Tensor  # uint8[C]


@triton.jit
def _built_in(state_ptr, lease_ptr, moderation_ptr, row, inside, now_ms):
    """The built-in bits but UNASSESSED, int32[BLOCK]."""
    state = tl.load(state_ptr + row, mask=inside, other=0)
    lease_ms = tl.load(lease_ptr + row, mask=inside, other=0)
    moderation = tl.load(moderation_ptr + row, mask=inside, other=0)
    lapsed = (state == _SUSPECT) | ((state == _LIVE) & (lease_ms <= now_ms))
    bits = tl.where((state == _ENDED_STATE) | (state == _FREE), _ENDED, 0)
    bits |= tl.where(lapsed, _STALE, 0)
    bits |= tl.where((moderation & _MODERATED_BLOCKED) != 0, _BLOCKED, 0)
    return bits | tl.where((moderation & _MODERATED_SPAM) != 0, _SPAM_MARKED, 0)


@triton.jit(do_not_specialize=["rows", "rules", "now_ms"])
def _assess(
    values_ptr, slots_ptr, starts_ptr, features_ptr, above_ptr, enters_ptr, leaves_ptr, boosts_ptr, reported_ptr,
    state_ptr, lease_ptr, moderation_ptr, bits_ptr, boost_ptr,
    rows, rules, now_ms: tl.int64, FEATURES: tl.constexpr, ALL_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < rows
    row = at if ALL_ROWS else tl.load(slots_ptr + at, mask=inside, other=0)
    before = tl.load(bits_ptr + row, mask=inside, other=0)
    bits = _built_in(state_ptr, lease_ptr, moderation_ptr, row, inside, now_ms)
    boost = tl.zeros((BLOCK,), tl.float32)
    condition = tl.load(starts_ptr)
    rule = 0
    while rule < rules:  # not `range`: the interpreter takes no bounds that are tensors
        bit = 1 << (rule + _N_BUILT_IN)
        was_on = (before & bit) != 0
        on = inside
        last = tl.load(starts_ptr + rule + 1)
        while condition < last:
            feature = tl.load(features_ptr + condition)
            value = tl.load(values_ptr + at.to(tl.int64) * FEATURES + feature, mask=inside, other=0.0)
            enters, leaves = tl.load(enters_ptr + condition), tl.load(leaves_ptr + condition)
            is_above = tl.load(above_ptr + condition) != 0
            above = (value > enters) | (was_on & (value >= leaves))
            below = (value < enters) | (was_on & (value <= leaves))
            # A condition on a feature that no producer reports does not hold.
            holds = ((is_above & above) | ((is_above == 0) & below)) & (tl.load(reported_ptr + feature) != 0)
            on = on & holds
            condition += 1
        bits |= tl.where(on, bit, 0)
        boost += tl.where(on, tl.load(boosts_ptr + rule), 0.0)
        rule += 1
    tl.store(bits_ptr + row, bits, mask=inside)
    tl.store(boost_ptr + row, boost, mask=inside)


@triton.jit(do_not_specialize=["listed", "now_ms"])
def _refresh_built_in(
    slots_ptr, state_ptr, lease_ptr, moderation_ptr, bits_ptr, listed, now_ms: tl.int64, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < listed
    row = tl.load(slots_ptr + at, mask=inside, other=0)
    before = tl.load(bits_ptr + row, mask=inside, other=0)
    kept = before & (~_ALL_BUILT_IN | _UNASSESSED)
    bits = kept | _built_in(state_ptr, lease_ptr, moderation_ptr, row, inside, now_ms)
    tl.store(bits_ptr + row, bits, mask=inside)


def assess(
    values: torch.Tensor,
    slots: torch.Tensor | None,
    tables: RuleTables,
    row_state: RowState,
    *,
    now_ms: int,
    rule_bits: torch.Tensor,
    boost: torch.Tensor,
) -> None:
    """Rule bits and boosts of n rows, in place; afterwards they are assessed (bit UNASSESSED is clear).

    Equal to `server.rules.bits`: ``assess | built_in`` and ``boosts``, given the same values.

    Args:
        values: float32[n, F], features of the rows. slots: int32[n], in range, none twice; None: rows 0 .. n - 1.
        rule_bits: int32[C], bit sets; read as what held so far (hysteresis), then overwritten. boost: float32[C].

    Raises:
        ValueError: an argument has the wrong dtype, shape, layout or device; the message names it.

    Cost: per row 4 bytes per condition (values of neighbouring rows are 4 F bytes apart, so a sector each), 14 of
    state and 12 of bits and boost.
    """
    device = values.device
    require_tensor("values", values, torch.float32, (None, None), device)
    rows, features = values.shape
    require_tensor("rule_bits", rule_bits, torch.int32, (None,), device)
    table = rule_bits.shape[0]
    require_tensor("boost", boost, torch.float32, (table,), device)
    _require_state(row_state, table, device)
    require_tensor("boosts", tables.boosts, torch.float32, (None,), device)
    rules = tables.boosts.shape[0]
    require_tensor("starts", tables.starts, torch.int32, (rules + 1,), device)
    require_tensor("features", tables.features, torch.int32, (None,), device)
    conditions = tables.features.shape[0]
    require_tensor("above", tables.above, torch.uint8, (conditions,), device)
    require_tensor("enters", tables.enters, torch.float32, (conditions,), device)
    require_tensor("leaves", tables.leaves, torch.float32, (conditions,), device)
    require_tensor("reported", tables.reported, torch.uint8, (features,), device)
    if slots is not None:
        require_tensor("slots", slots, torch.int32, (rows,), device)
    elif rows > table:
        raise ValueError(f"values: at most the table's {table} rows, got {rows}")
    if rows == 0:
        return
    _assess[(triton.cdiv(rows, _BLOCK),)](
        values, rule_bits if slots is None else slots, *tables, *row_state, rule_bits, boost, rows, rules, now_ms,
        FEATURES=features, ALL_ROWS=slots is None, BLOCK=_BLOCK,
    )  # fmt: skip


def refresh_built_in(slots: torch.Tensor, row_state: RowState, *, now_ms: int, rule_bits: torch.Tensor) -> None:
    """Takes over blocks, spam marks and ends of rows ``slots`` int32[n] at once; other bits stay.

    Raises:
        ValueError: an argument has the wrong dtype, shape, layout or device; the message names it.

    Cost: 22 bytes per row.
    """
    device = slots.device
    require_tensor("slots", slots, torch.int32, (None,), device)
    require_tensor("rule_bits", rule_bits, torch.int32, (None,), device)
    _require_state(row_state, rule_bits.shape[0], device)
    listed = slots.shape[0]
    if listed:
        _refresh_built_in[(triton.cdiv(listed, _BLOCK),)](
            slots, *row_state, rule_bits, listed, now_ms, BLOCK=_BLOCK
        )  # fmt: skip


def _require_state(row_state: RowState, table: int, device: torch.device) -> None:
    require_tensor("state", row_state.state, torch.uint8, (table,), device)
    require_tensor("lease_expires_ms", row_state.lease_expires_ms, torch.int64, (table,), device)
    require_tensor("moderation", row_state.moderation, torch.uint8, (table,), device)


_TYPES = "*i32 *i32 *u8 *fp32 *fp32 *fp32 *u8 *u8 *i64 *u8 *i32 *fp32 i32 i32 i64"
AOT = [
    Compiled(_assess, f"*fp32 *i32 {_TYPES}", {"FEATURES": 34, "ALL_ROWS": True, "BLOCK": _BLOCK}, label="all rows"),
    Compiled(_assess, f"*fp32 *i32 {_TYPES}", {"FEATURES": 34, "ALL_ROWS": False, "BLOCK": _BLOCK}, label="slots"),
    Compiled(_refresh_built_in, "*i32 *u8 *i64 *u8 *i32 i32 i64", {"BLOCK": _BLOCK}),
]
