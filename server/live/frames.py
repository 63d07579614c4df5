"""Data frames, for what they are good at: micro-batches of events, group-by, snapshots in Parquet, ad-hoc tables.

cuDF on a GPU, pandas on a CPU: the same functions, the same results (sums of floats to rounding). Never on the way of a
request, and imported by nothing that serves: a frame costs more to make than a small batch costs to apply.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kernels import fence
from kernels.backend import Backend
from kernels.counters import COUNTERS, HALF_LIVES_MS, decay_factors
from server.errors import ConfigError
from server.live.accumulators import FIRST_COUNTER, SECOND_COUNTER
from server.live.arrow_schema import NUMBERS, TEXTS
from server.live.event_checks import INTERACTIONS, KINDS
from server.live.table import LiveTable

EVENT_TEXTS = ("stream_id", "viewer_id", "currency")
EVENT_NUMBERS = (
    "sequence", "epoch", "event_time_ms", "count", "seconds", "amount_minor", "action", "only_if_not_renewed_since_ms",
)  # fmt: skip
STATE_NAMES = ("free", "live", "suspect", "ended")


def frame_library(backend: Backend) -> ModuleType:
    """cuDF on a GPU backend, else pandas; imported here and nowhere else.

    Raises:
        ConfigError: it is not installed; says which extra brings it.
    """
    name, extra = ("cudf", "gpu") if backend.on_gpu else ("pandas", "frames")
    if name == "cudf" and not hasattr(np, "row_stack"):
        np.row_stack = np.vstack  # cuDF's compiler names it; NumPy 2.5 dropped it
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(f"data frames need {name}: pip install 'liverank[{extra}]' ({error})") from error


def from_arrow(table: Any, library: ModuleType) -> Any:
    """A frame of an Arrow table without nulls; on the GPU with cuDF."""
    return library.DataFrame.from_arrow(table) if library.__name__ == "cudf" else table.to_pandas()


def events_frame(batch: Any, currencies: Mapping[str, float], library: ModuleType) -> Any:
    """One row per event of a columnar batch (`read_batch` gives one; schema in docs/columnar-events.md).

    Columns: row int64 (place in the batch), kind uint8 (0 unknown), value float64 (as EventColumns.value: count,
    seconds, amount in the reference currency, action, time that makes an end conditional), and sequence uint64,
    epoch uint64, event_time_ms int64, stream_id, viewer_id as sent; what was null or not there is 0 or "". Nothing is
    refused: an unknown currency is worth 0, so take only the rows that the decoder accepted (`EventColumns.index`)
    where that matters.
    """
    columns = {name: _number(batch, name) for name in EVENT_NUMBERS}
    columns |= {name: _text(batch, name) for name in EVENT_TEXTS}
    columns["row"] = pa.array(np.arange(batch.num_rows))
    by_number = pa.types.is_int8(batch.schema.field("kind").type)
    columns["kind"] = _number(batch, "kind", pa.int8()) if by_number else _text(batch, "kind")
    frame = from_arrow(pa.table(columns), library)
    kind = frame["kind"] if by_number else frame["kind"].map(dict(KINDS)).fillna(0)
    known = kind.isin(list(KINDS.values()))
    frame["kind"] = kind.where(known, 0).astype("uint8")
    frame["value"] = _value(frame, currencies)
    return frame[["row", "sequence", "stream_id", "viewer_id", "kind", "epoch", "event_time_ms", "value"]]


def _value(frame: Any, currencies: Mapping[str, float]) -> Any:
    kind = frame["kind"]
    count = frame["count"].astype("float64")
    several = kind.isin(list(INTERACTIONS)) & (count < 1.0)
    value = count.where(kind.isin([fence.VIEWER_COUNT, *INTERACTIONS]), 0.0).where(~several, 1.0)
    value = value.where(kind != fence.WATCHED, frame["seconds"].astype("float64"))
    worth = frame["amount_minor"].astype("float64") * frame["currency"].map(dict(currencies)).fillna(0.0).astype(
        "float64"
    )
    value = value.where(~kind.isin([fence.BID, fence.PURCHASED]), worth)
    value = value.where(kind != fence.REPORTED, 1.0)
    value = value.where(kind != fence.END, frame["only_if_not_renewed_since_ms"].astype("float64"))
    return value.where(kind != fence.MODERATED, frame["action"].astype("float64"))


def join_slots(frame: Any, ids: Sequence[str], slots: NDArray[np.int32], library: ModuleType) -> Any:
    """The frame with a column slot int32, -1 where the stream is unknown; rows in their order.

    Args:
        ids: n distinct stream ids. slots: int32[n].
    """
    known = library.DataFrame({"stream_id": list(ids), "slot": slots})
    if len(known) == 0:
        return frame.assign(slot=np.full(len(frame), -1, np.int32))
    joined = frame.merge(known, on="stream_id", how="left").sort_values("row")  # cuDF keeps no order
    joined["slot"] = joined["slot"].fillna(-1).astype("int32")
    return joined.reset_index(drop=True)


def group_by_counter(frame: Any, library: ModuleType) -> Any:
    """Sums of a frame with slot, kind and value: slot int32, counter int8 (of COUNTERS), total float64; both ascending.

    A kind adds its value to one counter and 1 to another, as the table does. Rows without a slot count nowhere. The
    sums are not decayed: this answers "how much", the table answers "how much lately".
    """
    parts = []
    for counters, weighted in ((FIRST_COUNTER, True), (SECOND_COUNTER, False)):
        to_counter = {kind: int(counters[kind]) for kind in KINDS.values()}
        part = library.DataFrame(
            {
                "slot": frame["slot"],
                "counter": frame["kind"].map(to_counter).fillna(-1).astype("int8"),
                "total": frame["value"] if weighted else frame["value"] * 0.0 + 1.0,
            }
        )
        parts.append(part[(part["slot"] >= 0) & (part["counter"] >= 0)])
    sums = library.concat(parts).groupby(["slot", "counter"], as_index=False).sum()
    return sums.sort_values(["slot", "counter"]).reset_index(drop=True)


def to_parquet(frame: Any, path: Path) -> None:
    """Writes the columns of a frame, without its index."""
    frame.to_parquet(str(path), index=False)


def from_parquet(path: Path, library: ModuleType, columns: Sequence[str] | None = None) -> Any:
    """Reads a Parquet file, of `to_parquet` or `liverank table export`; ``columns`` limits it to some."""
    return library.read_parquet(str(path), columns=None if columns is None else list(columns))


def table_columns(table: LiveTable, at_ms: int) -> Any:
    """The used rows of a live table as an Arrow table: what Parquet and frames take.

    Names instead of interned numbers; ``<counter>_<half-life in s>`` float32, decayed to ``at_ms``; embedding a list of
    float32[D]; the sketches are left out (bytes that only the table can read).
    """
    columns, rows = table.columns, np.flatnonzero(table.columns.state[: table.rows] != fence.FREE)
    lengths = columns.id_lengths[rows]
    found: dict[str, Any] = {
        "slot": rows.astype(np.int32),
        "stream_id": [columns.ids[row, :length].tobytes().decode() for row, length in zip(rows, lengths, strict=True)],
        "title": [table.titles[row] for row in rows],
        "state": np.array(STATE_NAMES)[columns.state[rows]],
        "live": table.live_mask(at_ms)[rows],
    }
    for name, interner in (
        ("creator", table.creators), ("language", table.languages), ("category", table.categories),
        ("region", table.regions),
    ):  # fmt: skip
        found[name] = np.array(interner.names, object)[getattr(columns, name)[rows]]
    for name in (
        "epoch", "started_ms", "ended_ms", "lease_expires_ms", "media_sequence", "moderation", "age_rating",
        "last_event_ms", "viewers", "viewers_ms", "generation",
    ):  # fmt: skip
        found[name] = getattr(columns, name)[rows]
    decayed = columns.counters[rows] * decay_factors(at_ms, table.landmark_ms)
    for number, counter in enumerate(COUNTERS):
        for place, half_life_ms in enumerate(HALF_LIVES_MS):
            found[f"{counter}_{half_life_ms // 1000}s"] = decayed[:, number, place]
    flat = pa.array(columns.embedding[rows].ravel())
    found["embedding"] = pa.FixedSizeListArray.from_arrays(flat, columns.embedding.shape[1])
    texts = {"stream_id", "title", "state", "creator", "language", "category", "region"}
    return pa.table({name: pa.array(v, pa.string()) if name in texts else v for name, v in found.items()})


def _number(batch: Any, name: str, kind: Any = None) -> Any:
    """An Arrow column without nulls; zeros where the batch has none."""
    kind = NUMBERS[name] if kind is None else kind
    if name not in batch.schema.names:
        return pa.array(np.zeros(batch.num_rows, kind.to_pandas_dtype()))
    return pc.fill_null(batch.column(name), 0)


def _text(batch: Any, name: str) -> Any:
    """As `_number`, for text; a dictionary is applied."""
    assert name in (*TEXTS, "kind")
    if name not in batch.schema.names:
        return pa.repeat(pa.scalar("", pa.large_string()), batch.num_rows)
    column = batch.column(name)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return pc.fill_null(column.cast(pa.large_string()), "")
