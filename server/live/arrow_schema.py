"""Arrow event batches on the wire: which columns there are, and what a batch must be before anything trusts it."""

from __future__ import annotations

import struct
from typing import Any

import pyarrow as pa

from server.errors import InvalidRequest

NUMBERS: dict[str, Any] = {
    "sequence": pa.uint64(), "event_time_ms": pa.int64(), "epoch": pa.uint64(), "media_sequence": pa.uint64(),
    "count": pa.uint32(), "seconds": pa.float32(), "amount_minor": pa.int64(), "action": pa.int32(),
    "age_rating": pa.uint32(), "only_if_not_renewed_since_ms": pa.int64(), "served_ms": pa.int64(),
    "verify_by_ms": pa.int64(), "position": pa.uint32(), "propensity": pa.float32(), "applied_offset": pa.uint64(),
}  # fmt: skip
TEXTS = ("stream_id", "viewer_id", "currency", "reason", "creator_id", "title", "language", "category", "region",
         "request_id", "model_version")  # fmt: skip
LISTS: dict[str, Any] = {"embedding": pa.float32(), "tags": pa.utf8()}
REQUIRED = ("sequence", "stream_id", "event_time_ms", "kind")
COLUMNS = (*NUMBERS, *TEXTS, "kind", *LISTS)


def read_batch(payload: bytes, max_rows: int) -> Any:
    """The one record batch of an IPC stream, its schema and every buffer checked: fit for any use.

    Raises:
        InvalidRequest: see `decode_arrow`.
    """
    buffer = pa.py_buffer(payload)
    try:
        _refuse_compression(buffer)
        with pa.ipc.open_stream(buffer) as stream:
            _check_schema(stream.schema)
            batch = stream.read_next_batch()
            if batch.num_rows > max_rows:
                raise InvalidRequest("arrow", f"at most {max_rows} rows per batch allowed, got {batch.num_rows}")
            if next(iter(stream), None) is not None:
                raise InvalidRequest("arrow", "one record batch wanted, got more")
        batch.validate(full=True)  # offsets in range, text is UTF-8: nothing after this trusts the sender
    except (pa.ArrowException, OSError, StopIteration, ValueError) as error:  # ValueError: a name is not UTF-8
        told = str(error).partition("\n")[0] or "it holds no record batch"
        raise InvalidRequest("arrow", f"not an Arrow IPC stream with one record batch: {told}") from error
    for name in batch.schema.names:
        column = batch.column(name)
        if pa.types.is_dictionary(column.type) and len(column.dictionary) > max_rows:
            raise InvalidRequest(
                f"arrow.{name}", f"at most {max_rows} dictionary values allowed, got {len(column.dictionary)}"
            )
    return batch


def _check_schema(schema: Any) -> None:
    names = schema.names
    for name in REQUIRED:
        if name not in names:
            raise InvalidRequest(f"arrow.{name}", "this column is needed, and missing")
    for name in names:
        if names.count(name) > 1:
            raise InvalidRequest(f"arrow.{name}", "this column is there more than once")
        if name not in COLUMNS:
            raise InvalidRequest(f"arrow.{name}", f"unknown column; there are {', '.join(COLUMNS)}")
        found = schema.field(name).type
        if not _fits(name, found):
            raise InvalidRequest(f"arrow.{name}", f"{_wanted(name)} wanted, got {found}")


def _fits(name: str, found: Any) -> bool:
    if name in NUMBERS:
        return bool(found == NUMBERS[name])
    if name in LISTS:
        is_list = pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found)
        return is_list and found.value_type == LISTS[name]
    if name == "kind" and pa.types.is_int8(found):
        return True
    text = found.value_type if pa.types.is_dictionary(found) else found
    return bool(pa.types.is_string(text) or pa.types.is_large_string(text))


def _wanted(name: str) -> str:
    if name in NUMBERS:
        return str(NUMBERS[name])
    if name in LISTS:
        return f"a list of {LISTS[name]}"
    return "utf8, a dictionary of utf8" + (" or int8" if name == "kind" else "")


# --- compression ----------------------------------------------------------------------------------

_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3


def _refuse_compression(buffer: Any) -> None:
    """Raises InvalidRequest when a body is compressed: a small message could then take any amount of memory.

    Reads three fields of the flatbuffers in front of the bodies (Message.fbs of the Arrow format, version 5),
    because the library offers no such option.
    """
    for message in pa.ipc.MessageReader.open_stream(buffer):
        metadata = message.metadata.to_pybytes()
        try:
            root = struct.unpack_from("<I", metadata, 0)[0]
            kind_at = _field(metadata, root, 1)
            kind = metadata[kind_at] if kind_at else 0
            if kind not in (_DICTIONARY_BATCH, _RECORD_BATCH):
                continue
            header = _follow(metadata, _field(metadata, root, 2))
            if kind == _DICTIONARY_BATCH:
                header = _follow(metadata, _field(metadata, header, 1))
            if _field(metadata, header, 3):
                raise InvalidRequest("arrow", "compressed bodies are not taken; send them uncompressed")
        except (struct.error, IndexError) as error:
            raise InvalidRequest("arrow", "its metadata cannot be read") from error


def _field(metadata: bytes, table: int, number: int) -> int:
    """Where field ``number`` of the flatbuffers table lies; 0: it is not set."""
    vtable = table - struct.unpack_from("<i", metadata, table)[0]
    size = struct.unpack_from("<H", metadata, vtable)[0]
    slot = 4 + 2 * number
    if slot + 2 > size:
        return 0
    offset: int = struct.unpack_from("<H", metadata, vtable + slot)[0]
    return table + offset if offset else 0


def _follow(metadata: bytes, at: int) -> int:
    """The table that the reference at ``at`` points to. Raises struct.error where there is none."""
    if at == 0:
        raise struct.error("not set")
    target: int = at + struct.unpack_from("<I", metadata, at)[0]
    return target
