"""Encoded replies of a batch as columns, so that they are copied once: to the wire, or into an edge's ring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np
from liverank.v1 import ranking_pb2 as pb
from numpy.typing import NDArray

from kernels.wire import reply_head, text_fields, uint_fields
from server.retrieval.query import RankQuery

_CLAMPED, _SEEN = text_fields(9, ("limit_clamped",)), text_fields(9, ("seen_excluded",))


@dataclass(frozen=True, eq=False)
class Replies(Sequence[bytes]):
    """B serialised RankResponses. Concatenated protobuf messages merge, so reply b is what concerns its request alone
    (`head_of`), then ``common``, then its streams.

    seen: int32[B], see `QueryBatch`. began_s: when the batch began, monotonic.
    streams uint8[S] with int64[B + 1] ``offsets``: reply b has streams[offsets[b]:offsets[b + 1]].
    """

    queries: Sequence[RankQuery]
    seen: NDArray[np.int32]
    began_s: float
    common: bytes
    streams: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.queries)

    @overload
    def __getitem__(self, place: int) -> bytes: ...

    @overload
    def __getitem__(self, place: slice) -> list[bytes]: ...

    def __getitem__(self, place: int | slice) -> bytes | list[bytes]:
        if isinstance(place, slice):
            return [self[b] for b in range(*place.indices(len(self)))]
        return b"".join(self.parts(range(len(self))[place]))

    def rest(self, b: int) -> tuple[bytes, memoryview]:
        """Reply b without its head."""
        streams, bounds, _ = self._for_one
        return self.common, streams[bounds[b] : bounds[b + 1]]

    def parts(self, b: int) -> tuple[bytes, bytes, memoryview]:
        """What reply b is made of, to be joined."""
        streams, bounds, seen = self._for_one
        return head_of(self.queries[b], self.began_s, bool(seen[b])), self.common, streams[bounds[b] : bounds[b + 1]]

    @cached_property
    def _for_one(self) -> tuple[memoryview, list[int], list[int]]:
        return memoryview(self.streams), self.offsets.tolist(), self.seen.tolist()  # type: ignore[arg-type]


def head_of(query: RankQuery, began_s: float, seen: bool) -> bytes:
    """What a reply says about its own request. seen: streams were left out because of what the viewer did."""
    queue_us = max(0, int((began_s - query.received_s) * 1e6))
    notices = (_CLAMPED if query.limit_clamped else b"") + (_SEEN if seen else b"")
    head = reply_head(query.request_id.encode(), uint_fields((queue_us,)), notices)
    return head + _missing_embedding(query.embedding_problem) if query.embedding_problem else head


def _missing_embedding(problem: str) -> bytes:
    """The reason, before those of the whole batch."""
    reason = f"viewer_embedding: {problem}"
    return pb.RankResponse(degradation=pb.Degradation(reasons=[reason])).SerializeToString()
