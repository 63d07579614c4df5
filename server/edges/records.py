"""What goes through the rings: checked requests one way, finished replies and refusals the other, as packed bytes."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

import server.errors
from server.batching.base import Priority
from server.errors import InvalidRequest, LiverankError, Overloaded
from server.retrieval.query import RankQuery

# number, kind, priority, flags, 0, arrived_s, deadline_s, min_offset, limit; then how long is what follows:
# floats of the embedding, client, request_id, viewer_id, what many requests have in common, problem, lists
_ASK = struct.Struct("<QBBBBddqiHHHHHHI")
_CLAMPED = 1
_PRIORITIES = tuple(Priority)
_REFUSED = struct.Struct("<i")
_ANSWER = np.dtype([("number", "<u8"), ("begun_s", "<f8"), ("kind", "u1"), ("seen", "u1")])
_ANSWER_HEAD = struct.Struct("<QdBB")
_KEPT_SHAPES = 4_096

Shape = tuple[str, tuple[str, ...], tuple[str, ...], str]
"""What many requests have in common: surface, languages, categories, region."""


class AskKind(IntEnum):
    """RANK: a viewer to be ranked. LEAVE: nobody waits for that number any more."""

    RANK = 0
    LEAVE = 1


class AnswerKind(IntEnum):
    """REPLY: a serialised RankResponse. REFUSED: an error of ours. GONE: its deadline passed while it waited.
    HEADLESS: a RankResponse without what concerns its request alone, see `server.ranking.replies.head_of`."""

    REPLY = 0
    REFUSED = 1
    GONE = 2
    HEADLESS = 3


_ANSWER_KINDS = tuple(AnswerKind)


class Ask(NamedTuple):
    """A request as it left the edge. number: the edge's own, for the answer. arrived_s: monotonic, the machine's.

    query: None for LEAVE.
    """

    number: int
    client: str
    priority: Priority
    arrived_s: float
    query: RankQuery | None


class Reply(NamedTuple):
    """An answer as it left the engine. begun_s: when its batch began, monotonic, the machine's.

    seen: of HEADLESS, see `head_of`. rest: the reply, or what `unpack_error` reads.
    """

    number: int
    begun_s: float
    kind: AnswerKind
    seen: bool
    rest: bytes


class Asks:
    """Packs and unpacks requests; remembers how what many of them have in common looks packed. One thread at a time
    packs, one unpacks."""

    def __init__(self) -> None:
        self._packed: dict[Shape, bytes] = {}
        self._shapes: dict[bytes, Shape] = {}

    def pack(self, number: int, client: str, priority: Priority, arrived_s: float, query: RankQuery) -> bytes:
        """A viewer to be ranked."""
        shape = (query.surface, query.languages, query.categories, query.region)
        packed = self._packed.get(shape)
        if packed is None:
            if len(self._packed) >= _KEPT_SHAPES:
                self._packed.clear()
            packed = self._packed[shape] = _pack_shape(shape)
        embedding = b"" if query.embedding is None else query.embedding.tobytes()
        lists = b""
        if query.followed_creator_ids or query.exclude_stream_ids:
            lists = _pack_texts(query.followed_creator_ids) + _pack_texts(query.exclude_stream_ids)
        of_client, request_id, viewer_id = client.encode(), query.request_id.encode(), query.viewer_id.encode()
        problem = query.embedding_problem.encode()
        head = _ASK.pack(
            number, AskKind.RANK, priority, _CLAMPED * query.limit_clamped, 0,
            arrived_s, query.deadline_s, query.min_offset, query.limit,
            len(embedding) >> 2, len(of_client), len(request_id), len(viewer_id), len(packed), len(problem), len(lists),
        )  # fmt: skip
        return b"".join((head, embedding, of_client, request_id, viewer_id, packed, problem, lists))

    def unpack(self, message: bytes) -> Ask:
        """The inverse of `pack` and `pack_leave`."""
        (
            number, kind, priority, flags, _, arrived_s, deadline_s, min_offset, limit,
            n_floats, n_client, n_request, n_viewer, n_shape, n_problem, n_lists,
        ) = _ASK.unpack_from(message)  # fmt: skip
        if kind == AskKind.LEAVE:
            return Ask(number, "", Priority.INTERACTIVE, 0.0, None)
        at = _ASK.size
        embedding = np.frombuffer(message, np.float32, n_floats, at) if n_floats else None
        client_at = at + 4 * n_floats
        request_at = client_at + n_client
        viewer_at = request_at + n_request
        shape_at = viewer_at + n_viewer
        problem_at = shape_at + n_shape
        packed = message[shape_at:problem_at]
        shape = self._shapes.get(packed)
        if shape is None:
            if len(self._shapes) >= _KEPT_SHAPES:
                self._shapes.clear()
            shape = self._shapes[packed] = _unpack_shape(packed)
        followed: tuple[str, ...] = ()
        excluded: tuple[str, ...] = ()
        if n_lists:
            reader = _Reader(message, problem_at + n_problem)
            followed, excluded = reader.texts(), reader.texts()
        surface, languages, categories, region = shape
        query = RankQuery(
            request_id=message[request_at:viewer_at].decode(),
            viewer_id=message[viewer_at:shape_at].decode(),
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
            embedding_problem=message[problem_at : problem_at + n_problem].decode() if n_problem else "",
        )
        return Ask(number, message[client_at:request_at].decode(), _PRIORITIES[priority], arrived_s, query)


def pack_leave(number: int) -> bytes:
    """Nobody waits for the answer to ``number``."""
    return _ASK.pack(number, AskKind.LEAVE, 0, 0, 0, 0.0, 0.0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


def reply_heads(numbers: list[int], begun_s: float, seen: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The beginnings of HEADLESS answers of one batch, uint8[n, H]; the rest of a reply follows behind each."""
    heads = np.zeros(len(numbers), _ANSWER)
    heads["number"], heads["begun_s"], heads["kind"], heads["seen"] = numbers, begun_s, AnswerKind.HEADLESS, seen
    return heads.view(np.uint8).reshape(len(numbers), _ANSWER.itemsize)


def pack_headless(number: int, begun_s: float, seen: bool, rest: tuple[bytes, memoryview]) -> bytes:
    """One HEADLESS answer."""
    return b"".join((_ANSWER_HEAD.pack(number, begun_s, AnswerKind.HEADLESS, seen), *rest))


def pack_reply(number: int, begun_s: float, reply: bytes) -> bytes:
    """``begun_s``: when its batch began, monotonic, the machine's."""
    return _ANSWER_HEAD.pack(number, begun_s, AnswerKind.REPLY, 0) + reply


def pack_gone(number: int) -> bytes:
    """It was not ranked: its deadline passed."""
    return _ANSWER_HEAD.pack(number, 0.0, AnswerKind.GONE, 0)


def pack_refused(number: int, error: BaseException) -> bytes:
    """An error of ours keeps its class and its words; any other becomes nameless, as it is in the engine's log."""
    name = type(error).__name__ if isinstance(error, LiverankError) else ""
    parts = [_ANSWER_HEAD.pack(number, 0.0, AnswerKind.REFUSED, 0), _REFUSED.pack(getattr(error, "retry_ms", 0))]
    for text in (name, getattr(error, "field", ""), str(error) if name else ""):
        _pack_text(parts, text)
    return b"".join(parts)


def unpack_answer(message: bytes) -> Reply:
    """The inverse of what packs answers."""
    number, begun_s, kind, seen = _ANSWER_HEAD.unpack_from(message)
    return Reply(number, begun_s, _ANSWER_KINDS[kind], seen != 0, message[_ANSWER_HEAD.size :])


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


def _pack_shape(shape: Shape) -> bytes:
    surface, languages, categories, region = shape
    return _pack_texts((surface, region)) + _pack_texts(languages) + _pack_texts(categories)


def _unpack_shape(packed: bytes) -> Shape:
    reader = _Reader(packed, 0)
    surface, region = reader.texts()
    return surface, reader.texts(), reader.texts(), region


def _pack_texts(texts: tuple[str, ...]) -> bytes:
    parts = [struct.pack("<H", len(texts))]
    for text in texts:
        _pack_text(parts, text)
    return b"".join(parts)


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
