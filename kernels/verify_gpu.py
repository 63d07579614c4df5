"""`kernels.verify` on the GPU: the one predicate over the whole table, and over the picks of a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.aot import Compiled
from kernels.checks_gpu import require_tensor
from kernels.eligibility import Drop
from kernels.fence import LIVE

PARAMS = 8
_ROWS = 512
_LIVE = tl.constexpr(int(LIVE))
_NOT_LIVE, _LEASE_EXPIRED = tl.constexpr(int(Drop.NOT_LIVE)), tl.constexpr(int(Drop.LEASE_EXPIRED))
_RULE, _REGION = tl.constexpr(int(Drop.RULE)), tl.constexpr(int(Drop.REGION))
_AGE_RATING, _NOT_NEEDED = tl.constexpr(int(Drop.AGE_RATING)), tl.constexpr(int(Drop.NOT_NEEDED))
_LANGUAGE, _CATEGORY = tl.constexpr(int(Drop.LANGUAGE)), tl.constexpr(int(Drop.CATEGORY))
# What stands where in params.
_NOW_MS, _ROWS_IN_USE, _EXCLUDE_BITS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(3)


class FilterTensors(NamedTuple):
    """:class:`kernels.eligibility.FilterColumns` on the device: region, max_age_rating int32[V]; any_language,
    any_category uint8[V]; languages uint8[V, L], categories uint8[V, G] (numbers beyond L or G pass only where
    ``any_*`` is set)."""

    region: torch.Tensor
    max_age_rating: torch.Tensor
    any_language: torch.Tensor
    languages: torch.Tensor
    any_category: torch.Tensor
    categories: torch.Tensor


class RowTensors(NamedTuple):
    """:class:`kernels.eligibility.RowColumns` on the device: state uint8[C]; lease_expires_ms int64[C]; rule_bits,
    region, age_rating, language, category int32[C]."""

    state: torch.Tensor
    lease_expires_ms: torch.Tensor
    rule_bits: torch.Tensor
    region: torch.Tensor
    age_rating: torch.Tensor
    language: torch.Tensor
    category: torch.Tensor


@triton.jit
def _refused_by_all(state, lease_expires_ms, rule_bits, exclude_bits, now_ms):
    """`Drop` of a row for every viewer; 0: none."""
    refused = tl.where((rule_bits & exclude_bits) != 0, _RULE, 0)
    refused = tl.where(lease_expires_ms <= now_ms, _LEASE_EXPIRED, refused)
    return tl.where(state != _LIVE, _NOT_LIVE, refused)


@triton.jit
def _refused_by_filter(
    region, age_rating, language, category, mask,
    f_region_ptr, f_age_ptr, f_any_language_ptr, f_languages_ptr, f_any_category_ptr, f_categories_ptr,
    v, languages, categories,
):  # fmt: skip
    """`Drop` of a row for the viewers of filter ``v``; 0: none."""
    refused = tl.zeros_like(region)
    if tl.load(f_any_category_ptr + v) == 0:
        known = mask & (category < categories)
        refused = tl.where(tl.load(f_categories_ptr + v * categories + category, mask=known, other=0) == 0,
                           _CATEGORY, refused)  # fmt: skip
    if tl.load(f_any_language_ptr + v) == 0:
        known = mask & (language < languages)
        refused = tl.where(tl.load(f_languages_ptr + v * languages + language, mask=known, other=0) == 0,
                           _LANGUAGE, refused)  # fmt: skip
    refused = tl.where(age_rating > tl.load(f_age_ptr + v), _AGE_RATING, refused)
    return tl.where((region != 0) & (region != tl.load(f_region_ptr + v)), _REGION, refused)


@triton.jit
def _eligible(
    state_ptr, lease_ptr, bits_ptr, region_ptr, age_ptr, language_ptr, category_ptr,
    f_region_ptr, f_age_ptr, f_any_language_ptr, f_languages_ptr, f_any_category_ptr, f_categories_ptr,
    params_ptr, eligible_ptr,
    capacity, languages, categories,
    FILTERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    used = row < tl.minimum(tl.load(params_ptr + _ROWS_IN_USE), capacity)
    # Free rows are not read: state 0 refuses them.
    refused = _refused_by_all(
        tl.load(state_ptr + row, mask=used, other=0), tl.load(lease_ptr + row, mask=used, other=0),
        tl.load(bits_ptr + row, mask=used, other=0),
        tl.load(params_ptr + _EXCLUDE_BITS).to(tl.int32), tl.load(params_ptr + _NOW_MS),
    )  # fmt: skip
    region = tl.load(region_ptr + row, mask=used, other=0)
    age_rating = tl.load(age_ptr + row, mask=used, other=0)
    language = tl.load(language_ptr + row, mask=used, other=0)
    category = tl.load(category_ptr + row, mask=used, other=0)
    for v in range(FILTERS):
        own = _refused_by_filter(
            region, age_rating, language, category, used,
            f_region_ptr, f_age_ptr, f_any_language_ptr, f_languages_ptr, f_any_category_ptr, f_categories_ptr,
            v, languages, categories,
        )  # fmt: skip
        passes = (used & (refused == 0) & (own == 0)).to(tl.uint8)
        tl.store(eligible_ptr + tl.cast(v, tl.int64) * capacity + row, passes, mask=row < capacity)


@triton.jit
def _verify(
    picks_ptr, n_slate_ptr, n_reserve_ptr, exploration_ptr, slots_ptr, utility_ptr, sources_ptr,
    limits_ptr, filter_of_ptr,
    state_ptr, lease_ptr, bits_ptr, region_ptr, age_ptr, language_ptr, category_ptr,
    f_region_ptr, f_age_ptr, f_any_language_ptr, f_languages_ptr, f_any_category_ptr, f_categories_ptr,
    params_ptr,
    out_slots_ptr, out_scores_ptr, out_sources_ptr, out_exploration_ptr, counts_ptr, pick_slots_ptr, drops_ptr,
    width, picks_width, out_width, languages, categories,
    PICKS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PICKS)
    inside = i < picks_width
    limit = tl.minimum(tl.load(limits_ptr + b), out_width)
    offered = inside & (i < tl.load(n_slate_ptr + b) + tl.load(n_reserve_ptr + b))
    at = b * width + tl.load(picks_ptr + b * picks_width + i, mask=offered, other=0)
    slot = tl.load(slots_ptr + at, mask=offered, other=-1)
    row = tl.maximum(slot, 0).to(tl.int64)
    refused = _refused_by_all(
        tl.load(state_ptr + row, mask=offered, other=0), tl.load(lease_ptr + row, mask=offered, other=0),
        tl.load(bits_ptr + row, mask=offered, other=0),
        tl.load(params_ptr + _EXCLUDE_BITS).to(tl.int32), tl.load(params_ptr + _NOW_MS),
    )  # fmt: skip
    own = _refused_by_filter(
        tl.load(region_ptr + row, mask=offered, other=0), tl.load(age_ptr + row, mask=offered, other=0),
        tl.load(language_ptr + row, mask=offered, other=0), tl.load(category_ptr + row, mask=offered, other=0), offered,
        f_region_ptr, f_age_ptr, f_any_language_ptr, f_languages_ptr, f_any_category_ptr, f_categories_ptr,
        tl.load(filter_of_ptr + b), languages, categories,
    )  # fmt: skip
    drop = tl.where(refused != 0, refused, own)
    passes = (offered & (drop == 0)).to(tl.int32)
    place = tl.cumsum(passes, axis=0) - passes  # how many passed before
    drop = tl.where(place >= limit, _NOT_NEEDED, drop)
    kept = (passes != 0) & (place < limit)
    tl.store(pick_slots_ptr + b * picks_width + i, slot, mask=inside)
    tl.store(drops_ptr + b * picks_width + i, tl.where(offered, drop, 0).to(tl.uint8), mask=inside)
    count = tl.sum(kept.to(tl.int32), axis=0)
    tl.store(counts_ptr + b, count)
    to = b * out_width + place
    tl.store(out_slots_ptr + to, slot, mask=kept)
    tl.store(out_scores_ptr + to, tl.load(utility_ptr + at, mask=kept, other=0.0), mask=kept)
    tl.store(out_sources_ptr + to, tl.load(sources_ptr + at, mask=kept, other=0), mask=kept)
    drawn = tl.load(exploration_ptr + b * picks_width + i, mask=kept, other=0.0)
    tl.store(out_exploration_ptr + to, drawn, mask=kept)
    # Other cells than the stores above, which may land in any order: places from count on.
    unused = (i >= count) & (i < out_width)
    tl.store(out_slots_ptr + b * out_width + i, -1, mask=unused)
    tl.store(out_scores_ptr + b * out_width + i, 0.0, mask=unused)
    tl.store(out_sources_ptr + b * out_width + i, 0, mask=unused)
    tl.store(out_exploration_ptr + b * out_width + i, 0.0, mask=unused)


def eligible_rows(rows: RowTensors, filters: FilterTensors, params: torch.Tensor, *, eligible: torch.Tensor) -> None:
    """Which rows every filter may find, into ``eligible`` uint8[V, C]: showable now and passing filter v.

    The conjunction that :func:`kernels.eligibility.eligible_rows` takes per filter with ``showable`` given; rows from
    ``params[1]`` on are not eligible.

    Args:
        params: int64[8]; [0] now_ms, [1] rows in use, [3] bits of excluding rules.

    Raises:
        ValueError: an argument has the wrong dtype, shape, layout or device; the message names it.

    Cost: 29 bytes per row in use, and V per row written; the names' tables stay in L1. At 10^6 rows and 16 filters
    45 MB: 15 µs at 3 TB/s.
    """
    device = params.device
    _check(rows, filters, params)
    capacity = rows.state.shape[0]
    require_tensor("eligible", eligible, torch.uint8, (filters.region.shape[0], capacity), device)
    if eligible.numel() == 0:
        return
    _eligible[(triton.cdiv(capacity, _ROWS),)](
        *rows, *filters, params, eligible,
        capacity, filters.languages.shape[1], filters.categories.shape[1],
        FILTERS=eligible.shape[0], BLOCK=_ROWS,
    )  # fmt: skip


def verify_picks(
    picks: torch.Tensor,
    n_slate: torch.Tensor,
    n_reserve: torch.Tensor,
    exploration: torch.Tensor,
    slots: torch.Tensor,
    utility: torch.Tensor,
    sources: torch.Tensor,
    limits: torch.Tensor,
    filter_of: torch.Tensor,
    rows: RowTensors,
    filters: FilterTensors,
    params: torch.Tensor,
    *,
    out_slots: torch.Tensor,
    out_scores: torch.Tensor,
    out_sources: torch.Tensor,
    out_exploration: torch.Tensor,
    counts: torch.Tensor,
    pick_slots: torch.Tensor,
    drops: torch.Tensor,
) -> None:
    """:func:`kernels.verify.verify_picks` of the slates of a batch, with what a reply says of those that are kept.

    Args:
        picks: int32[B, P] indices into the row's candidates, exploration float32[B, P], n_slate, n_reserve
            int32[B]: as `select_slates` wrote them.
        slots, sources: int32[B, K], utility: float32[B, K], the candidates.
        limits: int32[B] <= L. filter_of: int32[B], row of ``filters``. params: int64[8]; [0] now_ms, [3] bits of
            excluding rules.
        out_slots (-1 from counts[b] on), out_sources: int32[B, L]; out_scores, out_exploration: float32[B, L],
            (0 there): what is shown, in order. counts: int32[B].
        pick_slots: int32[B, P], slots of the picks, -1 behind them; drops: uint8[B, P], a `Drop` per pick, 0 behind
            them. So the host can check again, and kept + dropped = offered.

    Raises:
        ValueError: an argument has the wrong dtype, shape, layout or device; the message names it.

    Cost: 29 bytes of table and 33 of batch per pick: 1.1 MB and one program per request at B = 256, P = 70;
    a chain of three dependent reads, about 3 µs.
    """
    batch, width = slots.shape
    device = slots.device
    _check(rows, filters, params)
    require_tensor("picks", picks, torch.int32, (batch, None), device)
    require_tensor("exploration", exploration, torch.float32, picks.shape, device)
    for name, column in (("n_slate", n_slate), ("n_reserve", n_reserve), ("limits", limits), ("filter_of", filter_of)):
        require_tensor(name, column, torch.int32, (batch,), device)
    require_tensor("slots", slots, torch.int32, (None, None), device)
    require_tensor("utility", utility, torch.float32, slots.shape, device)
    require_tensor("sources", sources, torch.int32, slots.shape, device)
    require_tensor("out_slots", out_slots, torch.int32, (batch, None), device)
    require_tensor("out_scores", out_scores, torch.float32, out_slots.shape, device)
    require_tensor("out_sources", out_sources, torch.int32, out_slots.shape, device)
    require_tensor("out_exploration", out_exploration, torch.float32, out_slots.shape, device)
    require_tensor("counts", counts, torch.int32, (batch,), device)
    require_tensor("pick_slots", pick_slots, torch.int32, picks.shape, device)
    require_tensor("drops", drops, torch.uint8, picks.shape, device)
    if batch == 0:
        return
    _verify[(batch,)](
        picks, n_slate, n_reserve, exploration, slots, utility, sources, limits, filter_of, *rows, *filters, params,
        out_slots, out_scores, out_sources, out_exploration, counts, pick_slots, drops,
        width, picks.shape[1], out_slots.shape[1], filters.languages.shape[1], filters.categories.shape[1],
        PICKS=triton.next_power_of_2(max(picks.shape[1], out_slots.shape[1])), num_warps=2,
    )  # fmt: skip


def _check(rows: RowTensors, filters: FilterTensors, params: torch.Tensor) -> None:
    device = params.device
    require_tensor("params", params, torch.int64, (PARAMS,), device)
    capacity, v = rows.state.shape[0], filters.region.shape[0]
    dtypes = {"state": torch.uint8, "lease_expires_ms": torch.int64}
    for name, column in zip(rows._fields, rows, strict=True):
        require_tensor(f"rows.{name}", column, dtypes.get(name, torch.int32), (capacity,), device)
    for name in ("region", "max_age_rating"):
        require_tensor(f"filters.{name}", getattr(filters, name), torch.int32, (v,), device)
    for name in ("any_language", "any_category"):
        require_tensor(f"filters.{name}", getattr(filters, name), torch.uint8, (v,), device)
    for name in ("languages", "categories"):
        require_tensor(f"filters.{name}", getattr(filters, name), torch.uint8, (v, None), device)


_COLUMNS = "*u8 *i64 *i32 *i32 *i32 *i32 *i32 *i32 *i32 *u8 *u8 *u8 *u8 *i64"
"""Rows, filters, params."""

AOT = [
    Compiled(_eligible, f"{_COLUMNS} *u8 i32 i32 i32", {"FILTERS": 16, "BLOCK": _ROWS}),
    Compiled(
        _verify,
        f"*i32 *i32 *i32 *fp32 *i32 *fp32 *i32 *i32 *i32 {_COLUMNS} "
        "*i32 *fp32 *i32 *fp32 *i32 *i32 *u8 i32 i32 i32 i32 i32",
        {"PICKS": 128},
        num_warps=2,
    ),
]
