"""Blends what is known about a candidate into one utility.

utility = trend_weight * trend + similarity_weight * max(0, cosine) + followed_bonus [followed]
        + fresh_bonus * max(0, 1 - age / fresh_age) [fresh] + boost_weight * boost
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kernels.checks import require_array
from kernels.cosines import LANES, inner_product
from kernels.lines import LINE_BYTES
from kernels.vectors import prefetch_lines

_AHEAD = 8  # candidates: so far in front their embeddings are asked for
COMPILED_WITH = "1194069e1fa15983"  # cosines.py and vectors.py; see the latter


class BlendWeights(NamedTuple):
    """One float32[B] per weight: requests of different surfaces share a batch."""

    trend: NDArray[np.float32]
    similarity: NDArray[np.float32]
    followed: NDArray[np.float32]
    fresh: NDArray[np.float32]
    cold_start: NDArray[np.float32]
    boost: NDArray[np.float32]


@njit(cache=True, nogil=True)
def _blend(
    slots: NDArray[np.int32],
    sources: NDArray[np.uint32],
    queries: NDArray[np.float32],
    trend: NDArray[np.float32],
    boost: NDArray[np.float32],
    started_ms: NDArray[np.int64],
    embeddings: NDArray[np.float32],
    weights: BlendWeights,
    followed_bit: np.uint32,
    fresh_bit: np.uint32,
    now_ms: int,
    fresh_age_ms: int,
) -> tuple[bool, NDArray[np.float32], NDArray[np.float32]]:
    rows, width = slots.shape
    utility = np.empty((rows, width), np.float32)
    similarity = np.empty((rows, width), np.float32)
    inside = True
    queries_at, rows_at = queries.ctypes.data, embeddings.ctypes.data
    lines = -(-4 * queries.shape[1] // LINE_BYTES)
    dim, whole = queries.shape[1], queries.shape[1] // LANES * LANES
    for b in range(rows):
        n = 0
        while n < width and slots[b, n] >= 0:
            inside &= slots[b, n] < trend.shape[0]
            n += 1
        for i in range(n if inside else 0, width):
            utility[b, i] = -np.inf
            similarity[b, i] = np.nan
        query_at = queries_at + b * 4 * dim
        personal = False
        for d in range(dim):
            if queries[b, d] != 0.0:
                personal = True
                break
        # Of columns: a read from a tuple of arrays in the loop costs more than the value.
        of_trend, of_cold, of_boost = weights.trend[b], weights.cold_start[b], weights.boost[b]
        of_similarity, of_followed, of_fresh = weights.similarity[b], weights.followed[b], weights.fresh[b]
        for i in range(n if inside else 0):
            s = slots[b, i]
            ahead = slots[b, min(i + _AHEAD, n - 1)]
            if personal:
                prefetch_lines(rows_at + np.int64(ahead) * (4 * dim), lines)
            t = trend[s]
            u = of_trend * (of_cold if np.isnan(t) else t)
            u += of_boost * boost[s]
            similarity[b, i] = np.nan
            if personal:
                dot = inner_product(query_at, rows_at + np.int64(s) * (4 * dim), whole // LANES)
                for d in range(whole, dim):
                    dot += queries[b, d] * embeddings[s, d]
                similarity[b, i] = dot
                # No branch: which way it goes nobody can guess. NaN goes through.
                u += of_similarity * (np.float32(0.0) if dot <= 0.0 else dot)
            if sources[b, i] & followed_bit:
                u += of_followed
            if sources[b, i] & fresh_bit:
                age = np.float32(now_ms - started_ms[s]) / np.float32(fresh_age_ms)
                u += of_fresh * max(np.float32(0.0), np.float32(1.0) - age)
            utility[b, i] = u
    return inside, utility, similarity


def blend(
    slots: NDArray[np.int32],
    sources: NDArray[np.uint32],
    queries: NDArray[np.float32],
    trend: NDArray[np.float32],
    boost: NDArray[np.float32],
    started_ms: NDArray[np.int64],
    embeddings: NDArray[np.float32],
    weights: BlendWeights,
    *,
    followed_bit: int,
    fresh_bit: int,
    now_ms: int,
    fresh_age_ms: int,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Utilities and similarities, both float32[B, K], of candidates ``slots`` int32[B, K].

    Args:
        slots: padded with -1 at the end of each row. sources: uint32[B, K].
        queries: float32[B, D], unit length; an all-zero row is a viewer without an embedding.
        trend: float32[C]; NaN where no model has scored the row (then cold_start counts).
        boost: float32[C]. started_ms: int64[C]. embeddings: float32[C, D].

    Returns:
        utility (-inf in padding) and similarity (NaN in padding or without an embedding).

    Raises:
        ValueError: an argument has the wrong dtype, shape or range; the message names it.

    Cost: 2 D flops and 4 D bytes per candidate.
    """
    require_array("sources", sources, np.uint32, slots.shape)
    require_array("embeddings", embeddings, np.float32, (None, None))
    require_array("queries", queries, np.float32, (slots.shape[0], embeddings.shape[1]))
    inside, utility, similarity = _blend(
        slots, sources, queries, trend, boost, started_ms, embeddings, weights,
        np.uint32(followed_bit), np.uint32(fresh_bit), now_ms, fresh_age_ms,
    )  # fmt: skip
    if not inside:
        raise ValueError(f"slots: below {len(trend)} allowed")
    return utility, similarity


def blend_reference(
    slots: NDArray[np.int32],
    sources: NDArray[np.uint32],
    queries: NDArray[np.float32],
    trend: NDArray[np.float32],
    boost: NDArray[np.float32],
    started_ms: NDArray[np.int64],
    embeddings: NDArray[np.float32],
    weights: BlendWeights,
    *,
    followed_bit: int,
    fresh_bit: int,
    now_ms: int,
    fresh_age_ms: int,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Plain version of `blend`."""
    at = np.maximum(slots, 0)
    t = np.where(np.isnan(trend[at]), weights.cold_start[:, None], trend[at])
    utility = weights.trend[:, None] * t + weights.boost[:, None] * boost[at]
    dot = np.einsum("bd,bkd->bk", queries, embeddings[at])
    personal = (queries != 0).any(axis=1)[:, None]
    utility += np.where(personal, weights.similarity[:, None] * np.maximum(dot, 0), 0)
    utility += np.where(sources & np.uint32(followed_bit), weights.followed[:, None], 0)
    youth = np.maximum(0, 1 - (now_ms - started_ms[at]) / fresh_age_ms)
    utility += np.where(sources & np.uint32(fresh_bit), weights.fresh[:, None] * youth, 0)
    padding = slots < 0
    return (
        np.where(padding, -np.inf, utility).astype(np.float32),
        np.where(padding | ~personal, np.nan, dot).astype(np.float32),
    )
