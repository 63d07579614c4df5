"""Columns and types of dataset files, the one definition for who writes them and who trains on them.

    table = read_rows(Path("rows.parquet"))   # checked; table.features float32[n, F], table["clicked"] bool[n]

See docs/datasets.md for the meaning of each column; `models.synthetic` makes such a file out of nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from models import labels
from server.errors import ConfigError
from server.live.features import FeatureSet
from server.scoring.ranker_schema import SEQUENCE, SEQUENCE_META
from server.viewers.table import Histories

Kind = Literal["impressions", "streams"]
ROW_GROUP_ROWS = 8_192
FORMAT = "2"
"""Changes when a column changes its name, type or meaning."""

_STREAM = [("stream_id", pa.string()), ("epoch", pa.int64())]
_ATTRIBUTES = [("creator", pa.string()), ("category", pa.string()), ("language", pa.string())]
_IMPRESSION = [
    ("at_ms", pa.int64()), ("offset", pa.int64()), ("impression_ms", pa.int64()), ("impression_offset", pa.int64()),
    ("impression_index", pa.int32()), ("viewer_id", pa.string()), ("request_id", pa.string()),
    *_STREAM, ("position", pa.int32()), ("propensity", pa.float32()), ("model_version", pa.string()), *_ATTRIBUTES,
]  # fmt: skip
_IMPRESSION_LABELS = [
    ("clicked", pa.bool_()), ("watch_s", pa.float32()), ("watched", pa.bool_()), ("purchased", pa.bool_()),
    ("purchase_value", pa.float32()), ("reported", pa.bool_()), ("label_offset", pa.int64()),
]  # fmt: skip
_MOMENT = [("at_ms", pa.int64()), ("offset", pa.int64()), *_STREAM, *_ATTRIBUTES]
_STREAM_LABELS = [
    *((f"live_after_{minutes}m", pa.bool_()) for minutes in labels.HORIZONS_MINUTES),
    *((name, pa.float32()) for name in labels.stream_label_names()),
]  # fmt: skip


def viewer_fields(dim: int) -> list[tuple[str, Any]]:
    """Optional columns of impressions: the viewer's recent streams as a ranker gets them (`server.viewers.table`)."""
    return [
        ("recent_meta", pa.list_(pa.float32(), SEQUENCE * len(SEQUENCE_META))),
        ("recent_embeddings", pa.list_(pa.float16(), SEQUENCE * dim)),
    ]


def history_columns(histories: Histories) -> dict[str, Any]:
    """The columns of `viewer_fields` for n viewers. Embeddings lose nothing: viewers' tables hold them as float16."""
    n = len(histories.meta)
    embedding = histories.embedding.astype(np.float16).reshape(n, -1)
    return {"recent_meta": vectors(histories.meta.reshape(n, -1)), "recent_embeddings": vectors(embedding)}


def arrow_schema(kind: Kind, n_features: int, dim: int, viewers: bool = False) -> Any:
    """The Arrow schema of a file, without metadata.

    Args:
        n_features: F, columns of the feature set. dim: D, of stream embeddings. viewers: with `viewer_fields`.
    """
    vectors = [
        ("features", pa.list_(pa.float32(), n_features)), ("feature_states", pa.list_(pa.uint8(), n_features)),
        ("stream_embedding", pa.list_(pa.float32(), dim)),
    ]  # fmt: skip
    if kind == "streams":
        return pa.schema([*_MOMENT, *vectors, *_STREAM_LABELS])
    return pa.schema([*_IMPRESSION, *vectors, *(viewer_fields(dim) if viewers else []), *_IMPRESSION_LABELS])


def schema_hash(schema: Any, feature_schema: str, kind: Kind) -> str:
    """16 hex digits: equal for files that a model can be trained on together.

    Depends on columns and types, on the declaration of the features, and on the definition of the labels.
    """
    said = [FORMAT, kind, feature_schema, [[f.name, str(f.type)] for f in schema], labels.definition(kind)]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


class RowWriter:
    """Writes rows in groups of `ROW_GROUP_ROWS`, whatever the sizes of what it is given: equal rows, equal file.

    A context manager: the file appears complete, with its metadata, or not at all.

    Args:
        extra: further metadata, name → text, such as where the rows came from; no part of any hash.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, path: Path, kind: Kind, features: FeatureSet, dim: int, viewers: bool = False) -> None:
        self.schema = arrow_schema(kind, len(features), dim, viewers)
        self.extra: dict[str, str] = {}
        self.rows = 0
        self.path, self._beside = path, path.with_name(f".{path.name}.part")
        self.schema_hash = schema_hash(self.schema, features.schema, kind)
        self._metadata = {
            "liverank.rows": kind, "liverank.format": FORMAT, "liverank.feature_schema": features.schema,
            "liverank.features": json.dumps(features.names), "liverank.labels": json.dumps(labels.definition(kind)),
            "liverank.schema_hash": self.schema_hash,
        }  # fmt: skip
        self._data = hashlib.sha256()
        self._waiting: list[Any] = []
        self._waiting_rows = 0

    def __enter__(self) -> RowWriter:
        try:
            self._parquet = pq.ParquetWriter(self._beside, self.schema, compression="zstd")
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be written: {error.strerror or error}") from error
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self._flush(1)
            self._parquet.add_key_value_metadata({**self._metadata, **self.extra, "liverank.data_hash": self.data_hash})
        self._parquet.close()
        if kind is None:
            self._beside.replace(self.path)
        else:
            self._beside.unlink(missing_ok=True)

    @property
    def data_hash(self) -> str:
        """16 hex digits that identify the rows written, in their order."""
        return self._data.hexdigest()[:16]

    def write(self, rows: Any) -> None:
        """Takes an Arrow table or record batch of this schema."""
        table = pa.Table.from_batches([rows]) if isinstance(rows, pa.RecordBatch) else rows
        self._waiting.append(table.cast(self.schema))
        self._waiting_rows += len(table)
        self._flush(ROW_GROUP_ROWS)

    def _flush(self, least: int) -> None:
        if self._waiting_rows < least:
            return
        table = pa.concat_tables(self._waiting)
        end = len(table) if least == 1 else len(table) - len(table) % ROW_GROUP_ROWS
        for first in range(0, end, ROW_GROUP_ROWS):
            group = table.slice(first, min(ROW_GROUP_ROWS, end - first)).combine_chunks()
            self._hash(group)
            self._parquet.write_table(group, row_group_size=ROW_GROUP_ROWS)
            self.rows += len(group)
        self._waiting, self._waiting_rows = [table.slice(end)], len(table) - end

    def _hash(self, group: Any) -> None:
        # Taken from the values and not from Arrow's buffers, which may hold more than the slice that is meant.
        for name in group.column_names:
            column = group.column(name)
            kind = column.type
            if pa.types.is_fixed_size_list(kind) or not (pa.types.is_string(kind) or pa.types.is_list(kind)):
                self._data.update(np.ascontiguousarray(_values(column)).tobytes())
            else:
                self._data.update(json.dumps(column.to_pylist()).encode())


@dataclass(frozen=True)
class RowTable:
    """A file as arrays. n rows, F features, embeddings of D.

    columns: name → array [n] (text as object arrays), or [n, width] for vectors. metadata: name → text, without the
    prefix ``liverank.``.
    """

    columns: dict[str, NDArray[Any]]
    metadata: dict[str, str]

    def __len__(self) -> int:
        return len(self.columns["at_ms"])

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.columns[name]

    @property
    def features(self) -> NDArray[np.float32]:
        """float32[n, F]."""
        return self.columns["features"]

    @property
    def feature_names(self) -> tuple[str, ...]:
        return tuple(json.loads(self.metadata["features"]))


def read_rows(path: Path, columns: Sequence[str] | None = None) -> RowTable:
    """Reads a whole file, or some of its columns. Lists of varying length stay object arrays of lists.

    Raises:
        ConfigError: it cannot be read, or is no file of this form.
    """
    try:
        file = pq.ParquetFile(path)
        metadata = _metadata(file, path)
        table = file.read(columns=None if columns is None else [*dict.fromkeys(["at_ms", *columns])])
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{path}: cannot be read as Parquet: {error}") from error
    return RowTable({name: _values(table.column(name)) for name in table.column_names}, metadata)


def iterate_rows(path: Path, columns: Sequence[str] | None = None) -> Iterable[RowTable]:
    """The same, a row group at a time: memory for `ROW_GROUP_ROWS` rows. Raises ConfigError like `read_rows`."""
    try:
        file = pq.ParquetFile(path)
        metadata = _metadata(file, path)
        wanted = None if columns is None else [*dict.fromkeys(["at_ms", *columns])]
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=wanted)
            yield RowTable({name: _values(table.column(name)) for name in table.column_names}, metadata)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{path}: cannot be read as Parquet: {error}") from error


def _metadata(file: Any, path: Path) -> dict[str, str]:
    said = {k.decode(): v.decode() for k, v in (file.metadata.metadata or {}).items() if k.startswith(b"liverank.")}
    metadata = {name.removeprefix("liverank."): value for name, value in said.items()}
    if metadata.get("format") != FORMAT:
        raise ConfigError(f"{path}: dataset of format {FORMAT} wanted, got {metadata.get('format', 'another file')}")
    return metadata


def _values(column: Any) -> NDArray[Any]:
    kind = column.type
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_fixed_size_list(kind):
        return np.asarray(array.flatten()).reshape(len(array), kind.list_size)
    return np.asarray(array.to_numpy(zero_copy_only=False))


def vectors(values: NDArray[Any]) -> Any:
    """[n, width] as a column of fixed-size lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])
