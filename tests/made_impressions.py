"""Impressions made up in memory, whose truth is known: small, quick, and learnable."""

from __future__ import annotations

import numpy as np

from models.impressions import Askings, Impressions
from server.scoring.ranker_schema import CODE_BUCKETS, SEQUENCE

PLACES = 10
EXPONENT = 0.7


def make_impressions(
    rows: int,
    seed: int,
    *,
    features: int = 5,
    dim: int = 8,
    noise: float = 4.0,
    shuffled: float = 0.0,
    told: bool = True,
) -> Impressions:
    """Slates of PLACES streams, the liked ones higher up; a place is looked at with (place) ** -EXPONENT.

    Liked is what is near the viewer's embedding and has a large first feature; a purchase follows a click by the
    second feature. 10 slates a second.

    Args:
        noise: how little the logging policy knows. shuffled: share of slates in an order of chance.
        told: whether viewers' embeddings are in the rows.
    """
    rng = np.random.default_rng(seed)
    slates = rows // PLACES
    n = slates * PLACES
    viewers = _unit(rng.standard_normal((max(5, slates // 8), dim)))
    viewer = rng.integers(0, len(viewers), slates)
    streams = _unit(rng.standard_normal((200, dim)))
    stream = np.stack([rng.choice(200, PLACES, replace=False) for _ in range(slates)])
    values = rng.standard_normal((slates, PLACES, features)).astype(np.float32)
    pull = 3.0 * (viewers[viewer][:, None] * streams[stream]).sum(-1) + 0.8 * values[..., 0] - 1.0
    # The logging policy knows something of what is liked: places and liking go together.
    by_chance = rng.random(slates) < shuffled
    known = np.where(by_chance[:, None], 0.0, pull)
    order = np.argsort(-(known + noise * rng.standard_normal(pull.shape)), axis=1)
    stream, pull = np.take_along_axis(stream, order, 1), np.take_along_axis(pull, order, 1).ravel()
    values = np.take_along_axis(values, order[..., None], 1).reshape(n, features)
    stream, place = stream.ravel(), np.tile(np.arange(1, PLACES + 1), slates)
    clicked = rng.random(n) < place**-EXPONENT / (1.0 + np.exp(-pull))
    watch_s = np.where(clicked, rng.exponential(40.0, n), 0.0).astype(np.float32)
    purchased = clicked & (rng.random(n) < 1.0 / (1.0 + np.exp(2.0 - values[:, 1])))
    creator = stream % 40
    codes = np.stack([1 + stream % 3, 1 + stream % 7, 1 + creator], axis=1).astype(np.int64)
    assert (codes < CODE_BUCKETS).all()
    missing = (rng.random((n, features)) < 0.1).astype(np.float32)
    missing[:, :2] = 0.0
    sequence = rng.standard_normal((slates, SEQUENCE, dim)).astype(np.float16)
    meta = rng.random((slates, SEQUENCE, 4)).astype(np.float32)
    meta[..., 3] = np.arange(SEQUENCE) < rng.integers(0, 5, (slates, 1))
    meta *= meta[..., 3:]
    history = sequence * meta[..., 3:].astype(np.float16)
    return Impressions(
        askings=Askings(viewers[viewer] * np.float32(told), history, meta, viewer),
        at_ms=1_767_225_600_000 + np.repeat(np.arange(slates), PLACES) * 100,
        features=values, missing=missing, stream_embedding=streams[stream], codes=codes, stream=stream,
        creator=creator,
        asking=np.repeat(np.arange(slates), PLACES), position=place.astype(np.float32),
        propensity=np.where(rng.random(n) < 0.1, 0.01, 0.0).astype(np.float32), by_chance=np.repeat(by_chance, PLACES),
        clicked=clicked, watched=watch_s >= 30.0, purchased=purchased, reported=clicked & (rng.random(n) < 0.02),
        watch_s=watch_s, value=np.where(purchased, 10.0, 0.0).astype(np.float32),
    )  # fmt: skip


def _unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)
