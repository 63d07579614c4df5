"""What goes through the rings: checked requests one way, finished replies and refusals the other, as packed bytes."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

import server.errors
from server.batching.base import Priority
from server.errors import InvalidRequest, LiverankError, Overloaded
from server.retrieval.query import RankQuery

_ASK = struct.Struct("<QBBBBddqi")
_ANSWER = struct.Struct("<QdB")
_REFUSED = struct.Struct("<i")
_CLAMPED, _HAS_EMBEDDING = 1, 2


class AskKind(IntEnum):
    """RANK: a viewer to be ranked. LEAVE: nobody waits for that number any more."""

    RANK = 0
    LEAVE = 1


class AnswerKind(IntEnum):
    """REPLY: a serialised RankResponse. REFUSED: an error of ours. GONE: its deadline passed while it waited."""

    REPLY = 0
    REFUSED = 1
    GONE = 2


@dataclass(frozen=True)
class Ask:
    """A request as it left the edge. number: the edge's own, for the answer. arrived_s: monotonic, the machine's.

    query: None for LEAVE.
    """

    number: int
    client: str
    priority: Priority
    arrived_s: float
    query: RankQuery | None


def pack_ask(number: int, client: str, priority: Priority, arrived_s: float, query: RankQuery) -> bytes:
    """A viewer to be ranked."""
    flags = _CLAMPED * query.limit_clamped | _HAS_EMBEDDING * (query.embedding is not None)
    parts = [
        _ASK.pack(number, AskKind.RANK, priority, flags, 0, arrived_s, query.deadline_s, query.min_offset, query.limit)
    ]
    if query.embedding is not None:
        parts.append(struct.pack("<H", len(query.embedding)))
        parts.append(query.embedding.tobytes())
    for text in (client, query.request_id, query.viewer_id, query.surface, query.region, query.embedding_problem):
        _pack_text(parts, text)
    for texts in (query.languages, query.categories, query.followed_creator_ids, query.exclude_stream_ids):
        parts.append(struct.pack("<H", len(texts)))
        for text in texts:
            _pack_text(parts, text)
    return b"".join(parts)


def pack_leave(number: int) -> bytes:
    """Nobody waits for the answer to ``number``."""
    return _ASK.pack(number, AskKind.LEAVE, 0, 0, 0, 0.0, 0.0, 0, 0)


def unpack_ask(message: bytes) -> Ask:
    """The inverse of `pack_ask` and `pack_leave`."""
    number, kind, priority, flags, _, arrived_s, deadline_s, min_offset, limit = _ASK.unpack_from(message)
    if kind == AskKind.LEAVE:
        return Ask(number, "", Priority.INTERACTIVE, 0.0, None)
    reader = _Reader(message, _ASK.size)
    embedding = reader.floats() if flags & _HAS_EMBEDDING else None
    client, request_id, viewer_id, surface, region, problem = (reader.text() for _ in range(6))
    languages, categories, followed, excluded = (reader.texts() for _ in range(4))
    query = RankQuery(
        request_id=request_id,
        viewer_id=viewer_id,
        embedding=embedding,
        surface=surface,
        limit=limit,
        limit_clamped=bool(flags & _CLAMPED),
        languages=languages,
        categories=categories,
        region=region,
        followed_creator_ids=followed,
        exclude_stream_ids=excluded,
        min_offset=min_offset,
        deadline_s=deadline_s,
        received_s=arrived_s,
        embedding_problem=problem,
    )
    return Ask(number, client, Priority(priority), arrived_s, query)


def pack_reply(number: int, begun_s: float, reply: bytes) -> bytes:
    """``begun_s``: when its batch began, monotonic, the machine's."""
    return _ANSWER.pack(number, begun_s, AnswerKind.REPLY) + reply


def pack_gone(number: int) -> bytes:
    """It was not ranked: its deadline passed."""
    return _ANSWER.pack(number, 0.0, AnswerKind.GONE)


def pack_refused(number: int, error: BaseException) -> bytes:
    """An error of ours keeps its class and its words; any other becomes nameless, as it is in the engine's log."""
    name = type(error).__name__ if isinstance(error, LiverankError) else ""
    parts = [_ANSWER.pack(number, 0.0, AnswerKind.REFUSED), _REFUSED.pack(getattr(error, "retry_ms", 0))]
    for text in (name, getattr(error, "field", ""), str(error) if name else ""):
        _pack_text(parts, text)
    return b"".join(parts)


def unpack_answer(message: bytes) -> tuple[int, float, AnswerKind, bytes]:
    """Number, when its batch began, kind, and the rest: the reply, or what `unpack_error` reads."""
    number, begun_s, kind = _ANSWER.unpack_from(message)
    return number, begun_s, AnswerKind(kind), message[_ANSWER.size :]


def unpack_error(rest: bytes) -> Exception:
    """The error that `pack_refused` packed."""
    (retry_ms,) = _REFUSED.unpack_from(rest)
    reader = _Reader(rest, _REFUSED.size)
    name, field, text = reader.text(), reader.text(), reader.text()
    kind = getattr(server.errors, name, None) if name else None
    if kind is None:
        return RuntimeError("internal fault in the engine; see its log")
    if issubclass(kind, InvalidRequest):
        return kind(field, text.removeprefix(f"{field}: "))
    if issubclass(kind, Overloaded):
        return kind(text, retry_ms)
    error: Exception = kind(text)
    return error


def _pack_text(parts: list[bytes], text: str) -> None:
    encoded = text.encode()
    parts.append(struct.pack("<H", len(encoded)))
    parts.append(encoded)


class _Reader:
    def __init__(self, message: bytes, at: int) -> None:
        self._message, self._at = message, at

    def _length(self) -> int:
        at = self._at
        self._at += 2
        return self._message[at] | self._message[at + 1] << 8

    def text(self) -> str:
        length = self._length()
        if not length:
            return ""
        at = self._at
        self._at += length
        return self._message[at : at + length].decode()

    def texts(self) -> tuple[str, ...]:
        count = self._length()
        return tuple(self.text() for _ in range(count)) if count else ()

    def floats(self) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        count = self._length()
        at = self._at
        self._at += 4 * count
        return np.frombuffer(self._message, np.float32, count, at)
