"""What a ranker takes and gives: the one place that server, trainer and exporter agree on. See docs/models.md.

A call ranks R rows (viewer × candidate) of V viewers. What is the viewer's is sent once per viewer, and
``viewer_of`` says which viewer a row belongs to; the model gathers, ``viewer_embedding[viewer_of]``, so that a
history of 20 × D floats does not travel once per candidate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntFlag

import numpy as np
from numpy.typing import NDArray

from kernels.idmap import ID_BYTES, hash_ids, pack_ids

SEQUENCE = 20
"""S: streams of a viewer that are remembered, newest first; fewer are padded with zeros."""

SEQUENCE_META = ("log_age_minutes", "log_watch_seconds", "outcome", "valid")
"""ln(1 + minutes since the viewer's last event there), ln(1 + seconds watched), `OUTCOME_VALUES`, 1 or 0 (padding)."""

CODES = ("language", "category", "creator")
CODE_BUCKETS = (256, 1_024, 65_536)
"""Buckets of `bucket_of`, in the order of CODES; bucket 0 is the empty name: unknown."""

HEADS = ("click", "watch", "purchase", "report")
"""Columns of the answer, calibrated probabilities; watch: at least `WATCHED_MS`."""

WATCHED_MS = 30_000
"""Watched this long, a stream counts as watched: the label of the head and the outcome bit alike."""

NEUTRAL_POSITION = -1.0
"""``position`` when serving: no place in a slate yet. In training: the 1-based place of the impression."""


BOUNCE_MS = 10_000


class Outcome(IntFlag):
    """What came of a viewer's visit to a stream, as bits."""

    CLICKED = 1  # came in
    WATCHED = 2  # at least WATCHED_MS
    ENGAGED = 4  # chatted, liked, followed, shared, bid or bought
    PURCHASED = 8  # bought
    REPORTED = 16
    NEGATIVE = 32  # came in and left again within `BOUNCE_MS`, without doing anything


OUTCOME_VALUES = {
    Outcome.CLICKED: 0.1,
    Outcome.WATCHED: 0.4,
    Outcome.ENGAGED: 0.5,
    Outcome.PURCHASED: 1.0,
    Outcome.REPORTED: -2.0,
    Outcome.NEGATIVE: -0.5,
}
"""What each bit adds to ``sequence_meta``'s outcome."""

RANKER_PARAMETER = "ranker_schema"
"""Parameter of config.pbtxt that carries `RANKER_SCHEMA`, beside ``feature_schema``."""

OUTPUT_HEADS = "heads"

# name → (type, shape): R rows, V viewers, F features, D dimensions of an embedding.
INPUTS: dict[str, tuple[type[np.generic], tuple[str | int, ...]]] = {
    "stream_features": (np.float32, ("R", "F")),
    "stream_missing": (np.float32, ("R", "F")),
    "stream_embedding": (np.float32, ("R", "D")),
    "codes": (np.int64, ("R", len(CODES))),
    "position": (np.float32, ("R", 1)),
    "viewer_of": (np.int64, ("R",)),
    "viewer_embedding": (np.float32, ("V", "D")),
    "sequence_embedding": (np.float32, ("V", SEQUENCE, "D")),
    "sequence_meta": (np.float32, ("V", SEQUENCE, len(SEQUENCE_META))),
}

RANKER_SCHEMA = hashlib.sha256(
    repr(
        (
            [(name, np.dtype(kind).name, shape) for name, (kind, shape) in INPUTS.items()],
            SEQUENCE_META, CODES, CODE_BUCKETS, HEADS, WATCHED_MS, BOUNCE_MS, NEUTRAL_POSITION,
            [(int(bit), value) for bit, value in OUTCOME_VALUES.items()],
        )
    ).encode()
).hexdigest()[:16]  # fmt: skip
"""Changes whenever a model built for one version of this file cannot serve another."""


@dataclass(frozen=True)
class RankerInputs:
    """One call, as the model takes it; each field is the input of that name, types and shapes in `INPUTS`.

    stream_features: as `FeatureSet.compute` gives them, not scaled. stream_missing: 1 where the state is not PRESENT
    (see `missing_of`). stream_embedding, viewer_embedding: unit length, or zero where there is none.
    sequence_embedding: of the streams watched, newest first, rounded to float16; zero where it is not known any more.
    """

    stream_features: NDArray[np.float32]
    stream_missing: NDArray[np.float32]
    stream_embedding: NDArray[np.float32]
    codes: NDArray[np.int64]
    position: NDArray[np.float32]
    viewer_of: NDArray[np.int64]
    viewer_embedding: NDArray[np.float32]
    sequence_embedding: NDArray[np.float32]
    sequence_meta: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.viewer_of)

    def tensors(self) -> dict[str, NDArray[np.float32] | NDArray[np.int64]]:
        """By name, as onnxruntime takes them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def missing_of(states: NDArray[np.uint8]) -> NDArray[np.float32]:
    """float32 of the shape of ``states``: 1 where a feature's state is not PRESENT (0). A stale value keeps standing
    in ``stream_features``; this is what tells that it is old."""
    return (states != 0).astype(np.float32)


def bucket_of(names: Sequence[str], buckets: int) -> NDArray[np.int64]:
    """int64[n]: the bucket, in [0, buckets), of each name of at most 64 bytes; 0 for the empty one and only for it.

    The same on every machine: numbers that the table interns are not.
    """
    hashes = hash_ids(*pack_ids([name.encode()[:ID_BYTES] for name in names]))
    spread = np.uint64(1) + hashes % np.uint64(buckets - 1)
    return np.where(hashes == 0, np.uint64(0), spread).astype(np.int64)
