"""Ranked batches onto the wire: streams as one run of records per batch, the rest once per batch or reply."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import numpy as np
from liverank.v1 import ranking_pb2 as pb
from numpy.typing import NDArray

from kernels.wire import encode_streams, uint_fields
from server.live.table import LiveTable
from server.ranking.replies import Replies
from server.ranking.slates import ReplyState, SlateBatch
from server.retrieval.sources import SOURCES

SOURCE_NAMES = tuple(source.name for source in SOURCES)


def encode_replies(slates: SlateBatch, state: ReplyState, table: LiveTable, started_s: float) -> Replies:
    """One serialised RankResponse per request of the batch. Called on the engine thread.

    What all of the batch share is written once, the `streams` entries by the kernel. Of Timings the part that all
    share is in there too: parts of a message merge like messages. ``started_s``: when the batch
    began, monotonic.
    """
    common = _told(int(state.level), state.reasons, state.quality, state.model_version)
    for number, value in ((3, slates.as_of_ms), (6, state.applied_offset), (10, state.score_age_ms)):
        common += uint_fields((value,), first=number)
    times = slates.times
    timings = uint_fields(
        (
            times.retrieve_us, times.blend_us, times.select_us, times.verify_us, len(slates.batch), times.score_us,
        ), first=2,
    )  # fmt: skip
    common += b"\x3a%c%b" % (len(timings), timings)
    streams, offsets = _encode_on_host(slates, table) if slates.wire is None else _joined(slates.wire)
    return Replies(slates.batch.requests, slates.batch.seen, started_s, common, streams, offsets)


@lru_cache(maxsize=256)
def _told(level: int, reasons: tuple[str, ...], quality: float, model_version: str) -> bytes:
    """What replies say of themselves from one batch to the next, by protobuf; the same for seconds on end."""
    degradation = pb.Degradation(level=level, reasons=reasons)  # type: ignore[arg-type]
    if quality < 1.0:
        degradation.quality = quality
        degradation.reasons.append(f"overload: {quality:.0%} of the candidates were scored")
    return pb.RankResponse(
        model_version=model_version, degradation=degradation, source_names=SOURCE_NAMES
    ).SerializeToString()


def _encode_on_host(slates: SlateBatch, table: LiveTable) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    columns = table.columns
    return encode_streams(
        slates.slots, slates.counts, slates.scores, columns.epoch, columns.lease_expires_ms,
        slates.sources, slates.exploration, columns.ids, columns.id_lengths,
    )  # fmt: skip


def _joined(wire: list[bytes]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    offsets = np.array(list(accumulate(map(len, wire), initial=0)), np.int64)
    return np.frombuffer(b"".join(wire), np.uint8), offsets
