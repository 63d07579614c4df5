"""Events that arrive as columns: one Arrow IPC stream with one record batch, a row per event.

Same limits, codes and messages as the message form, because the same code says them: a row that the array checks
flag is put into an Event message and handed to `check_event`. Python runs per start, end, impression and refused
row only; everything else stays in arrays. The schema is described in docs/columnar-events.md and in ingest.proto.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from liverank.v1 import ingest_pb2 as pb
from numpy.typing import NDArray

from kernels import fence
from kernels.idmap import ID_BYTES, hash_ids
from server.config import TableSettings
from server.errors import InvalidRequest
from server.live.arrow_schema import LISTS, NUMBERS, TEXTS, read_batch
from server.live.events import (
    INTERACTIONS,
    KINDS,
    MAX_AMOUNT_MINOR,
    MAX_COUNT,
    MAX_I63,
    MAX_TIME_MS,
    MAX_WATCH_SECONDS,
    NEEDS_EPOCH,
    DecodedBatch,
    EventColumns,
    ImpressionRow,
    Reject,
    Rejection,
    StartedRow,
    check_event,
)

MAX_TEXT_BYTES = 16 << 20
"""Text of one column with its dictionary applied. Few bytes on the wire could stand for any number otherwise."""

_STARTED_TEXTS = ("creator_id", "title", "language", "category", "region")
_IMPRESSION_NUMBERS = ("served_ms", "verify_by_ms", "position", "propensity", "applied_offset")
_IMPRESSION_TEXTS = ("viewer_id", "request_id", "model_version")
_NO_KIND = 0


@dataclass(frozen=True)
class Text:
    """A text column: distinct or plain values, and which of them each row has.

    lengths int64[m], starts int64[m] into data uint8[...]; codes int64[n] into the m values.
    """

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    data: NDArray[np.uint8]
    codes: NDArray[np.int64]

    def row_lengths(self) -> NDArray[np.int64]:
        """Bytes per row, int64[n]."""
        return np.asarray(self.lengths[self.codes])

    def packed(self) -> NDArray[np.uint8]:
        """uint8[n, 64]: the first 64 bytes of each row, zero-padded."""
        return self._packed(np.arange(len(self.lengths)))[self.codes]

    def _packed(self, values: NDArray[np.int64]) -> NDArray[np.uint8]:
        """As `packed`, of some of the m values."""
        inside = np.arange(ID_BYTES) < self.lengths[values, None]
        packed = np.zeros(inside.shape, np.uint8)
        packed[inside] = self.data[(self.starts[values, None] + np.arange(ID_BYTES))[inside]]
        return packed

    def numbers(self, of: Mapping[str, float], otherwise: float) -> NDArray[np.float64]:
        """float64[n]: the number of each row's text, ``otherwise`` where it has none."""
        found = np.full(len(self.lengths), otherwise, np.float64)
        for name, number in of.items():
            wanted = np.frombuffer(name.encode(), np.uint8)
            if len(wanted) <= ID_BYTES:
                as_long = np.flatnonzero(self.lengths == len(wanted))
                equal = (self._packed(as_long)[:, : len(wanted)] == wanted).all(axis=1)
                found[as_long[equal]] = number
        return np.asarray(found[self.codes])

    def value(self, code: int) -> str:
        """One of the m values."""
        start = int(self.starts[code])
        return self.data[start : start + int(self.lengths[code])].tobytes().decode()


def decode_arrow(producer_id: str, payload: bytes, settings: TableSettings) -> DecodedBatch:
    """The columns of an Arrow event batch, and the refused rows.

    Raises:
        InvalidRequest: ``arrow`` is no such stream, or a column is missing, unknown or of another type.
    """
    batch = read_batch(payload, settings.max_events_per_batch)
    return _Decoder(producer_id, batch, settings).decode()


class _Decoder:
    """One batch on its way to columns."""

    def __init__(self, producer_id: str, batch: Any, settings: TableSettings) -> None:
        self._producer_id, self._batch, self._settings = producer_id, batch, settings
        self._n = batch.num_rows
        self._texts = {name: self._text(name) for name in TEXTS}
        self._ids, self._viewers = self._texts["stream_id"], self._texts["viewer_id"]
        self._kind = self._kinds()
        self._numbers = {name: self._number(name) for name in NUMBERS}

    def decode(self) -> DecodedBatch:
        bad, value = self._check()
        rejected: list[Rejection] = []
        starts: dict[int, StartedRow] = {}
        scalar = np.flatnonzero(bad | (self._kind == fence.STARTED))
        for row in scalar:
            event = self._message(int(row))
            try:
                _, _, start = check_event(event, self._settings)
            except Reject as reject:
                bad[row] = True
                rejected.append(Rejection(int(row), event.sequence, reject.code, str(reject)))
                continue
            if not isinstance(start, StartedRow):
                raise RuntimeError(f"row {row}: the array checks refuse what the message checks accept")
            starts[int(row)] = start
        keep = np.flatnonzero(~bad)
        place = np.cumsum(~bad) - 1
        kind = self._kind[keep]
        reason = self._texts["reason"]
        viewers, viewer_lengths = self._viewers.packed()[keep], self._viewers.row_lengths()[keep].astype(np.uint8)
        media = np.minimum(self._numbers["media_sequence"][keep], np.uint64(MAX_I63)).astype(np.int64)
        events = EventColumns(
            producer_id=self._producer_id,
            index=keep.astype(np.int32),
            sequence=self._numbers["sequence"][keep],
            ids=self._ids.packed()[keep],
            id_lengths=self._ids.row_lengths()[keep].astype(np.uint8),
            kind=kind,
            epoch=self._numbers["epoch"][keep].astype(np.int64),
            time_ms=self._numbers["event_time_ms"][keep],
            value=value[keep],
            media_sequence=np.where(kind == fence.HEARTBEAT, media, 0),
            viewer_hash=hash_ids(viewers, viewer_lengths),
            started={int(place[row]): start for row, start in starts.items() if not bad[row]},
            ended_reason={
                int(at): reason.value(int(reason.codes[keep[at]])) for at in np.flatnonzero(kind == fence.END)
            },
            impressions={int(at): self._impression(int(keep[at])) for at in np.flatnonzero(kind == fence.IMPRESSION)},
        )
        return DecodedBatch(events, rejected)

    def _impression(self, row: int) -> ImpressionRow:
        """A row that passed the checks."""
        said: dict[str, Any] = {name: self._numbers[name][row].item() for name in _IMPRESSION_NUMBERS}
        for name in _IMPRESSION_TEXTS:
            text = self._texts[name]
            said[name] = text.value(int(text.codes[row]))
        return ImpressionRow(**said)

    # --- columns ------------------------------------------------------------------------------

    def _number(self, name: str) -> NDArray[Any]:
        """A numeric column; null and missing are 0."""
        if name not in self._batch.schema.names:
            return np.zeros(self._n, NUMBERS[name].to_pandas_dtype())
        return _plain(self._batch.column(name), NUMBERS[name].to_pandas_dtype())

    def _text(self, name: str) -> Text:
        """A text column; null and missing are ""."""
        if name not in self._batch.schema.names:
            none = np.zeros(1, np.int64)
            return Text(none, none, np.zeros(0, np.uint8), np.zeros(self._n, np.int64))
        column = self._batch.column(name)
        if pa.types.is_dictionary(column.type):
            # One value more, the empty one, stands for null.
            values, empty = column.dictionary, len(column.dictionary)
            codes = _plain(column.indices, column.indices.type.to_pandas_dtype()).astype(np.int64)
            codes[_is_null(column)] = empty
        else:
            values, codes = column, np.arange(self._n)
        starts, lengths, data = _text_buffers(values)
        text = Text(np.append(starts, 0), np.append(lengths, 0), data, codes)
        if (total := int(text.row_lengths().sum())) > MAX_TEXT_BYTES:
            raise InvalidRequest(f"arrow.{name}", f"at most {MAX_TEXT_BYTES} bytes of text allowed, got {total}")
        return text

    def _kinds(self) -> NDArray[np.uint8]:
        """uint8[n]; 0 where there is none, or none that is known."""
        known = np.zeros(256, np.uint8)
        known[list(KINDS.values())] = list(KINDS.values())
        if pa.types.is_int8(self._batch.column("kind").type):
            return np.asarray(known[_plain(self._batch.column("kind"), np.int8).view(np.uint8)])
        return self._text("kind").numbers(KINDS, _NO_KIND).astype(np.uint8)

    # --- checks -------------------------------------------------------------------------------

    def _check(self) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """(bool[n] refused, float64[n] value) of every row but starts, whose attributes are looked at one by one."""
        kind, numbers = self._kind, self._numbers
        id_lengths = self._ids.row_lengths()
        bad = (kind == _NO_KIND) | (id_lengths < 1) | (id_lengths > ID_BYTES) | (numbers["sequence"] == 0)
        bad |= (numbers["event_time_ms"] <= 0) | (numbers["event_time_ms"] >= MAX_TIME_MS)
        bad |= np.isin(kind, NEEDS_EPOCH) & (numbers["epoch"] == 0)
        bad |= (numbers["epoch"] > np.uint64(MAX_I63)) | (self._viewers.row_lengths() > ID_BYTES)
        value = np.zeros(self._n, np.float64)

        counted = np.isin(kind, [fence.VIEWER_COUNT, *INTERACTIONS])
        bad |= counted & (numbers["count"] > MAX_COUNT)
        value[counted] = numbers["count"][counted]
        value[np.isin(kind, list(INTERACTIONS)) & (value < 1.0)] = 1.0

        watched = kind == fence.WATCHED
        seconds = numbers["seconds"].astype(np.float64)
        bad |= watched & ~((seconds >= 0.0) & (seconds <= MAX_WATCH_SECONDS))  # also true for NaN
        value[watched] = seconds[watched]

        paid = np.isin(kind, [fence.BID, fence.PURCHASED])
        if paid.any():
            rates = self._texts["currency"].numbers(self._settings.currencies, np.nan)
            amount = numbers["amount_minor"]
            bad |= paid & ((amount < 0) | (amount > MAX_AMOUNT_MINOR) | np.isnan(rates))
            value[paid] = amount[paid] * rates[paid]

        reasoned = np.isin(kind, [fence.REPORTED, fence.END])
        bad |= reasoned & (self._texts["reason"].row_lengths() > ID_BYTES)
        value[kind == fence.REPORTED] = 1.0

        ended, since_ms = kind == fence.END, numbers["only_if_not_renewed_since_ms"]
        bad |= ended & ((since_ms < 0) | (since_ms >= MAX_TIME_MS))
        value[ended] = since_ms[ended]

        seen = kind == fence.IMPRESSION
        for name in ("request_id", "model_version"):
            bad |= seen & (self._texts[name].row_lengths() > ID_BYTES)
        bad |= seen & ~((numbers["propensity"] >= 0.0) & (numbers["propensity"] <= 1.0))  # also true for NaN
        for name in ("served_ms", "verify_by_ms"):
            bad |= seen & ((numbers[name] <= 0) | (numbers[name] >= MAX_TIME_MS))

        moderated = kind == fence.MODERATED
        actions = (fence.BLOCK, fence.UNBLOCK, fence.MARK_SPAM, fence.CLEAR_SPAM)
        bad |= moderated & ~np.isin(numbers["action"], actions)
        value[moderated] = numbers["action"][moderated]
        return bad, value

    def _message(self, row: int) -> Any:
        """The row as an Event message."""
        one = {name: self._batch.column(name)[row].as_py() for name in self._batch.schema.names if name not in LISTS}
        get = {name: value for name, value in one.items() if value is not None}.get
        event = pb.Event(
            sequence=get("sequence", 0), stream_id=get("stream_id", ""), epoch=get("epoch", 0),
            event_time_ms=get("event_time_ms", 0), viewer_id=get("viewer_id", ""),
        )  # fmt: skip
        case = next((name for name, number in KINDS.items() if number == self._kind[row]), None)
        if case is None:
            return event
        payload = getattr(event, case)
        payload.SetInParent()
        for name in _FIELDS[type(payload).__name__]:
            if name not in LISTS:
                setattr(payload, name, get(name, getattr(payload, name)))
            elif name in self._batch.schema.names:
                values = self._batch.column(name)[row].values
                payload_list = getattr(payload, name)
                payload_list.extend([] if values is None else _list_values(values))
        return event


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


# pyarrow's own way to fill nulls builds a scalar, and the first one imports pandas: read the buffers instead.


def _plain(column: Any, dtype: Any) -> NDArray[Any]:
    """A copy of a column of fixed width, n numbers; null is 0."""
    n = len(column)
    if n == 0:
        return np.zeros(0, dtype)
    values = np.frombuffer(column.buffers()[1], dtype, column.offset + n)[column.offset :].copy()
    values[_is_null(column)] = 0
    return values


def _is_null(column: Any) -> NDArray[np.bool_]:
    """bool[n] of any Arrow column."""
    n, validity = len(column), column.buffers()[0]
    if validity is None or column.null_count == 0:
        return np.zeros(n, np.bool_)
    bits = np.unpackbits(np.frombuffer(validity, np.uint8), count=column.offset + n, bitorder="little")
    return np.asarray(bits[column.offset :] == 0)


def _text_buffers(values: Any) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]:
    """(starts int64[m], lengths int64[m], bytes) of a utf8 array; a null has length 0."""
    m = len(values)
    if m == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint8)
    _, offsets, data = values.buffers()
    wide = np.int64 if pa.types.is_large_string(values.type) else np.int32
    bounds = np.frombuffer(offsets, wide, values.offset + m + 1)[values.offset :].astype(np.int64)
    lengths = np.diff(bounds)
    lengths[_is_null(values)] = 0
    return bounds[:-1], lengths, np.zeros(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)
