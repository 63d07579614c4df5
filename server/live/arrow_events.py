"""Events that arrive as columns: one Arrow IPC stream with one record batch, a row per event.

Same limits, codes and messages as the message form, because the same code says them: a row that the kernel flags is put
into an Event message and handed to `check_event`. Python runs per start, end and refused row only; everything else is
read by `kernels.event_arrow` where it lies. The schema is described in docs/columnar-events.md and in ingest.proto.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from liverank.v1 import ingest_pb2 as pb
from numpy.typing import NDArray

from kernels.event_arrow import CODES, COLUMNS, N_DESCRIBED, TEXT32, TEXT64, decode_columns, text_bytes
from kernels.event_rows import pack_names
from server.config import TableSettings
from server.errors import InvalidRequest
from server.live.arrow_schema import LISTS, Column, read_laid_out
from server.live.event_checks import KIND_NAMES, KINDS
from server.live.events import DecodedBatch, Marks, columns_of, finished, packed_currencies

MAX_TEXT_BYTES = 16 << 20
"""Text of one column with its dictionary applied. Few bytes on the wire could stand for any number otherwise."""

_KINDS = pack_names(KINDS)
_PLACES = {name: place for place, name in enumerate(COLUMNS)}


def decode_arrow(marks: Marks, payload: bytes | memoryview, settings: TableSettings) -> DecodedBatch:
    """The columns of an Arrow event batch, and the refused rows.

    Raises:
        InvalidRequest: ``arrow`` is no such stream, or a column is missing, unknown or of another type.
    """
    # Copied to where a word may begin: inside of a message it lies anywhere.
    words = np.zeros(-(-len(payload) // 8), np.int64)
    data = words.view(np.uint8)[: len(payload)]
    data[:] = np.frombuffer(payload, np.uint8)
    batch, layout = read_laid_out(data, settings.max_events_per_batch)
    columns = _columns(batch, layout, words)
    if columns is None:
        return decode_by_row(marks, batch, settings)
    rows = decode_columns(words, columns, batch.num_rows, _KINDS, packed_currencies(settings.currencies))
    return finished(marks, rows, data, lambda row: message_of(batch, row), settings)


def decode_by_row(marks: Marks, batch: Any, settings: TableSettings) -> DecodedBatch:
    """`decode_arrow` with a message per row: what it is measured by."""
    return columns_of(marks, (message_of(batch, row) for row in range(batch.num_rows)), settings)


# --- where the columns lie -------------------------------------------------------------------------


def _columns(batch: Any, layout: tuple[Column, ...], words: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """The table that `decode_columns` takes, of a batch that was read from ``words``; None when it cannot be made.

    Raises:
        InvalidRequest: a column has too much text.
    """
    table, spare = np.zeros((len(COLUMNS), N_DESCRIBED), np.int64), np.zeros(N_DESCRIBED, np.int64)
    begin, much = words.ctypes.data, words.nbytes > MAX_TEXT_BYTES
    for number, (name, form, width, dict_form) in enumerate(layout):
        place = _PLACES.get(name)
        counted = form == CODES or (much and form in (TEXT32, TEXT64))
        if place is None and not counted:
            continue
        row = spare if place is None else table[place]
        column = batch.column(number)
        if form == CODES:
            texts = column.dictionary
            validity, values = _places(column.indices, begin)
            texts_validity, offsets, text = _places(texts, begin)
            found = [form, validity, values, width, text, len(texts), texts_validity, offsets, dict_form]
        else:
            validity, values, *text_at = _places(column, begin)
            found = [form, validity, values, width, *text_at]
            offsets = 0
        if values % 8 or offsets % 8 or column.offset:
            return None
        row[: len(found)] = found
        # Plain text is as long as its message; only a dictionary makes much of little.
        if counted and (total := text_bytes(words, row, batch.num_rows)) > MAX_TEXT_BYTES:
            raise InvalidRequest(f"arrow.{name}", f"at most {MAX_TEXT_BYTES} bytes of text allowed, got {total}")
    return table


def _places(column: Any, begin: int) -> list[int]:
    """Where the buffers of a column begin; that of the validity is -1 where nothing is null."""
    validity, *others = column.buffers()
    nulls = -1 if validity is None or column.null_count == 0 else validity.address - begin
    return [nulls, *[0 if buffer is None else buffer.address - begin for buffer in others]]


# --- rows as messages ------------------------------------------------------------------------------


def message_of(batch: Any, row: int) -> Any:
    """A row as an Event message."""
    one = {name: batch.column(name)[row].as_py() for name in batch.schema.names if name not in LISTS}
    get = {name: value for name, value in one.items() if value is not None}.get
    event = pb.Event(
        sequence=get("sequence", 0), stream_id=get("stream_id", ""), epoch=get("epoch", 0),
        event_time_ms=get("event_time_ms", 0), viewer_id=get("viewer_id", ""),
    )  # fmt: skip
    case = get("kind", "")
    if isinstance(case, int):
        case = KIND_NAMES.get(case, "")
    if case not in KINDS:
        return event
    payload = getattr(event, case)
    payload.SetInParent()
    for name in _FIELDS[type(payload).__name__]:
        if name not in LISTS:
            setattr(payload, name, get(name, getattr(payload, name)))
        elif name in batch.schema.names:
            values = batch.column(name)[row].values
            payload_list = getattr(payload, name)
            payload_list.extend([] if values is None else _list_values(values))
    return event


_STARTED_TEXTS = ("creator_id", "title", "language", "category", "region")
_FIELDS: dict[str, tuple[str, ...]] = {
    "Started": (*_STARTED_TEXTS, "age_rating", "embedding", "tags"), "Heartbeat": ("media_sequence",),
    "Ended": ("reason", "only_if_not_renewed_since_ms"),
    "ViewerCount": ("count",), "Interaction": ("count",), "Watched": ("seconds",),
    "Money": ("amount_minor", "currency"), "Reported": ("reason",), "Moderated": ("action",),
    "Impression": (
        "request_id", "served_ms", "verify_by_ms", "position", "propensity", "model_version", "applied_offset",
    ),
}  # fmt: skip
"""Columns that each payload message takes; named as its fields."""


def _list_values(values: Any) -> list[Any]:
    """One row's list; a null in it is the default of its type."""
    default = "" if pa.types.is_string(values.type) else 0.0
    return [default if value is None else value for value in values.to_pylist()]
