"""Impressions as a ranker takes them: what the server knew, what was shown, what came of it."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtest.record import SHUFFLED
from models import labels
from models.schema import RowTable
from server.scoring.ranker_schema import (
    CODE_BUCKETS,
    NEUTRAL_POSITION,
    SEQUENCE,
    SEQUENCE_META,
    RankerInputs,
    bucket_of,
    missing_of,
)

NEW_MINUTES = 10.0
"""A stream younger than this is new in tables by segment."""
HEAD_SHARE = 0.5
"""The most shown creators that have this share of all impressions together are head, the others tail."""


@dataclass(frozen=True)
class Askings:
    """V replies, each with what was known of its viewer.

    embedding float32[V, D], sequence_embedding float16[V, 20, D], sequence_meta float32[V, 20, 4], viewer
    int64[V]: number of the viewer within the file.
    """

    embedding: NDArray[np.float32]
    sequence_embedding: NDArray[np.float16]
    sequence_meta: NDArray[np.float32]
    viewer: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.viewer)


@dataclass(frozen=True)
class Impressions:
    """R impressions, in the order of the file, that were shown in answer to V askings.

    Known when the reply was made: at_ms int64[R], features and missing float32[R, F], stream_embedding float32[R, D],
    codes int64[R, 3], stream and creator int64[R] (numbers within the file; creator -1: unknown), asking int64[R]
    (into askings), position float32[R] (1-based; -1: not told), propensity float32[R] (0: shown on its score),
    by_chance bool[R] (the whole slate was in an order of chance).

    What came of it: clicked, watched, purchased, reported bool[R]; watch_s, value float32[R].
    """

    askings: Askings
    at_ms: NDArray[np.int64]
    features: NDArray[np.float32]
    missing: NDArray[np.float32]
    stream_embedding: NDArray[np.float32]
    codes: NDArray[np.int64]
    stream: NDArray[np.int64]
    creator: NDArray[np.int64]
    asking: NDArray[np.int64]
    position: NDArray[np.float32]
    propensity: NDArray[np.float32]
    by_chance: NDArray[np.bool_]
    clicked: NDArray[np.bool_]
    watched: NDArray[np.bool_]
    purchased: NDArray[np.bool_]
    reported: NDArray[np.bool_]
    watch_s: NDArray[np.float32]
    value: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.at_ms)

    def take(self, rows: NDArray[Any]) -> Impressions:
        """Some rows, by number or by bool[R]; askings stay as they are."""
        return replace(self, **{f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "askings"})

    def inputs(self, rows: NDArray[np.int64] | slice, *, neutral: bool = True) -> RankerInputs:
        """These rows as one call of a ranker; neutral: as when serving, without the place in the slate."""
        askings, viewer_of = np.unique(self.asking[rows], return_inverse=True)
        known = self.askings
        position = self.position[rows].reshape(-1, 1)
        return RankerInputs(
            stream_features=self.features[rows],
            stream_missing=self.missing[rows],
            stream_embedding=self.stream_embedding[rows],
            codes=self.codes[rows],
            position=np.full_like(position, NEUTRAL_POSITION) if neutral else position,
            viewer_of=viewer_of.astype(np.int64),
            viewer_embedding=known.embedding[askings],
            sequence_embedding=known.sequence_embedding[askings].astype(np.float32),
            sequence_meta=known.sequence_meta[askings],
        )

    def labels(self, rows: NDArray[np.int64] | slice, watch_cap_s: float) -> NDArray[np.float32]:
        """float32[n, 5]: click, watch, purchase, report, and the watched share of ``watch_cap_s``."""
        time = np.minimum(self.watch_s[rows] / watch_cap_s, 1.0)
        columns = (self.clicked[rows], self.watched[rows], self.purchased[rows], self.reported[rows], time)
        return np.stack(columns, axis=1).astype(np.float32)

    def digest(self) -> str:
        """16 hex digits that identify the data."""
        sha = hashlib.sha256()
        for part in (self, self.askings):
            for f in fields(part):
                if f.name != "askings":
                    sha.update(np.ascontiguousarray(getattr(part, f.name)).tobytes())
        return sha.hexdigest()[:16]


def impressions_of(table: RowTable, viewer_embeddings: Mapping[str, NDArray[np.float32]] | None = None) -> Impressions:
    """The rows of a dataset file of impressions (docs/datasets.md).

    Args:
        viewer_embeddings: float32[D] by viewer id, which no event tells; viewers that are not in it have zeros.
    """
    key = np.char.add(np.char.add(_texts(table["viewer_id"]), "\n"), _texts(table["request_id"]))
    # Impressions without a request id: what one viewer was shown at one moment.
    key = np.char.add(np.char.add(key, "\n"), table["at_ms"].astype(str))
    _, first, asking = np.unique(key, return_index=True, return_inverse=True)
    viewer_ids, viewer = np.unique(_texts(table["viewer_id"])[first], return_inverse=True)
    dim = table["stream_embedding"].shape[1]
    known = {name: row for row, name in enumerate(viewer_ids)}
    vectors = np.zeros((len(viewer_ids), dim), np.float32)
    for name, vector in (viewer_embeddings or {}).items():
        if name in known:
            vectors[known[name]] = vector
    sequence_embedding, sequence_meta = _histories(table, first, dim)
    codes = [_codes(table[name], n) for name, n in zip(("language", "category", "creator"), CODE_BUCKETS, strict=True)]
    creators, creator = np.unique(_texts(table["creator"]), return_inverse=True)
    position = table["position"].astype(np.float32)
    return Impressions(
        askings=Askings(vectors[viewer], sequence_embedding, sequence_meta, viewer.astype(np.int64)),
        at_ms=table["at_ms"],
        features=table.features,
        missing=missing_of(table["feature_states"]),
        stream_embedding=table["stream_embedding"],
        codes=np.stack(codes, axis=1),
        stream=np.unique(_texts(table["stream_id"]), return_inverse=True)[1].astype(np.int64),
        creator=np.where(creators[creator] == "", -1, creator).astype(np.int64),
        asking=asking.astype(np.int64),
        position=np.where(position < 0, NEUTRAL_POSITION, position + 1.0).astype(np.float32),
        propensity=table["propensity"],
        by_chance=np.char.startswith(_texts(table["request_id"]), SHUFFLED),
        clicked=table["clicked"],
        watched=table["watched"],
        purchased=table["purchased"],
        reported=table["reported"],
        watch_s=table["watch_s"],
        value=table["purchase_value"],
    )


def concatenate_impressions(parts: Sequence[Impressions]) -> Impressions:
    """All rows, part after part; streams, creators, viewers and askings of different parts stay different."""

    def joined(column: str, counted: Callable[[Impressions], int]) -> NDArray[np.int64]:
        shifts = np.cumsum([0, *(counted(p) for p in parts[:-1])])
        columns = [getattr(p, column) for p in parts]
        return np.concatenate([np.where(c < 0, c, c + shift) for c, shift in zip(columns, shifts, strict=True)])

    viewers = np.cumsum([0, *(int(p.askings.viewer.max(initial=-1)) + 1 for p in parts[:-1])])
    askings = {f.name: np.concatenate([getattr(p.askings, f.name) for p in parts]) for f in fields(Askings)}
    askings["viewer"] = np.concatenate([p.askings.viewer + shift for p, shift in zip(parts, viewers, strict=True)])
    plain = {f.name for f in fields(Impressions)} - {"askings", "stream", "creator", "asking"}
    return Impressions(
        askings=Askings(**askings),
        stream=joined("stream", lambda p: int(p.stream.max(initial=-1)) + 1),
        creator=joined("creator", lambda p: int(p.creator.max(initial=-1)) + 1),
        asking=joined("asking", lambda p: len(p.askings)),
        **{name: np.concatenate([getattr(p, name) for p in parts]) for name in plain},
    )


@dataclass(frozen=True)
class ImpressionSplit:
    """Consecutive times: to fit, to stop early, to calibrate, to test."""

    fit: Impressions
    stop: Impressions
    calibrate: Impressions
    test: Impressions


def split_impressions(rows: Impressions, gap_ms: int = labels.WINDOW_MS) -> ImpressionSplit:
    """60 %, 10 %, 15 % and 15 % of the time.

    Args:
        gap_ms: left out before each border, so that no label looks across it.

    Raises:
        ValueError: a part would be empty.
    """
    begin, end = int(rows.at_ms.min()), int(rows.at_ms.max()) + 1
    edges = [begin + round(share * (end - begin)) for share in (0, 0.6, 0.7, 0.85, 1)]
    parts = [
        rows.take((rows.at_ms >= a) & (rows.at_ms < (b if b == end else b - gap_ms)))
        for a, b in itertools.pairwise(edges)
    ]
    if not all(len(part) for part in parts):
        raise ValueError(f"rows: {(end - begin) / 60_000:.0f} minutes are too few for four parts, {gap_ms} ms apart")
    return ImpressionSplit(*parts)


def segments(rows: Impressions, age_minutes: NDArray[np.float32], languages: Mapping[int, str]) -> dict[
    str, NDArray[np.bool_]
]:  # fmt: skip
    """Which rows are of which kind, bool[R] by name: new and old streams, head and tail creators, languages.

    Args:
        age_minutes: float32[R] of each row's stream. languages: name by code.
    """
    numbers, counts = np.unique(rows.creator, return_counts=True)
    by_size = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[by_size]) - counts[by_size]
    head = numbers[by_size[before < HEAD_SHARE * len(rows)]]
    is_head = np.isin(rows.creator, head)
    found = {
        "new streams": age_minutes < NEW_MINUTES, "old streams": age_minutes >= NEW_MINUTES,
        "head creators": is_head, "tail creators": ~is_head,
    }  # fmt: skip
    for code in np.unique(rows.codes[:, 0]).tolist():
        found[f"language {languages.get(code, code)}"] = rows.codes[:, 0] == code
    return found


def _histories(table: RowTable, first: NDArray[np.int64], dim: int) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
    """sequence_embedding and sequence_meta of the askings whose first rows are ``first``; zeros without the columns."""
    n = len(first)
    if "recent_meta" not in table.columns:
        return (
            np.zeros((n, SEQUENCE, dim), np.float16),
            np.zeros((n, SEQUENCE, len(SEQUENCE_META)), np.float32),
        )
    return (
        table["recent_embeddings"][first].reshape(n, SEQUENCE, dim),
        table["recent_meta"][first].reshape(n, SEQUENCE, len(SEQUENCE_META)),
    )


def _texts(column: NDArray[Any]) -> NDArray[np.str_]:
    return column.astype(str)


def _codes(column: NDArray[Any], buckets: int) -> NDArray[np.int64]:
    names, inverse = np.unique(_texts(column), return_inverse=True)
    return bucket_of(names.tolist(), buckets)[inverse]
