"""A history file (CSV or Parquet), checked, as columns.

Required columns: ``t_folded_s, event, video_id, viewers``. Used when there: ``channel, org, likes, likes_delta,
comments``. Others are ignored. ``event`` is live_start, snapshot or live_end; rows are sorted by ``t_folded_s``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from server.errors import ConfigError

REQUIRED = ("t_folded_s", "event", "video_id", "viewers")
TEXT = ("event", "video_id", "channel", "org")
NUMBERS = {
    "t_folded_s": 2**31 - 1,
    "viewers": 2**32 - 1,
    "likes": 2**53,
    "likes_delta": 2**32 - 1,
    "comments": 2**53,
}
"""Numeric column → largest value allowed: what the message's field can carry; totals: exact in a float64; times: on
the file's clock, before the year 2100."""


class Kind(IntEnum):
    """What a row tells."""

    START = 0
    SNAPSHOT = 1
    END = 2


_KINDS = {"live_start": Kind.START, "snapshot": Kind.SNAPSHOT, "live_end": Kind.END}


@dataclass(frozen=True)
class History:
    """n rows in the order of the file, about the streams that they name.

    t_s int64[n]: seconds of the file's clock, never falling. kind uint8[n]: a ``Kind``. stream int32[n]: index into
    the per-stream tuples, in order of appearance. viewers int64[n]: concurrent. likes int64[n], chats int64[n]: new
    since the stream's row before, 0 where the file does not tell. ids, creators, categories: one per stream.
    has_likes: the file tells likes at all.
    """

    t_s: NDArray[np.int64]
    kind: NDArray[np.uint8]
    stream: NDArray[np.int32]
    viewers: NDArray[np.int64]
    likes: NDArray[np.int64]
    chats: NDArray[np.int64]
    ids: tuple[str, ...]
    creators: tuple[str, ...]
    categories: tuple[str, ...]
    has_likes: bool

    def __len__(self) -> int:
        return len(self.t_s)


def read_history(path: Path) -> History:
    """Reads and checks a whole file.

    Raises:
        ConfigError: names file, row (1 is the first row of data) and column, and what is allowed there.
    """
    table = _read(path)
    n = len(table)
    numbers = {name: _whole(table.column(name), path, name) for name in NUMBERS if name in table.column_names}
    text = {name: _text(table.column(name), path, name) for name in TEXT if name in table.column_names}
    kind = _kinds(text["event"], path)
    t_s = numbers["t_folded_s"]
    for row in np.flatnonzero(np.diff(t_s) < 0)[:1]:
        _fail(path, int(row) + 1, "t_folded_s", f"rows must be sorted by it, got {t_s[row + 1]} after {t_s[row]}")
    stream, ids = _encode(text["video_id"])
    for row in np.flatnonzero(np.array([not name for name in ids])[stream])[:1]:
        _fail(path, int(row), "video_id", "a name wanted, got nothing")
    nothing = np.zeros(n, np.int64)
    if "likes_delta" in numbers:
        likes = numbers["likes_delta"]
    else:
        likes = increases(numbers["likes"], stream) if "likes" in numbers else nothing
    channels = _first_of_stream(text.get("channel"), stream, len(ids))
    return History(
        t_s=t_s,
        kind=kind,
        stream=stream,
        viewers=numbers["viewers"],
        likes=likes,
        chats=increases(numbers["comments"], stream) if "comments" in numbers else nothing,
        ids=ids,
        creators=tuple(channel or name for channel, name in zip(channels, ids)),
        categories=_first_of_stream(text.get("org"), stream, len(ids)),
        has_likes="likes_delta" in numbers or "likes" in numbers,
    )


def increases(total: NDArray[np.int64], stream: NDArray[np.int32]) -> NDArray[np.int64]:
    """int64[n]: by how much each row's running total int64[n] is above that of its stream's row before.

    0 on a stream's first row, where nobody knows since when it counts, and where a total falls.
    """
    order = np.argsort(stream, kind="stable")
    risen = np.zeros(len(total), np.int64)
    step = np.diff(total[order])
    step[stream[order][1:] != stream[order][:-1]] = 0
    risen[order[1:]] = np.maximum(step, 0)
    return risen


def _read(path: Path) -> pa.Table:
    """The known columns of the file; text of a CSV file is not converted yet, so that faults can be located."""
    known = [*dict.fromkeys([*REQUIRED, *TEXT, *NUMBERS])]
    try:
        with path.open("rb") as file:
            is_parquet = file.read(4) == b"PAR1"
        if is_parquet:
            names = pa.parquet.read_schema(path).names
            table = pa.parquet.read_table(path, columns=[name for name in known if name in names])
        else:
            table = pa.csv.read_csv(
                path,
                read_options=pa.csv.ReadOptions(use_threads=False),  # only then are rows named in errors
                convert_options=pa.csv.ConvertOptions(
                    column_types=dict.fromkeys(known, pa.string()), strings_can_be_null=False
                ),
            )
        names = table.column_names
        table.validate(full=True)  # Arrow takes texts of a Parquet file as they are, UTF-8 or not
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as CSV or Parquet: {error}") from error
    if missing := [name for name in REQUIRED if name not in names]:
        raise ConfigError(f"{path}: column {', '.join(missing)} is missing, found {', '.join(names)}")
    if twice := [name for name in known if names.count(name) > 1]:
        raise ConfigError(f"{path}: column {', '.join(twice)} is there twice")
    if not len(table):
        raise ConfigError(f"{path}: no rows")
    return table.select([name for name in known if name in names])


def _fail(path: Path, row: int, column: str, what: str) -> None:
    """Raises for a row counted from 0."""
    raise ConfigError(f"{path}: row {row + 1}, column {column}: {what}")


def _whole(column: pa.ChunkedArray, path: Path, name: str) -> NDArray[np.int64]:
    """Whole numbers int64[n] from 0 to the column's limit."""
    wanted = f"a whole number from 0 to {NUMBERS[name]} wanted"
    kind = column.type
    if not (pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise ConfigError(f"{path}: column {name}: {wanted}, got {kind}")
    try:
        values = pc.cast(column, pa.float64(), safe=False).to_numpy()
    except pa.ArrowInvalid:
        values = np.array([_float_or_nan(cell) for cell in column.to_pylist()])
    fine = np.isfinite(values) & (values >= 0) & (values <= NUMBERS[name])
    fine[fine] = values[fine] % 1 == 0
    for row in np.flatnonzero(~fine)[:1]:
        _fail(path, int(row), name, f"{wanted}, got {column[int(row)].as_py()!r}")
    return values.astype(np.int64)


def _float_or_nan(cell: str | None) -> float:
    """As Arrow reads a number; NaN, which is refused, for anything else."""
    try:
        return float(pc.cast(pa.scalar(cell, pa.string()), pa.float64()).as_py() or 0.0) if cell else np.nan
    except pa.ArrowInvalid:
        return np.nan


def _text(column: pa.ChunkedArray, path: Path, name: str) -> pa.Array:
    """Strings, nulls as ""."""
    try:
        return pc.fill_null(pc.cast(column, pa.string()), "").combine_chunks()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ConfigError(f"{path}: column {name}: text wanted, got {column.type}") from error


def _encode(text: pa.Array) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """(index int32[n], the distinct texts in order of appearance)."""
    encoded = text.dictionary_encode()
    return encoded.indices.to_numpy().astype(np.int32), tuple(encoded.dictionary.to_pylist())


def _kinds(text: pa.Array, path: Path) -> NDArray[np.uint8]:
    index, names = _encode(text)
    for row in np.flatnonzero(np.array([name not in _KINDS for name in names])[index])[:1]:
        _fail(path, int(row), "event", f"one of {', '.join(_KINDS)} wanted, got {names[index[row]]!r}")
    return np.array([_KINDS[name] for name in names], np.uint8)[index]


def _first_of_stream(text: pa.Array | None, stream: NDArray[np.int32], n_streams: int) -> tuple[str, ...]:
    """The text of each stream's first row; "" without such a column."""
    if text is None:
        return ("",) * n_streams
    _, first = np.unique(stream, return_index=True)
    return tuple(text.take(pa.array(first)).to_pylist())
