"""Rows of the host's columns into the device's: records of changed rows, packed by the host, scattered by one kernel.

There is no CPU counterpart: on the CPU these columns are the host's own. A record is what one row needs, 8 bytes
aligned, so that one copy over PCIe brings every column of it, however many there are.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from kernels.aot import Compiled
from kernels.checks_gpu import require_tensor
from kernels.rules_gpu import UNASSESSED

ID_WORDS = 8
LIVENESS = np.dtype(
    [("slot", "<i4"), ("state", "u1"), ("moderation", "u1"), ("", "<u2"),
     ("lease_expires_ms", "<i8"), ("epoch", "<i8"), ("started_ms", "<i8")]
)  # fmt: skip
"""What moves with nearly every heartbeat: 32 bytes."""


IDENTITY = np.dtype(
    [("slot", "<i4"), ("creator", "<i4"), ("language", "<i4"), ("category", "<i4"), ("region", "<i4"),
     ("age_rating", "<i4"), ("id_length", "<i4"), ("", "<i4"), ("id_words", "<i8", (ID_WORDS,))]
)  # fmt: skip
"""What moves when a session starts: 96 bytes. The embedding is the search engine's (kernels/topk_gpu.py)."""


class LivenessTarget(NamedTuple):
    """Device columns of a liveness record, C rows."""

    state: torch.Tensor  # uint8[C]
    moderation: torch.Tensor  # uint8[C]
    lease_expires_ms: torch.Tensor  # int64[C]
    epoch: torch.Tensor  # int64[C]
    started_ms: torch.Tensor  # int64[C]


class IdentityTarget(NamedTuple):
    """Device columns of an identity record, C rows."""

    creator: torch.Tensor  # int32[C]
    language: torch.Tensor  # int32[C]
    category: torch.Tensor  # int32[C]
    region: torch.Tensor  # int32[C]
    age_rating: torch.Tensor  # int32[C]
    id_lengths: torch.Tensor  # uint8[C]
    id_words: torch.Tensor  # int64[C, 8]


class DerivedTarget(NamedTuple):
    """Device columns that are worked out per session, C rows."""

    rule_bits: torch.Tensor  # int32[C]
    boost: torch.Tensor  # float32[C]
    trend: torch.Tensor  # float32[C], NaN: not scored
    exposures: torch.Tensor  # int32[C]


@triton.jit(do_not_specialize=["records"])
def _store_liveness(
    words_ptr, longs_ptr, state_ptr, moderation_ptr, lease_ptr, epoch_ptr, started_ptr, records, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < records
    row = tl.load(words_ptr + at * 8, mask=inside, other=0)
    small = tl.load(words_ptr + at * 8 + 1, mask=inside, other=0)
    tl.store(state_ptr + row, (small & 0xFF).to(tl.uint8), mask=inside)
    tl.store(moderation_ptr + row, ((small >> 8) & 0xFF).to(tl.uint8), mask=inside)
    tl.store(lease_ptr + row, tl.load(longs_ptr + at * 4 + 1, mask=inside, other=0), mask=inside)
    tl.store(epoch_ptr + row, tl.load(longs_ptr + at * 4 + 2, mask=inside, other=0), mask=inside)
    tl.store(started_ptr + row, tl.load(longs_ptr + at * 4 + 3, mask=inside, other=0), mask=inside)


@triton.jit(do_not_specialize=["records"])
def _store_identity(
    words_ptr, longs_ptr, creator_ptr, language_ptr, category_ptr, region_ptr, age_rating_ptr, length_ptr, id_ptr,
    records, WORDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = at < records
    word = words_ptr + at * WORDS
    row = tl.load(word, mask=inside, other=0).to(tl.int64)
    tl.store(creator_ptr + row, tl.load(word + 1, mask=inside, other=0), mask=inside)
    tl.store(language_ptr + row, tl.load(word + 2, mask=inside, other=0), mask=inside)
    tl.store(category_ptr + row, tl.load(word + 3, mask=inside, other=0), mask=inside)
    tl.store(region_ptr + row, tl.load(word + 4, mask=inside, other=0), mask=inside)
    tl.store(age_rating_ptr + row, tl.load(word + 5, mask=inside, other=0), mask=inside)
    tl.store(length_ptr + row, tl.load(word + 6, mask=inside, other=0).to(tl.uint8), mask=inside)
    i = tl.arange(0, 8)[None, :]
    part = tl.load(longs_ptr + at[:, None] * (WORDS // 2) + 4 + i, mask=inside[:, None] & (i >= 0), other=0)
    tl.store(id_ptr + row[:, None] * 8 + i, part, mask=inside[:, None] & (i >= 0))


@triton.jit(do_not_specialize=["listed"])
def _forget(slots_ptr, bits_ptr, boost_ptr, trend_ptr, exposures_ptr, listed, BLOCK: tl.constexpr, BITS: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < listed
    row = tl.load(slots_ptr + at, mask=inside, other=0)
    tl.store(bits_ptr + row, tl.full((BLOCK,), BITS, tl.int32), mask=inside)
    tl.store(boost_ptr + row, tl.zeros((BLOCK,), tl.float32), mask=inside)
    tl.store(trend_ptr + row, tl.full((BLOCK,), float("nan"), tl.float32), mask=inside)
    tl.store(exposures_ptr + row, tl.zeros((BLOCK,), tl.int32), mask=inside)


def store_liveness(records: torch.Tensor, target: LivenessTarget) -> None:
    """Writes n records `LIVENESS`, given as int32[n, 8], to their rows; of one row listed twice, either record.

    Raises:
        ValueError: an argument has the wrong dtype, shape, layout or device; the message names it.

    Cost: 32 bytes read and 26 written per record, each to a sector of its own.
    """
    device = records.device
    require_tensor("records", records, torch.int32, (None, LIVENESS.itemsize // 4), device)
    require_tensor("state", target.state, torch.uint8, (None,), device)
    rows = target.state.shape[0]
    require_tensor("moderation", target.moderation, torch.uint8, (rows,), device)
    for name in ("lease_expires_ms", "epoch", "started_ms"):
        require_tensor(name, getattr(target, name), torch.int64, (rows,), device)
    n = records.shape[0]
    if n:
        _store_liveness[(triton.cdiv(n, _BLOCK),)](records, records.view(torch.int64), *target, n, BLOCK=_BLOCK)


def store_identity(records: torch.Tensor, target: IdentityTarget) -> None:
    """Writes n records `IDENTITY`, given as int32[n, 24], to their rows.

    Raises:
        ValueError: an argument has the wrong dtype, shape, layout or device; the message names it.

    Cost: 96 bytes read and 85 written per record.
    """
    device = records.device
    require_tensor("records", records, torch.int32, (None, IDENTITY.itemsize // 4), device)
    require_tensor("creator", target.creator, torch.int32, (None,), device)
    rows = target.creator.shape[0]
    for name in ("creator", "language", "category", "region", "age_rating"):
        require_tensor(name, getattr(target, name), torch.int32, (rows,), device)
    require_tensor("id_lengths", target.id_lengths, torch.uint8, (rows,), device)
    require_tensor("id_words", target.id_words, torch.int64, (rows, ID_WORDS), device)
    n, words = records.shape
    if n:
        _store_identity[(triton.cdiv(n, _TILE),)](
            records, records.view(torch.int64), *target, n, WORDS=words, BLOCK=_TILE,
        )  # fmt: skip


def forget_rows(slots: torch.Tensor, target: DerivedTarget) -> None:
    """Rows ``slots`` int32[n] hold other sessions: unassessed, no boost, no score, never served.

    Raises:
        ValueError: an argument has the wrong dtype, shape, layout or device; the message names it.

    Cost: 20 bytes per row.
    """
    device = slots.device
    require_tensor("slots", slots, torch.int32, (None,), device)
    require_tensor("rule_bits", target.rule_bits, torch.int32, (None,), device)
    rows = target.rule_bits.shape[0]
    require_tensor("boost", target.boost, torch.float32, (rows,), device)
    require_tensor("trend", target.trend, torch.float32, (rows,), device)
    require_tensor("exposures", target.exposures, torch.int32, (rows,), device)
    n = slots.shape[0]
    if n:
        _forget[(triton.cdiv(n, _BLOCK),)](slots, *target, n, BLOCK=_BLOCK, BITS=UNASSESSED)


_BLOCK, _TILE = 128, 16

AOT = [
    Compiled(_store_liveness, "*i32 *i64 *u8 *u8 *i64 *i64 *i64 i32", {"BLOCK": _BLOCK}),
    Compiled(
        _store_identity,
        "*i32 *i64 *i32 *i32 *i32 *i32 *i32 *u8 *i64 i32",
        {"WORDS": IDENTITY.itemsize // 4, "BLOCK": _TILE},
    ),
    Compiled(_forget, "*i32 *i32 *fp32 *fp32 *i32 i32", {"BLOCK": _BLOCK, "BITS": UNASSESSED}),
]
