"""Counts of a ranked batch for the metrics, taken where the batch is: a few dozen integers come to the host."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from kernels.aot import Compiled
from kernels.checks_gpu import require_tensor
from kernels.eligibility import Drop
from kernels.slate import Outcome

SOURCES, CODES = 16, 16
"""Most sources that are counted, and room for outcomes and for drops."""
SIZE = 72
_BLOCK = 128
_LANES = tl.constexpr(16)
_OF_CANDIDATES, _OF_SERVED, _OF_OUTCOMES = tl.constexpr(0), tl.constexpr(16), tl.constexpr(32)
_OF_DROPS, _EXCLUDED = tl.constexpr(48), tl.constexpr(64)
_SERVED, _EXPLORATION_SERVED = tl.constexpr(65), tl.constexpr(66)


class Sums(NamedTuple):
    """Counts of one batch. candidates, served_by: int64[S] per source bit; outcomes int64[7] by
    :class:`kernels.slate.Outcome` (PADDING: not counted); drops int64[9] by :class:`kernels.eligibility.Drop`, of
    picks; excluded: dropped by the merge; served, and of these exploration_served."""

    candidates: NDArray[np.int64]
    served_by: NDArray[np.int64]
    outcomes: NDArray[np.int64]
    drops: NDArray[np.int64]
    excluded: int
    served: int
    exploration_served: int


def read_tally(counts: NDArray[np.int32], n_sources: int) -> Sums:
    """What `tally` wrote, counts int32[72] on the host, by name; ``n_sources`` at most 16."""
    wide = counts.astype(np.int64)
    return Sums(
        wide[:n_sources], wide[16 : 16 + n_sources], wide[32 : 32 + len(Outcome)], wide[48 : 48 + len(Drop)],
        int(wide[64]), int(wide[65]), int(wide[66]),
    )  # fmt: skip


@triton.jit
def _tally(
    slots_ptr, sources_ptr, outcome_ptr, dropped_ptr, limits_ptr, pick_slots_ptr, drops_ptr,
    out_slots_ptr, out_sources_ptr, out_exploration_ptr,
    counts_ptr,
    WIDTH: tl.constexpr, PICKS: tl.constexpr, SERVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    if tl.load(limits_ptr + b) > 0:
        lane = tl.arange(0, _LANES)
        i = tl.arange(0, BLOCK)
        by_source = tl.zeros((_LANES,), tl.int32)
        by_outcome = tl.zeros((_LANES,), tl.int32)
        by_drop = tl.zeros((_LANES,), tl.int32)
        served_by = tl.zeros((_LANES,), tl.int32)
        for start in range(0, WIDTH, BLOCK):
            at = b * WIDTH + start + i
            there = (start + i < WIDTH) & (tl.load(slots_ptr + at, mask=start + i < WIDTH, other=-1) >= 0)
            bits = tl.load(sources_ptr + at, mask=there, other=0)
            by_source += tl.sum((bits[:, None] >> lane[None, :]) & 1, axis=0)
            code = tl.load(outcome_ptr + at, mask=there, other=255).to(tl.int32)
            by_outcome += tl.sum((code[:, None] == lane[None, :]).to(tl.int32), axis=0)
        for start in range(0, PICKS, BLOCK):
            at = b * PICKS + start + i
            there = (start + i < PICKS) & (tl.load(pick_slots_ptr + at, mask=start + i < PICKS, other=-1) >= 0)
            code = tl.load(drops_ptr + at, mask=there, other=255).to(tl.int32)
            by_drop += tl.sum((code[:, None] == lane[None, :]).to(tl.int32), axis=0)
        served = 0
        explored = 0
        for start in range(0, SERVED, BLOCK):
            at = b * SERVED + start + i
            there = (start + i < SERVED) & (tl.load(out_slots_ptr + at, mask=start + i < SERVED, other=-1) >= 0)
            bits = tl.load(out_sources_ptr + at, mask=there, other=0)
            served_by += tl.sum((bits[:, None] >> lane[None, :]) & 1, axis=0)
            served += tl.sum(there.to(tl.int32), axis=0)
            chance = tl.load(out_exploration_ptr + at, mask=there, other=0.0)
            explored += tl.sum((chance > 0.0).to(tl.int32), axis=0)
        tl.atomic_add(counts_ptr + _OF_CANDIDATES + lane, by_source, sem="relaxed")
        tl.atomic_add(counts_ptr + _OF_SERVED + lane, served_by, sem="relaxed")
        tl.atomic_add(counts_ptr + _OF_OUTCOMES + lane, by_outcome, sem="relaxed")
        tl.atomic_add(counts_ptr + _OF_DROPS + lane, by_drop, sem="relaxed")
        tl.atomic_add(counts_ptr + _EXCLUDED, tl.load(dropped_ptr + b), sem="relaxed")
        tl.atomic_add(counts_ptr + _SERVED, served, sem="relaxed")
        tl.atomic_add(counts_ptr + _EXPLORATION_SERVED, explored, sem="relaxed")


def tally(
    slots: torch.Tensor,
    sources: torch.Tensor,
    outcome: torch.Tensor,
    dropped: torch.Tensor,
    limits: torch.Tensor,
    pick_slots: torch.Tensor,
    drops: torch.Tensor,
    out_slots: torch.Tensor,
    out_sources: torch.Tensor,
    out_exploration: torch.Tensor,
    *,
    counts: torch.Tensor,
) -> None:
    """Counts a ranked batch into ``counts`` int32[72]; `read_tally` names them. Padding (limit 0) is not counted.

    Args:
        slots, sources: int32[B, K], outcome: uint8[B, K], candidates and what became of them.
        dropped: int32[B], excluded by the merge. limits: int32[B].
        pick_slots: int32[B, P], drops: uint8[B, P], out_slots, out_sources: int32[B, L], out_exploration:
            float32[B, L]: as the last check wrote them.

    Raises:
        ValueError: an argument has the wrong dtype, shape, layout or device; the message names it.

    Cost: 9 bytes per candidate, 5 per pick, 12 per place, once; 67 integer atomics per request.
    """
    batch, width = slots.shape
    device = slots.device
    require_tensor("slots", slots, torch.int32, (None, None), device)
    require_tensor("sources", sources, torch.int32, (batch, width), device)
    require_tensor("outcome", outcome, torch.uint8, (batch, width), device)
    require_tensor("dropped", dropped, torch.int32, (batch,), device)
    require_tensor("limits", limits, torch.int32, (batch,), device)
    require_tensor("pick_slots", pick_slots, torch.int32, (batch, None), device)
    require_tensor("drops", drops, torch.uint8, pick_slots.shape, device)
    require_tensor("out_slots", out_slots, torch.int32, (batch, None), device)
    require_tensor("out_sources", out_sources, torch.int32, out_slots.shape, device)
    require_tensor("out_exploration", out_exploration, torch.float32, out_slots.shape, device)
    require_tensor("counts", counts, torch.int32, (SIZE,), device)
    counts.zero_()
    if batch == 0:
        return
    _tally[(batch,)](
        slots, sources, outcome, dropped, limits, pick_slots, drops, out_slots, out_sources, out_exploration, counts,
        WIDTH=width, PICKS=pick_slots.shape[1], SERVED=out_slots.shape[1], BLOCK=_BLOCK,
    )  # fmt: skip


AOT = [
    Compiled(
        _tally,
        "*i32 *i32 *u8 *i32 *i32 *i32 *u8 *i32 *i32 *fp32 *i32",
        {"WIDTH": 512, "PICKS": 120, "SERVED": 100, "BLOCK": _BLOCK},
    )
]
