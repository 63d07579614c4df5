"""Ranked batches onto the wire: streams as one run of records per batch, the rest once per reply."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from liverank.v1 import ranking_pb2 as pb

from kernels.wire import encode_streams
from server.live.table import LiveTable
from server.ranking.slates import ReplyState, SlateBatch
from server.retrieval.sources import SOURCES

SOURCE_NAMES = tuple(source.name for source in SOURCES)


def encode_replies(slates: SlateBatch, state: ReplyState, table: LiveTable, started_s: float) -> list[bytes]:
    """One serialised RankResponse per request of the batch. Called on the engine thread.

    Concatenated protobuf messages merge, so a reply is the small header, written by protobuf, followed by
    the `streams` entries, written by the kernel. ``started_s``: when the batch began, monotonic.
    """
    streams = slates.wire if slates.wire is not None else _encode_on_host(slates, table)
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
    times, replies = slates.times, []
    for b, request in enumerate(slates.batch.requests):
        own = pb.RankResponse(
            request_id=request.request_id,
            timings=pb.Timings(
                queue_us=max(0, int((started_s - request.received_s) * 1e6)),
                retrieve_us=times.retrieve_us,
                blend_us=times.blend_us,
                select_us=times.select_us,
                verify_us=times.verify_us,
                batch_rows=len(slates.batch),
            ),
            notices=[
                *(("limit_clamped",) if request.limit_clamped else ()),
                *(("seen_excluded",) if slates.batch.seen[b] else ()),
            ],
        ).SerializeToString()
        replies.append(own + common + streams[b])
    return replies


def _encode_on_host(slates: SlateBatch, table: LiveTable) -> list[bytes]:
    columns = table.columns
    buffer, offsets = encode_streams(
        slates.slots, slates.counts, slates.scores, columns.epoch, columns.lease_expires_ms,
        slates.sources, slates.exploration, columns.ids, columns.id_lengths,
    )  # fmt: skip
    streams = np.ascontiguousarray(buffer).tobytes()
    return [streams[i:j] for i, j in pairwise(offsets)]
