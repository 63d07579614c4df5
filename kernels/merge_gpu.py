"""`kernels.merge` on the GPU: a program per request compares each proposal with all others and with the excluded.

Lists are short (some hundred), so counting over all pairs takes less than a sort, and it needs no work buffer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.aot import Compiled
from kernels.checks_gpu import require_tensor

_BLOCK, _OTHERS = 128, 16
_WARPS = 8
# What a proposal learns of the others of its slot, above the bits of the view's sources.
_EARLIER, _EXCLUDED = tl.constexpr(1 << 30), tl.constexpr(1 << 29)
_PERSONAL, _FOLLOWED = tl.constexpr(1 << 28), tl.constexpr(1 << 27)
SOURCE_BITS = 27


@triton.jit
def _proposals(
    view_slots_ptr, view_sources_ptr, personal_ptr, followed_ptr, excluded_ptr, b, v, view_limit, personal_limit,
    column,
    VIEW: tl.constexpr, PERSONAL: tl.constexpr, FOLLOWED: tl.constexpr, EXCLUDED: tl.constexpr,
):  # fmt: skip
    """Columns of (view, personal, followed, excluded), one after the other: (slots, -1: none; what they say)."""
    in_view = column < tl.minimum(view_limit, VIEW)
    slot = tl.load(view_slots_ptr + v * VIEW + column, mask=in_view, other=-1)
    says = tl.load(view_sources_ptr + v * VIEW + column, mask=in_view, other=0)
    at = column - VIEW
    inside = (at >= 0) & (at < tl.minimum(personal_limit, PERSONAL))
    slot = tl.where(inside, tl.load(personal_ptr + b * PERSONAL + at, mask=inside, other=-1), slot)
    says = tl.where(inside, _PERSONAL, says)
    at -= PERSONAL
    inside = (at >= 0) & (at < FOLLOWED)
    slot = tl.where(inside, tl.load(followed_ptr + b * FOLLOWED + at, mask=inside, other=-1), slot)
    says = tl.where(inside, _FOLLOWED, says)
    at -= FOLLOWED
    inside = (at >= 0) & (at < EXCLUDED)
    slot = tl.where(inside, tl.load(excluded_ptr + b * EXCLUDED + at, mask=inside, other=-1), slot)
    return slot, tl.where(inside, _EXCLUDED, says)


@triton.jit
def _merge(
    view_slots_ptr, view_sources_ptr, filter_of_ptr, personal_ptr, followed_ptr, excluded_ptr,
    view_limits_ptr, params_ptr, slots_ptr, sources_ptr, counts_ptr, dropped_ptr,
    personal_bit, followed_bit,
    VIEW: tl.constexpr, PERSONAL: tl.constexpr, FOLLOWED: tl.constexpr, EXCLUDED: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    v = tl.load(filter_of_ptr + b).to(tl.int64)
    view_limit, personal_limit = tl.load(view_limits_ptr + b), tl.load(params_ptr + 6).to(tl.int32)
    n_kept = tl.zeros((BLOCK,), tl.int32)
    n_dropped = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        slot, _ = _proposals(
            view_slots_ptr, view_sources_ptr, personal_ptr, followed_ptr, excluded_ptr, b, v,
            view_limit, personal_limit, column, VIEW, PERSONAL, FOLLOWED, EXCLUDED,
        )  # fmt: skip
        valid = (slot >= 0) & (column < VIEW + PERSONAL + FOLLOWED)
        learnt = tl.zeros((BLOCK, OTHERS), tl.int32)
        for first in range(0, VIEW + PERSONAL + FOLLOWED + EXCLUDED, OTHERS):
            other = first + tl.arange(0, OTHERS)
            theirs, says = _proposals(
                view_slots_ptr, view_sources_ptr, personal_ptr, followed_ptr, excluded_ptr, b, v,
                view_limit, personal_limit, other, VIEW, PERSONAL, FOLLOWED, EXCLUDED,
            )  # fmt: skip
            says = tl.where(other[None, :] < column[:, None], says[None, :] | _EARLIER, says[None, :])
            learnt |= tl.where(slot[:, None] == theirs[None, :], says, 0)
        gone = tl.max(learnt & _EXCLUDED, axis=1) != 0
        distinct = valid & (tl.max(learnt & _EARLIER, axis=1) == 0)
        # At most one column of the view is this slot, so its bits are the greatest.
        bits = tl.max(learnt & (_FOLLOWED - 1), axis=1)
        bits |= tl.where(tl.max(learnt & _PERSONAL, axis=1) != 0, personal_bit, 0)
        bits |= tl.where(tl.max(learnt & _FOLLOWED, axis=1) != 0, followed_bit, 0)
        kept = distinct & (gone == 0)
        n_kept += kept.to(tl.int32)
        n_dropped += (distinct & gone).to(tl.int32)
        tl.store(slots_ptr + b * WIDTH + column, tl.where(kept, slot, -1), mask=column < WIDTH)
        tl.store(sources_ptr + b * WIDTH + column, tl.where(kept, bits, 0), mask=column < WIDTH)
    tl.store(counts_ptr + b, tl.sum(n_kept, axis=0))
    tl.store(dropped_ptr + b, tl.sum(n_dropped, axis=0))


def merge_candidates(
    view_slots: torch.Tensor,
    view_sources: torch.Tensor,
    filter_of: torch.Tensor,
    personal: torch.Tensor,
    personal_bit: int,
    followed: torch.Tensor,
    followed_bit: int,
    excluded: torch.Tensor,
    view_limits: torch.Tensor,
    params: torch.Tensor,
    *,
    slots: torch.Tensor,
    sources: torch.Tensor,
    counts: torch.Tensor,
    dropped: torch.Tensor,
) -> None:
    """:func:`kernels.merge.merge_candidates`: a filter's view, then personal, then followed, less the excluded.

    Args:
        view_slots, view_sources: int32[V, Wv]; a slot at most once per row, source bits below 1 << 27.
        filter_of: int32[B], row of the views. personal: int32[B, P], followed: int32[B, Wf], excluded: int32[B, We];
            in all of them -1 (anywhere) is none, and a slot may be there twice.
        personal_bit, followed_bit: below 1 << 27.
        view_limits: int32[B], params: int64[8]; a request takes the first view_limits[b] of its view and the first
            params[6] of its personal proposals, so that less is scored under pressure.
        slots, sources: int32[B, W], W >= Wv + P + Wf. A distinct proposal stands at the column of its first one,
            so the order is that of the CPU; the columns between hold -1 and no source.
        counts, dropped: int32[B], distinct proposals kept and dropped as excluded. kept + dropped = distinct.

    Raises:
        ValueError: an argument has the wrong dtype, shape, layout or device; the message names it.

    Cost: n · (n + We) comparisons per request, n = Wv + P + Wf, 5 instructions each, and 20 n bytes. With n = 512
    and We = 64 1.5 M instructions, 12,000 cycles of an H100's SM: 7 µs for one request, 14 µs for 256 on 132 SMs.
    A sort of these rows as int64 keys (16 passes of 4 bits in cub's block sort) is no faster and reads and writes
    keys and indices.
    """
    v, view = view_slots.shape
    batch, device = filter_of.shape[0], view_slots.device
    require_tensor("view_slots", view_slots, torch.int32, (None, None), device)
    require_tensor("view_sources", view_sources, torch.int32, (v, view), device)
    require_tensor("filter_of", filter_of, torch.int32, (None,), device)
    for name, proposals in (("personal", personal), ("followed", followed), ("excluded", excluded)):
        require_tensor(name, proposals, torch.int32, (batch, None), device)
    require_tensor("view_limits", view_limits, torch.int32, (batch,), device)
    require_tensor("params", params, torch.int64, (8,), device)
    require_tensor("slots", slots, torch.int32, (batch, None), device)
    require_tensor("sources", sources, torch.int32, slots.shape, device)
    require_tensor("counts", counts, torch.int32, (batch,), device)
    require_tensor("dropped", dropped, torch.int32, (batch,), device)
    for name, bit in (("personal_bit", personal_bit), ("followed_bit", followed_bit)):
        if not 0 < bit < 1 << SOURCE_BITS:
            raise ValueError(f"{name}: must be positive and below 1 << {SOURCE_BITS}, got {bit}")
    needed = view + personal.shape[1] + followed.shape[1]
    if slots.shape[1] < needed:
        raise ValueError(f"slots: must be at least {needed} wide (view + personal + followed), got {slots.shape[1]}")
    if batch == 0:
        return
    _merge[(batch,)](
        view_slots, view_sources, filter_of, personal, followed, excluded, view_limits, params,
        slots, sources, counts, dropped, personal_bit, followed_bit,
        VIEW=view, PERSONAL=personal.shape[1], FOLLOWED=followed.shape[1], EXCLUDED=excluded.shape[1],
        WIDTH=slots.shape[1], BLOCK=_BLOCK, OTHERS=_OTHERS, num_warps=_WARPS,
    )  # fmt: skip


AOT = [
    Compiled(
        _merge,
        "*i32 *i32 *i32 *i32 *i32 *i32 *i32 *i64 *i32 *i32 *i32 *i32 i32 i32",
        {
            "VIEW": width // 2, "PERSONAL": width // 4, "FOLLOWED": width // 4, "EXCLUDED": 64,
            "WIDTH": width, "BLOCK": _BLOCK, "OTHERS": _OTHERS,
        },
        num_warps=_WARPS,
        label=f"W={width}",
    )
    for width in (512, 1024)
]  # fmt: skip
