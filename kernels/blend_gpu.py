"""`kernels.blend` on the GPU: one program per request and block of candidates."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.aot import Compiled
from kernels.blend import BlendWeights
from kernels.checks_gpu import require_tensor

_BLOCK = 32


@triton.jit
def _blend(
    slots_ptr, sources_ptr, queries_ptr, trend_ptr, boost_ptr, started_ptr, embedding_ptr, weights_ptr,
    params_ptr, utility_ptr, similarity_ptr,
    width, batch, followed_bit, fresh_bit,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = b * width + column
    slot = tl.load(slots_ptr + at, mask=inside, other=-1)
    valid = slot >= 0
    row = tl.maximum(slot, 0).to(tl.int64)
    d = tl.arange(0, DIM_PADDED)
    query = tl.load(queries_ptr + b * DIM + d, mask=d < DIM, other=0.0)
    personal = tl.max((query != 0.0).to(tl.int32), axis=0) != 0
    trend = tl.load(trend_ptr + row, mask=valid, other=0.0)
    cold_start = tl.load(weights_ptr + 4 * batch + b)
    utility = tl.load(weights_ptr + b) * tl.where(trend != trend, cold_start, trend)
    utility += tl.load(weights_ptr + 5 * batch + b) * tl.load(boost_ptr + row, mask=valid, other=0.0)
    similarity = tl.full((BLOCK,), float("nan"), tl.float32)
    if personal:
        rows = tl.load(
            embedding_ptr + row[:, None] * DIM + d[None, :], mask=valid[:, None] & (d < DIM)[None, :], other=0.0
        )
        similarity = tl.sum(rows * query[None, :], axis=1)
        # A NaN dot must reach the utility: the order sinks it, a silent zero would hide it.
        utility += tl.where(similarity < 0.0, 0.0, tl.load(weights_ptr + batch + b) * similarity)
    sources = tl.load(sources_ptr + at, mask=inside, other=0)
    utility += tl.where((sources & followed_bit) != 0, tl.load(weights_ptr + 2 * batch + b), 0.0)
    now_ms, fresh_age_ms = tl.load(params_ptr + 5), tl.load(params_ptr + 4)
    age = (now_ms - tl.load(started_ptr + row, mask=valid, other=0)).to(tl.float32) / fresh_age_ms.to(tl.float32)
    youth = tl.maximum(1.0 - age, 0.0)
    utility += tl.where((sources & fresh_bit) != 0, tl.load(weights_ptr + 3 * batch + b) * youth, 0.0)
    tl.store(utility_ptr + at, tl.where(valid, utility, float("-inf")), mask=inside)
    tl.store(similarity_ptr + at, tl.where(valid, similarity, float("nan")), mask=inside)


def blend(
    slots: torch.Tensor,
    sources: torch.Tensor,
    queries: torch.Tensor,
    trend: torch.Tensor,
    boost: torch.Tensor,
    started_ms: torch.Tensor,
    embeddings: torch.Tensor,
    weights: torch.Tensor,
    params: torch.Tensor,
    *,
    followed_bit: int,
    fresh_bit: int,
    utility: torch.Tensor,
    similarity: torch.Tensor,
) -> None:
    """:func:`kernels.blend.blend` into ``utility`` and ``similarity``, both float32[B, K].

    Args:
        slots: int32[B, K]; -1 (anywhere) is padding. sources: int32[B, K], bit set. queries: float32[B, D].
        trend, boost: float32[C]. started_ms: int64[C]. embeddings: float32[C, D].
        weights: float32[6, B] in the order of :class:`kernels.blend.BlendWeights`.
        params: int64[8]; [4] fresh_age_ms, [5] time of the tick, ms.

    Agrees with the CPU to 1e-5 relative (sums are added in another order).

    Raises:
        ValueError: an argument has the wrong dtype, shape, layout or device; the message names it.

    Cost: 2 D flops and 4 D + 28 bytes per candidate; allocates nothing.
    """
    batch, width = slots.shape
    device = slots.device
    require_tensor("slots", slots, torch.int32, (None, None), device)
    require_tensor("sources", sources, torch.int32, (batch, width), device)
    require_tensor("queries", queries, torch.float32, (batch, None), device)
    require_tensor("trend", trend, torch.float32, (None,), device)
    require_tensor("boost", boost, torch.float32, trend.shape, device)
    require_tensor("started_ms", started_ms, torch.int64, trend.shape, device)
    require_tensor("embeddings", embeddings, torch.float32, (trend.shape[0], queries.shape[1]), device)
    require_tensor("weights", weights, torch.float32, (len(BlendWeights._fields), batch), device)
    require_tensor("params", params, torch.int64, (8,), device)
    require_tensor("utility", utility, torch.float32, (batch, width), device)
    require_tensor("similarity", similarity, torch.float32, (batch, width), device)
    if slots.numel() == 0:
        return
    _blend[(batch, triton.cdiv(width, _BLOCK))](
        slots, sources, queries, trend, boost, started_ms, embeddings, weights, params, utility, similarity,
        width, batch, followed_bit, fresh_bit,
        DIM=queries.shape[1], DIM_PADDED=triton.next_power_of_2(queries.shape[1]), BLOCK=_BLOCK,
    )  # fmt: skip


AOT = [
    Compiled(
        _blend,
        "*i32 *i32 *fp32 *fp32 *fp32 *i64 *fp32 *fp32 *i64 *fp32 *fp32 i32 i32 i32 i32",
        {"DIM": 64, "DIM_PADDED": 64, "BLOCK": _BLOCK},
    )
]
