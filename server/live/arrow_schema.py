"""Arrow event batches on the wire: which columns there are, and what a batch must be before anything trusts it."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import pyarrow as pa

from kernels.event_arrow import ABSENT, CODES, FIXED, TEXT32, TEXT64
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


class Column(NamedTuple):
    """How a column is stored: forms of `kernels.event_arrow`, 0 for lists. width: bytes of a number or code."""

    name: str
    form: int
    width: int
    dict_form: int


def read_batch(payload: Any, max_rows: int) -> Any:
    """The one record batch of an IPC stream (any buffer), its schema and every buffer checked: fit for any use.

    Raises:
        InvalidRequest: see `decode_arrow`.
    """
    return read_laid_out(payload, max_rows)[0]


def read_laid_out(payload: Any, max_rows: int) -> tuple[Any, tuple[Column, ...]]:
    """`read_batch`, and how its columns are stored."""
    buffer = pa.py_buffer(payload)
    try:
        described = _walk(memoryview(buffer))
        is_usual = described is not None
        if described is None:
            described = _refuse_compression(buffer)
        layout = _layouts.get(described)
        with pa.ipc.open_stream(buffer) as stream:
            if layout is None:
                layout = _lay_out(stream.schema)
                _remember(described, layout)
            batch = stream.read_next_batch()
            if batch.num_rows > max_rows:
                raise InvalidRequest("arrow", f"at most {max_rows} rows per batch allowed, got {batch.num_rows}")
            if not is_usual and next(iter(stream), None) is not None:
                raise InvalidRequest("arrow", "one record batch wanted, got more")
        batch.validate(full=True)  # offsets in range, text is UTF-8: nothing after this trusts the sender
    except (pa.ArrowException, OSError, StopIteration, ValueError) as error:  # ValueError: a name is not UTF-8
        told = str(error).partition("\n")[0] or "it holds no record batch"
        raise InvalidRequest("arrow", f"not an Arrow IPC stream with one record batch: {told}") from error
    for number, (name, form, _, _) in enumerate(layout):
        if form == CODES and (size := len(batch.column(number).dictionary)) > max_rows:
            raise InvalidRequest(f"arrow.{name}", f"at most {max_rows} dictionary values allowed, got {size}")
    return batch, layout


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


_layouts: dict[bytes, tuple[Column, ...]] = {}
"""Of schemas that were seen and are fine, by their message: a producer sends the same one with every batch."""
_MAX_LAYOUTS, _MAX_REMEMBERED_BYTES = 256, 4_096


def _remember(described: bytes, layout: tuple[Column, ...]) -> None:
    if len(described) <= _MAX_REMEMBERED_BYTES:
        if len(_layouts) >= _MAX_LAYOUTS:
            _layouts.clear()
        _layouts[described] = layout


def _lay_out(schema: Any) -> tuple[Column, ...]:
    """How the columns of a schema are stored. Raises InvalidRequest when it is not one of ours."""
    _check_schema(schema)
    found = []
    for field in schema:
        kind = field.type
        if field.name in LISTS:
            found.append(Column(field.name, ABSENT, 0, ABSENT))
        elif pa.types.is_dictionary(kind):
            found.append(Column(field.name, CODES, kind.index_type.bit_width // 8, _text_form(kind.value_type)))
        elif pa.types.is_primitive(kind):
            found.append(Column(field.name, FIXED, kind.bit_width // 8, ABSENT))
        else:
            found.append(Column(field.name, _text_form(kind), 0, ABSENT))
    return tuple(found)


def _text_form(kind: Any) -> int:
    return TEXT64 if pa.types.is_large_string(kind) else TEXT32


def _wanted(name: str) -> str:
    if name in NUMBERS:
        return str(NUMBERS[name])
    if name in LISTS:
        return f"a list of {LISTS[name]}"
    return "utf8, a dictionary of utf8" + (" or int8" if name == "kind" else "")


# --- compression ----------------------------------------------------------------------------------

_SCHEMA, _DICTIONARY_BATCH, _RECORD_BATCH = 1, 2, 3
_FRAME = struct.Struct("<Ii")
"""In front of each message: a mark, and the bytes of its metadata; 0: the end."""
_MARK = 0xFFFFFFFF


def _walk(stream: memoryview) -> bytes | None:
    """The message of the schema, when the stream is as producers send it: a schema, dictionaries, one record batch, and
    nothing more; None when the library must look at it. In one go, because every call of the library's reader lets go
    of the interpreter's lock, and has to wait for it again when the server is busy.

    Raises:
        InvalidRequest: see `_refuse_compression`.
    """
    at, first, kind = 0, b"", 0
    wanted: tuple[int, ...] = (_SCHEMA,)
    while at + _FRAME.size <= len(stream):
        mark, size = _FRAME.unpack_from(stream, at)
        body_at = at + _FRAME.size + size
        if mark != _MARK or size < 0 or body_at > len(stream):
            return None
        if size == 0:
            return first if kind == _RECORD_BATCH else None
        metadata = bytes(stream[body_at - size : body_at])
        kind, body_bytes = _refuse_compressed(metadata)
        if kind not in wanted or body_bytes < 0:
            return None
        at = body_at + body_bytes
        first = first or metadata
        wanted = () if kind == _RECORD_BATCH else (_DICTIONARY_BATCH, _RECORD_BATCH)
    return first if kind == _RECORD_BATCH and at == len(stream) else None


def _refuse_compression(buffer: Any) -> bytes:
    """Raises InvalidRequest when a body is compressed: a small message could then take any amount of memory. Returns
    the first message, that of the schema."""
    first = b""
    for message in pa.ipc.MessageReader.open_stream(buffer):
        metadata = message.metadata.to_pybytes()
        first = first or metadata
        _refuse_compressed(metadata)
    return first


def _refuse_compressed(metadata: bytes) -> tuple[int, int]:
    """Kind of a message, and bytes of its body; raises InvalidRequest when that is compressed.

    Reads four fields of the flatbuffers in front of the bodies (Message.fbs of the Arrow format, version 5), because
    the library offers no such option.
    """
    try:
        root = struct.unpack_from("<I", metadata, 0)[0]
        kind_at, body_at = _field(metadata, root, 1), _field(metadata, root, 3)
        kind = metadata[kind_at] if kind_at else 0
        body_bytes: int = struct.unpack_from("<q", metadata, body_at)[0] if body_at else 0
        if kind not in (_DICTIONARY_BATCH, _RECORD_BATCH):
            return kind, body_bytes
        header = _follow(metadata, _field(metadata, root, 2))
        if kind == _DICTIONARY_BATCH:
            header = _follow(metadata, _field(metadata, header, 1))
        if _field(metadata, header, 3):
            raise InvalidRequest("arrow", "compressed bodies are not taken; send them uncompressed")
    except (struct.error, IndexError) as error:
        raise InvalidRequest("arrow", "its metadata cannot be read") from error
    return kind, body_bytes


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
