"""What callers ask for, decided before the run, and what is checked in every reply."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import grpc
import numpy as np
from liverank.v1 import liveness_pb2, ranking_pb2
from numpy.typing import NDArray

from loadtest.load.fleet import LANGUAGES, Fleet, zipf_draws
from loadtest.load.scenario import Scenario

KINDS = ("Rank", "RankBatch", "CheckLive")
RANK, RANK_BATCH, CHECK_LIVE = range(len(KINDS))
CALL_TIMEOUT_S = 5.0
CHECKED_STREAMS = 20
_REQUESTS_TAG = b"\x0a"  # field 1, length-delimited: RankBatchRequest.requests


class Callers:
    """Calls by number. Requests are bytes made beforehand; replies are looked at after their time was taken.

    Attributes:
        kind: uint8[n] of KINDS, per call.
        shown_after_end: streams in a reply although their end was acknowledged before the request was sent.
        levels, models: degradation levels and model versions of the Rank replies, counted.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        scenario: Scenario,
        due_s: NDArray[np.float64],
        fleet: Fleet,
        ended_at: Mapping[str, float],
        rng: np.random.Generator,
    ) -> None:
        self._rank = channel.unary_unary("/liverank.v1.Ranking/Rank")  # bytes in, bytes out
        self._rank_batch = channel.unary_unary("/liverank.v1.Ranking/RankBatch")
        self._check_live = channel.unary_unary("/liverank.v1.Liveness/CheckLive")
        self._fleet, self._ended_at = fleet, ended_at
        self._viewers = _viewers(scenario, rng)
        n = len(due_s)
        self._viewer = zipf_draws(len(self._viewers), scenario.viewers.zipf, n, rng)
        ends_s = np.cumsum([phase.duration_s for phase in scenario.phase])
        self._phases = scenario.phase
        self._phase = np.searchsorted(ends_s, due_s, side="right").clip(max=len(scenario.phase) - 1)
        u = rng.random(n)
        batch = np.array([p.rank_batch_share for p in scenario.phase])[self._phase]
        check = np.array([p.check_live_share for p in scenario.phase])[self._phase]
        self.kind = np.select([u < batch, u < batch + check], [RANK_BATCH, CHECK_LIVE], RANK).astype(np.uint8)
        self._region = self._regions(rng)
        self._draw = rng.integers(0, 2**31, n)
        self.shown_after_end: list[str] = []
        self.levels: Counter[str] = Counter()
        self.models: Counter[str] = Counter()

    def call(self, number: int) -> tuple[float, bytes]:
        """Makes call ``number``: (when it was sent, its reply). Raises grpc.RpcError."""
        kind = self.kind[number]
        if kind == RANK:
            request, method = self._rank_request(number, self._viewer[number]), self._rank
        elif kind == RANK_BATCH:
            request, method = self._batch_request(number), self._rank_batch
        else:
            request, method = self._check_request(number), self._check_live
        sent_s = time.monotonic()
        return sent_s, method(request, timeout=CALL_TIMEOUT_S)

    def look(self, number: int, answer: Any) -> None:
        """Checks the reply of call ``number``; after its latency was taken, so this costs the figures nothing."""
        sent_s, payload = answer
        if self.kind[number] != RANK:
            return
        reply = ranking_pb2.RankResponse.FromString(payload)
        ended_at, never = self._ended_at, float("inf")
        for stream in reply.streams:
            if ended_at.get(stream.stream_id, never) < sent_s:
                self.shown_after_end.append(stream.stream_id)
        self.levels[ranking_pb2.Degradation.Level.Name(reply.degradation.level)] += 1
        self.models[reply.model_version] += 1

    def _rank_request(self, number: int, viewer: int) -> bytes:
        return self._viewers[viewer] + self._region[number]

    def _batch_request(self, number: int) -> bytes:
        wanted = self._phases[self._phase[number]].batch_viewers
        first, parts = int(self._viewer[number]), []
        for viewer in range(first, first + wanted):
            one = self._rank_request(number, viewer % len(self._viewers))
            parts.append(_REQUESTS_TAG + _varint(len(one)) + one)
        return b"".join(parts)

    def _check_request(self, number: int) -> bytes:
        count = max(1, self._fleet.started)
        first = int(self._draw[number]) % count
        refs = [
            liveness_pb2.StreamRef(stream_id=self._fleet.stream_id((first + i) % count)) for i in range(CHECKED_STREAMS)
        ]
        request: bytes = liveness_pb2.CheckLiveRequest(streams=refs).SerializeToString()
        return request

    def _regions(self, rng: np.random.Generator) -> list[bytes]:
        """Per call, the region as the bytes of that field: messages can be joined."""
        per_call = [b""] * len(self._phase)
        for place, phase in enumerate(self._phases):
            names, weights = list(phase.regions), np.array(list(phase.regions.values()))
            fields = [ranking_pb2.RankRequest(region=name).SerializeToString() for name in names]
            calls = np.flatnonzero(self._phase == place)
            for call, drawn in zip(calls, rng.choice(len(names), len(calls), p=weights / weights.sum()), strict=True):
                per_call[call] = fields[drawn]
        return per_call


def _varint(number: int) -> bytes:
    """A length as protobuf writes it."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def _viewers(scenario: Scenario, rng: np.random.Generator) -> list[bytes]:
    """A serialised RankRequest per viewer, without a region."""
    who, dim = scenario.viewers, scenario.fleet.embedding_dim
    filtered = rng.random(who.count) < who.filtered_share
    return [
        ranking_pb2.RankRequest(
            viewer_id=f"viewer-{i}",
            viewer_embedding=rng.standard_normal(dim).tolist() if dim else [],
            limit=who.limit,
            languages=[LANGUAGES[i % len(LANGUAGES)]] if filtered[i] else [],
        ).SerializeToString()
        for i in range(who.count)
    ]
