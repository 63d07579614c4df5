"""A made-up dataset file, for who develops a model: of the form of `models.schema`, nothing replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from models import labels
from models.schema import Kind, RowWriter, arrow_schema, vectors
from server.config import TableSettings
from server.live.features import FeatureSet


def make_synthetic(path: Path, kind: Kind, rows: int, seed: int, dim: int = 16) -> None:
    """Writes made-up rows that can be learned from, for who develops a model: nothing is replayed.

    Impressions: whether a stream is clicked depends on its place (seen with probability ``(1 + position) ** -0.7``), on
    the first feature and on the category; watching, buying and reporting on the click. Streams: growth follows the
    first features. Rows are sorted by time, 100 per second.
    """
    rng = np.random.default_rng(seed)
    features = FeatureSet.load(TableSettings().features_file)
    columns = _made_up(kind, rows, len(features), dim, rng)
    schema = arrow_schema(kind, len(features), dim)
    with RowWriter(path, kind, features, dim) as writer:
        writer.extra["liverank.source"] = f"synthetic, seed {seed}"
        writer.write(pa.table([columns[name] for name in schema.names], schema=schema))


def _made_up(kind: Kind, n: int, n_features: int, dim: int, rng: np.random.Generator) -> dict[str, Any]:
    streams = rng.integers(0, max(1, n // 50), n)
    at_ms = 1_767_225_600_000 + np.arange(n, dtype=np.int64) * 10
    features = rng.standard_normal((n, n_features)).astype(np.float32)
    category = streams % 7
    found: dict[str, Any] = {
        "at_ms": at_ms, "offset": np.arange(n) // 10 + 1, "stream_id": [f"stream-{s}" for s in streams],
        "epoch": np.ones(n, np.int64), "creator": [f"creator-{s % 97}" for s in streams],
        "category": [f"category-{c}" for c in category], "language": np.array(["en", "de", "ja"])[streams % 3],
        "features": vectors(features), "feature_states": vectors(np.zeros((n, n_features), np.uint8)),
        "stream_embedding": vectors(_unit(rng.standard_normal((n // 50 + 1, dim)))[streams]),
    }  # fmt: skip
    if kind == "streams":
        return found | _growths(features, rng)
    position = rng.integers(0, 20, n)
    pull = 1.0 / (1.0 + np.exp(-(features[:, 0] + 0.3 * category - 1.5)))
    clicked = rng.random(n) < (1.0 + position) ** -0.7 * pull
    watch_s = np.where(clicked, rng.exponential(30.0 + 60.0 * pull), 0.0)
    purchased = clicked & (rng.random(n) < 0.1 + 0.2 * pull)
    return found | {
        "impression_ms": at_ms + 200, "impression_offset": np.arange(n) // 10 + 2,
        "impression_index": np.arange(n) % 10,
        "viewer_id": [f"viewer-{v}" for v in rng.integers(0, max(1, n // 20), n)],
        "request_id": [f"r-{i // 20}" for i in range(n)], "position": position,
        "propensity": np.where(rng.random(n) < 0.05, 0.02, 0.0), "model_version": ["trendiness/1"] * n,
        "clicked": clicked, "watch_s": watch_s, "watched": watch_s >= labels.WATCHED_S, "purchased": purchased,
        "purchase_value": np.where(purchased, rng.lognormal(3.0, 0.6, n), 0.0),
        "reported": rng.random(n) < 0.01 * (1.0 - pull), "label_offset": np.where(clicked, np.arange(n) // 10 + 3, 0),
    }  # fmt: skip


def _growths(features: NDArray[np.float32], rng: np.random.Generator) -> dict[str, Any]:
    n = len(features)
    found: dict[str, Any] = {}
    for minutes in labels.HORIZONS_MINUTES:
        found[f"live_after_{minutes}m"] = rng.random(n) < 0.97
        for i, measure in enumerate(labels.MEASURES):
            before = rng.lognormal(4.0, 1.0, n)
            after = before * np.exp(0.02 * minutes * features[:, i] + 0.1 * rng.standard_normal(n))
            gain, growth = labels.growth(before, after, measure)
            for part, values in (("before", before), ("after", after), ("gain", gain), ("growth", growth)):
                found[f"{measure}_{part}_{minutes}m"] = values
    return found


def _unit(x: NDArray[np.float64]) -> NDArray[np.float32]:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)
