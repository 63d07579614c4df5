"""A second model's scores beside those in use, and who is ranked by them.

A stream-level candidate scores the whole table into a column of its own (`StreamState.candidate_trend`). A viewer in
the canary's share is ranked by that column and by nothing of the other one; a batch is split before it is ranked, so
that each part, and each reply, has one version.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kernels.idmap import hash_ids, pack_ids
from server.live.impressions import Cause
from server.ranking.pipeline import Pipeline
from server.ranking.slates import ReplyState
from server.retrieval.query import RankQuery
from server.retrieval.streams import StreamState
from server.retrieval.view import Snapshot
from server.scoring.ladder import Level
from server.scoring.refresh import RefreshResult


@dataclass
class Seen:
    """What clients reported of one part of the viewers: impressions, of ended streams, and those of our making."""

    impressions: int = 0
    dead: int = 0
    ours: int = 0


def viewer_places(viewer_hashes: NDArray[np.uint64], salt: np.uint64) -> NDArray[np.float64]:
    """Where viewers stand in [0, 1) for one candidate: float64[n] of hashes uint64[n]; 1.0 for the hash 0, nobody.

    The same viewer has the same place for as long as the candidate is tried, so one who is in 1 % stays in 10 %;
    another candidate (``salt``) draws anew. The mix is the finaliser of SplitMix64 (Steele et al., 2014).
    """
    mixed = viewer_hashes ^ salt
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    places = (mixed >> np.uint64(11)).astype(np.float64) / float(1 << 53)
    places[viewer_hashes == 0] = 1.0
    return places


class Candidate:
    """The version on trial, if any. Owned by the engine thread; the counters may be read by others.

    version: its label, "" for none. share: of viewers that are ranked by it, once it has scored the table.
    result: its newest scores. faults: batches that could not be ranked by it.
    served: viewers ranked by it. seen: by the version in use, and by the candidate (True).
    """

    def __init__(self, streams: StreamState, pipeline: Pipeline) -> None:
        self._streams, self._pipeline = streams, pipeline
        self.version = ""
        self.share = 0.0
        self.result: RefreshResult | None = None
        self.faults = self.served = 0
        self.seen = (Seen(), Seen())
        self._salt = np.uint64(0)
        self._snapshot: Snapshot | None = None
        self._base: Snapshot | None = None

    def begin(self, version: str) -> None:
        """Tries another version, or none (""): nothing of the one before is left."""
        self.version, self.share, self.result = version, 0.0, None
        self.faults = self.served = 0
        self.seen = (Seen(), Seen())
        self._salt = hash_ids(*pack_ids([version.encode()]))[0]
        self._snapshot = self._base = None
        self._streams.candidate_trend[:] = np.nan

    def take(self, result: RefreshResult) -> bool:
        """Writes its new scores; False when they are those of a version no longer on trial."""
        if not self.version or result.model_version != self.version or result.scores is None or result.order is None:
            return False
        slots = result.slots
        same = (self._streams.session[slots] == result.sessions) & np.isfinite(result.scores)
        self._streams.candidate_trend[slots[same]] = result.scores[same]
        self.result = result
        self._snapshot = None
        return True

    def failing(self, version: str, reason: str) -> None:
        """It gave no new scores: replies go on with its last ones, and say so."""
        if self.version == version and self.result is not None:
            self.result = replace(self.result, level=Level.LAST_GOOD, reasons=(reason,))

    def split(self, queries: Sequence[RankQuery]) -> NDArray[np.bool_] | None:
        """bool[B], who is ranked by the candidate; None: nobody. Without a viewer_id only when everybody is."""
        if self.share <= 0.0 or self.result is None:
            return None
        if self.share >= 1.0:
            return np.ones(len(queries), np.bool_)
        mine = self._in_share(hash_ids(*pack_ids([query.viewer_id.encode() for query in queries])))
        return mine if mine.any() else None

    @contextmanager
    def ranking(self) -> Iterator[None]:
        """Inside, the pipeline's host path reads the candidate's column and order."""
        assert self.result is not None and self.result.order is not None
        pipeline, streams, base = self._pipeline, self._streams, self._pipeline.snapshot
        if self._snapshot is None or self._base is not base:
            # What does not depend on scores is worked out once per tick for both.
            _ = base.showable, base.fresh_order
            self._snapshot, self._base = copy.copy(base), base
            self._snapshot.rescored(self.result.order)
        trend = streams.trend
        streams.trend, pipeline.snapshot = streams.candidate_trend, self._snapshot
        try:
            yield
        finally:
            streams.trend, pipeline.snapshot = trend, base

    def reply_state(self, base: ReplyState, now_ms: int) -> ReplyState:
        """What replies ranked by the candidate disclose. Its scores are always a model's, if not of this second."""
        assert self.result is not None
        age_ms = max(0, now_ms - self.result.as_of_ms)
        return replace(
            base, model_version=self.version, level=self.result.level, reasons=self.result.reasons, score_age_ms=age_ms
        )

    def saw(self, viewers: NDArray[np.uint64], of_dead: NDArray[np.uint64], causes: list[Cause]) -> None:
        """Impressions that clients reported, counted for whoever ranked for the viewer.

        Args:
            viewers: hashes uint64[n], one per impression. of_dead: those of the dead ones, uint64[d]; d causes.
        """
        if not self.version:
            return
        by_candidate = int(np.count_nonzero(self._in_share(viewers)))
        self.seen[True].impressions += by_candidate
        self.seen[False].impressions += len(viewers) - by_candidate
        for mine, cause in zip(self._in_share(of_dead).tolist(), causes, strict=True):
            self.seen[mine].dead += 1
            self.seen[mine].ours += cause is Cause.US

    def _in_share(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        return (viewer_places(hashes, self._salt) < self.share) | (self.share >= 1.0)
