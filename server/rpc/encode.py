"""Ranked batches onto the wire: streams as one run of records per batch, the rest once per reply."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from liverank.v1 import ranking_pb2 as pb

from kernels.wire import encode_streams, reply_head, text_fields, uint_fields
from server.live.table import LiveTable
from server.ranking.slates import ReplyState, SlateBatch
from server.retrieval.sources import SOURCES

SOURCE_NAMES = tuple(source.name for source in SOURCES)
_CLAMPED, _SEEN = text_fields(9, ("limit_clamped",)), text_fields(9, ("seen_excluded",))


def encode_replies(slates: SlateBatch, state: ReplyState, table: LiveTable, started_s: float) -> list[bytes]:
    """One serialised RankResponse per request of the batch. Called on the engine thread.

    Concatenated protobuf messages merge, so a reply is what concerns its request, then what all of the batch share,
    written by protobuf once, then the `streams` entries, written by the kernel. ``started_s``: when the batch
    began, monotonic.
    """
    streams: Sequence[bytes | memoryview] = slates.wire if slates.wire is not None else _encode_on_host(slates, table)
    degradation = pb.Degradation(level=int(state.level), reasons=state.reasons)  # type: ignore[arg-type]
    if state.quality < 1.0:
        degradation.quality = state.quality
        degradation.reasons.append(f"overload: {state.quality:.0%} of the candidates were scored")
    common = pb.RankResponse(
        as_of_ms=slates.as_of_ms,
        model_version=state.model_version,
        degradation=degradation,
        applied_offset=state.applied_offset,
        source_names=SOURCE_NAMES,
        score_age_ms=state.score_age_ms,
    ).SerializeToString()
    times, seen = slates.times, slates.batch.seen
    of_batch = uint_fields(
        (
            times.retrieve_us, times.blend_us, times.select_us, times.verify_us, len(slates.batch), times.score_us,
        ), first=2,
    )  # fmt: skip
    heads: dict[float, bytes] = {}  # requests that came in one call have been waiting equally long
    replies = []
    for b, (request, mine) in enumerate(zip(slates.batch.requests, streams, strict=True)):
        timings = heads.get(request.received_s)
        if timings is None:
            queue_us = max(0, int((started_s - request.received_s) * 1e6))
            timings = heads[request.received_s] = uint_fields((queue_us,)) + of_batch
        notices = (_CLAMPED if request.limit_clamped else b"") + (_SEEN if seen[b] else b"")
        head = reply_head(request.request_id.encode(), timings, notices)
        if request.embedding_problem:
            head += _missing_embedding(request.embedding_problem)
        replies.append(b"".join((head, common, mine)))
    return replies


def _encode_on_host(slates: SlateBatch, table: LiveTable) -> Sequence[bytes | memoryview]:
    columns = table.columns
    buffer, offsets = encode_streams(
        slates.slots, slates.counts, slates.scores, columns.epoch, columns.lease_expires_ms,
        slates.sources, slates.exploration, columns.ids, columns.id_lengths,
    )  # fmt: skip
    streams = memoryview(buffer)  # type: ignore[arg-type]
    return [streams[i:j] for i, j in pairwise(offsets.tolist())]


def _missing_embedding(problem: str) -> bytes:
    """The reason, before those of the whole batch."""
    reason = f"viewer_embedding: {problem}"
    return pb.RankResponse(degradation=pb.Degradation(reasons=[reason])).SerializeToString()
