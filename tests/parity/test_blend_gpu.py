"""The GPU's blend against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.blend import BlendWeights, blend_reference
from kernels.blend_gpu import blend
from tests.device import empty, get, put

NOW_MS, FRESH_AGE_MS = 1_760_000_600_000, 600_000
FOLLOWED, FRESH = 1 << 4, 1 << 5


def params(now_ms: int, fresh_age_ms: int) -> torch.Tensor:
    return put(np.array([0, 0, 0, 0, fresh_age_ms, now_ms, 0, 0], np.int64))


@pytest.mark.parametrize(("batch", "width", "dim"), [(1, 1, 4), (3, 70, 24), (2, 33, 64)])
def test_blend_on_the_device_equals_the_reference(batch: int, width: int, dim: int) -> None:
    rng = np.random.default_rng(batch * 1000 + width)
    rows = 50
    slots = rng.integers(-1, rows, (batch, width), dtype=np.int32)
    sources = rng.integers(0, 64, (batch, width), dtype=np.uint32)
    queries = rng.standard_normal((batch, dim)).astype(np.float32)
    queries[0] = 0.0  # a viewer without an embedding
    trend = np.where(rng.random(rows) < 0.3, np.nan, rng.random(rows)).astype(np.float32)
    boost = rng.standard_normal(rows).astype(np.float32)
    started_ms = NOW_MS - rng.integers(0, 2 * FRESH_AGE_MS, rows)
    embeddings = rng.standard_normal((rows, dim)).astype(np.float32)
    weights = BlendWeights(*rng.random((6, batch)).astype(np.float32))
    expected = blend_reference(
        slots, sources, queries, trend, boost, started_ms, embeddings, weights,
        followed_bit=FOLLOWED, fresh_bit=FRESH, now_ms=NOW_MS, fresh_age_ms=FRESH_AGE_MS,
    )  # fmt: skip
    utility, similarity = (empty((batch, width), torch.float32) for _ in range(2))
    blend(
        put(slots), put(sources), put(queries), put(trend), put(boost), put(started_ms), put(embeddings),
        put(np.stack(weights)), params(NOW_MS, FRESH_AGE_MS), followed_bit=FOLLOWED, fresh_bit=FRESH,
        utility=utility, similarity=similarity,
    )  # fmt: skip
    np.testing.assert_allclose(get(utility), expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(get(similarity), expected[1], rtol=1e-5, atol=1e-6)


def test_a_non_finite_embedding_reaches_the_utility_and_is_not_hidden() -> None:
    slots = np.array([[0, 1, 2]], np.int32)
    embeddings = np.array([[np.nan, 0], [np.inf, 0], [1, 0]], np.float32)
    utility, similarity = (empty((1, 3), torch.float32) for _ in range(2))
    blend(
        put(slots), put(np.zeros((1, 3), np.uint32)), put(np.array([[1, 0]], np.float32)),
        put(np.zeros(3, np.float32)), put(np.zeros(3, np.float32)), put(np.zeros(3, np.int64)), put(embeddings),
        put(np.ones((6, 1), np.float32)), params(0, 1), followed_bit=FOLLOWED, fresh_bit=FRESH,
        utility=utility, similarity=similarity,
    )  # fmt: skip
    assert np.isnan(get(utility)[0, 0]) and np.isposinf(get(utility)[0, 1]) and get(utility)[0, 2] == 1.0


def test_an_argument_of_the_wrong_type_is_named() -> None:
    good = {"slots": torch.zeros((1, 1), dtype=torch.int32)}
    with pytest.raises(ValueError, match=r"sources: must be a tensor of torch\.int32"):
        blend(
            good["slots"], torch.zeros((1, 1)), *[torch.zeros(1)] * 7,
            followed_bit=1, fresh_bit=2,
            utility=torch.zeros(1), similarity=torch.zeros(1),
        )  # fmt: skip
