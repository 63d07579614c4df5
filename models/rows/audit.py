"""Was it really so? Some rows of a file, read once more the plain way: apply the log up to `offset`, then compute.

Shares nothing with the jobs but the table and the feature function: neither the reading ahead, nor the order of
reading, nor the offsets that they claim.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.idmap import hash_ids, pack_ids
from models.rows.base import LeakError
from models.rows.cursor import Cursor
from models.rows.impressions import check_no_leak
from models.rows.source import Source, cursor_at_start, decode
from models.schema import iterate_rows, read_rows
from server.live.features import FeatureSet

Row = dict[str, Any]
_COLUMNS = ("at_ms", "offset", "stream_id", "epoch", "features", "feature_states", "stream_embedding")
_OF_VIEWERS = ("viewer_id", "recent_meta", "recent_embeddings")


def audit(path: Path, source: Source, features: FeatureSet, rows: int, seed: int = 0) -> int:
    """Compares ``rows`` rows of a file, chosen by chance, with the log, bit for bit; returns how many there were.

    Raises:
        LeakError: a row differs, or was read from a state that holds its own or its label's events. ConfigError,
        LogError: file or log cannot be read.
    """
    wanted = _sample(path, rows, seed)
    if not wanted:
        return 0
    cursor = cursor_at_start(source, features)
    by_offset: dict[int, list[Row]] = {}
    for row in wanted:
        by_offset.setdefault(int(row["offset"]), []).append(row)
    for row in by_offset.pop(cursor.offset, []):
        _compare(cursor, row)
    for record in source.records():
        cursor.apply(decode(record, source.table))
        for row in by_offset.pop(record.offset, []):
            _compare(cursor, row)
        if not by_offset:
            return len(wanted)
    raise LeakError(f"{path}: its rows are of records {sorted(by_offset)[:5]} …, which {source.name} does not have")


def _sample(path: Path, rows: int, seed: int) -> list[Row]:
    """Up to ``rows`` rows of all; every row of an impression file is checked for its offsets."""
    total = len(read_rows(path, ["at_ms"]))
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(rows, total), replace=False))
    found: list[Row] = []
    first = 0
    for table in iterate_rows(path):
        if "label_offset" in table.columns:
            check_no_leak(table["offset"], table["label_offset"], table["impression_offset"])
        mine = chosen[(chosen >= first) & (chosen < first + len(table))] - first
        names = [*_COLUMNS, *(name for name in _OF_VIEWERS if name in table.columns)]
        found += [{name: table[name][row] for name in names} for row in mine.tolist()]
        first += len(table)
    return found


def _compare(cursor: Cursor, row: Row) -> None:
    ids, lengths = pack_ids([row["stream_id"].encode()])
    slots = cursor.lookup(ids, lengths, np.array([row["epoch"]], np.int64))
    where = f"{row['stream_id']} after record {cursor.offset}"
    if slots[0] < 0:
        raise LeakError(f"{where}: the table does not hold this session")
    reading = cursor.read(slots, int(row["at_ms"]))
    pairs: dict[str, tuple[NDArray[np.generic], NDArray[np.generic]]] = {
        "features": (reading.features[0], row["features"]),
        "feature_states": (reading.states[0], row["feature_states"]),
        "stream_embedding": (reading.embedding[0], row["stream_embedding"]),
    }  # fmt: skip
    if "recent_meta" in row:
        histories = cursor.histories(hash_ids(*pack_ids([row["viewer_id"].encode()])), int(row["at_ms"]))
        if histories is None:
            raise LeakError(f"{where}: histories of viewers, which this log's settings do not remember")
        pairs["recent_meta"] = histories.meta[0], row["recent_meta"]
        pairs["recent_embeddings"] = histories.embedding[0].astype(np.float16), row["recent_embeddings"]
    for name, (ours, theirs) in pairs.items():
        if ours.tobytes() != np.asarray(theirs).tobytes():
            raise LeakError(f"{where}: {name} differ from what the log says")
