"""The row log: feature rows of a share of the served slates, as the server had them, for checks against a replay.

Features are read on the engine thread, right after the replies were handed out and before anything else is applied, by
the very call that Explain and the model's refresh use; a thread of its own turns them into bytes and writes them. A
disk that is slow or full costs rows, which are counted, and never a reply.

A file is an Arrow IPC stream (`row_schema`), readable up to its last whole batch whatever ended it.
"""

from __future__ import annotations

import json
import logging
import queue
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from server.config import TelemetrySettings
from server.errors import ConfigError
from server.live.features import Features, FeatureSet
from server.live.table import LiveTable
from server.log.arrow import array_of, strings_of
from server.ranking.slates import ReplyState, SlateBatch
from server.scoring.ranker_schema import SEQUENCE, SEQUENCE_META
from server.viewers.table import Histories, ViewerTable

logger = logging.getLogger(__name__)

PATTERN = "rows-*.arrows"
MAX_WAITING = 256
"""Slates between the engine and the writing thread; more are dropped."""


def row_schema(features: FeatureSet, viewers_dim: int = 0) -> Any:
    """One row per stream of a logged slate. ``position`` counts from 0, ``offset`` is the reply's applied_offset.

    Args:
        viewers_dim: D of the histories of viewers that are logged, too, the same in all rows of a slate; 0: none.
    """
    vectors = [pa.field("features", pa.list_(pa.float32(), len(features))),
               pa.field("feature_states", pa.list_(pa.uint8(), len(features)))]  # fmt: skip
    plain = [
        ("at_ms", pa.int64()), ("offset", pa.int64()), ("request_id", pa.string()), ("viewer_id", pa.string()),
        ("stream_id", pa.string()), ("epoch", pa.int64()), ("position", pa.int32()), ("propensity", pa.float32()),
        ("score", pa.float32()), ("model_version", pa.string()),
    ]  # fmt: skip
    if viewers_dim:
        vectors.append(pa.field("recent_meta", pa.list_(pa.float32(), SEQUENCE * len(SEQUENCE_META))))
        vectors.append(pa.field("recent_embeddings", pa.list_(pa.float16(), SEQUENCE * viewers_dim)))
    said = {"feature_schema": features.schema, "features": json.dumps(features.names)}
    return pa.schema([*plain, *vectors], metadata=said)


@dataclass(frozen=True)
class _Slate:
    """One reply's streams, copied: n of them."""

    at_ms: int
    offset: int
    request_id: str
    viewer_id: str
    model_version: str
    ids: list[str]
    epoch: NDArray[np.int64]
    propensity: NDArray[np.float32]
    score: NDArray[np.float32]
    found: Features
    history: Histories | None  # of its viewer alone


class RowLog:
    """Chooses slates by chance, and writes their rows. ``offer`` is called by the engine thread only.

    Args:
        table: whose rows the slates name. dropped: told of rows that could not be written, and why.

    Raises:
        ConfigError: ``settings.row_log`` is no folder that can be written to.
    """

    def __init__(
        self,
        settings: TelemetrySettings,
        table: LiveTable,
        features: FeatureSet,
        written: Callable[[int], None],
        dropped: Callable[[str, int], None],
    ) -> None:
        assert settings.row_log is not None
        self._settings, self._table, self._features = settings, table, features
        self._written, self._dropped = written, dropped
        self._viewers = table.follower if isinstance(table.follower, ViewerTable) else None
        self._schema = row_schema(features, 0 if self._viewers is None else self._viewers.dim)
        self._folder = settings.row_log
        self._chance = random.Random()
        self._waiting: queue.Queue[_Slate | None] = queue.Queue(MAX_WAITING)
        self._file: Any = None
        self._stream: Any = None
        self._failing = False
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._open_next()
        except OSError as error:
            raise ConfigError(f"telemetry.row_log: {self._folder} cannot be written to: {error}") from error
        self._thread = threading.Thread(target=self._run, name="row-log", daemon=True)
        self._thread.start()

    def offer(self, slates: SlateBatch, state: ReplyState) -> None:
        """Takes its share of a batch that was just answered; the table is still as it was then."""
        for b in range(len(slates.batch)):
            if self._chance.random() < self._settings.row_log_share and slates.counts[b]:
                self._take(slates, state, b)

    def close(self) -> None:
        """Writes what is waiting, then ends the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _take(self, slates: SlateBatch, state: ReplyState, b: int) -> None:
        if self._waiting.full():
            self._dropped("busy", int(slates.counts[b]))
            return
        table, request = self._table, slates.batch.requests[b]
        slots = slates.slots[b, : slates.counts[b]].copy()
        slate = _Slate(
            at_ms=slates.as_of_ms,
            offset=state.applied_offset,
            request_id=request.request_id,
            viewer_id=request.viewer_id,
            model_version=state.model_version,
            ids=[table.stream_id(int(slot)) for slot in slots],
            epoch=table.columns.epoch[slots],
            propensity=slates.exploration[b, : len(slots)].copy(),
            score=slates.scores[b, : len(slots)].astype(np.float32),
            found=table.accumulators.features(self._features, slots, slates.as_of_ms, table.landmark_ms),
            history=None
            if self._viewers is None
            else self._viewers.histories(slates.batch.viewer_hash[b : b + 1], slates.as_of_ms),
        )
        self._waiting.put_nowait(slate)  # this thread alone fills it, so there is room

    # --- the writing thread -------------------------------------------------------------------

    def _run(self) -> None:
        while (slate := self._waiting.get()) is not None:
            try:
                self._write(slate)
            except (OSError, pa.ArrowException) as error:
                self._dropped("write", len(slate.ids))
                if not self._failing:
                    logger.error("telemetry.row_log: rows are lost until it can be written again: %s", error)
                self._failing, self._stream = True, None  # what the file holds beyond its last whole batch is unknown
                self._file.close()
                continue
            self._failing = False
            self._written(len(slate.ids))
        if self._stream is not None:
            self._stream.close()
        self._file.close()

    def _write(self, slate: _Slate) -> None:
        n = len(slate.ids)
        columns = {
            "at_ms": array_of(np.full(n, slate.at_ms, np.int64)),
            "offset": array_of(np.full(n, slate.offset, np.int64)),
            "request_id": strings_of([slate.request_id] * n), "viewer_id": strings_of([slate.viewer_id] * n),
            "stream_id": strings_of(slate.ids), "epoch": array_of(slate.epoch),
            "position": array_of(np.arange(n, dtype=np.int32)), "propensity": array_of(slate.propensity),
            "score": array_of(slate.score), "model_version": strings_of([slate.model_version] * n),
            "features": array_of(slate.found.values), "feature_states": array_of(slate.found.states),
        }  # fmt: skip
        if slate.history is not None:
            columns["recent_meta"] = array_of(np.repeat(slate.history.meta.reshape(1, -1), n, axis=0))
            embedding = slate.history.embedding.astype(np.float16).reshape(1, -1)
            columns["recent_embeddings"] = array_of(np.repeat(embedding, n, axis=0))
        batch = pa.record_batch([columns[name] for name in self._schema.names], schema=self._schema)
        if self._stream is None:
            self._open_next()
        elif self._file.tell() > self._settings.row_log_file_bytes:
            self._stream.close()
            self._file.close()
            self._open_next()
        self._stream.write_batch(batch)
        self._file.flush()

    def _open_next(self) -> None:
        """Begins the next file; the oldest ones go."""
        paths = sorted(self._folder.glob(PATTERN))
        number = int(paths[-1].stem.removeprefix("rows-")) + 1 if paths else 1
        for path in paths[: max(0, len(paths) + 1 - self._settings.row_log_files)]:
            path.unlink()
        self._file = (self._folder / f"rows-{number:08d}.arrows").open("xb")
        self._stream = pa.ipc.new_stream(self._file, self._schema)


def read_row_log(folder: Path) -> Any:
    """All rows of a folder as one Arrow table, oldest first; a file that ends in the middle gives what is whole.

    Raises:
        ConfigError: there is none.
    """
    batches, schema = [], None
    for path in sorted(folder.glob(PATTERN)):
        with path.open("rb") as file:
            try:
                stream = pa.ipc.open_stream(file)
                schema = stream.schema
                batches += list(_whole(stream))
            except pa.ArrowInvalid:  # not even its schema was written
                continue
    if schema is None:
        raise ConfigError(f"{folder}: no row log there ({PATTERN})")
    return pa.Table.from_batches(batches, schema)


def _whole(stream: Any) -> Any:
    while True:
        try:
            yield stream.read_next_batch()
        except (StopIteration, pa.ArrowInvalid, OSError):  # the end, or a batch that was not written to its end
            return
