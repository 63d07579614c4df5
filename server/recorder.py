"""Turns what the engine did into metrics. Called on the engine thread, after the work, never per stream."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from liverank.v1 import ingest_pb2
from numpy.typing import NDArray

from kernels import fence
from kernels.eligibility import Drop
from kernels.slate import Outcome
from server.admission.gate import ShedReason
from server.batching.base import Priority, Waiting
from server.live.event_checks import KIND_NAMES
from server.live.events import Rejection
from server.live.features import FeatureSet, State
from server.live.impressions import Cause
from server.live.table import Applied, End, Expired, LiveTable
from server.log.commit import Submission
from server.ranking.slates import SlateBatch
from server.retrieval.sources import SOURCES
from server.retrieval.streams import StreamState
from server.rules.bits import count_by_first_rule
from server.scoring.refresh import RefreshResult
from server.telemetry.metrics import Metrics
from server.viewers.table import ViewerTable

_NO_DROPS = (Drop.KEPT, Drop.NOT_NEEDED)
_NOT_CHOSEN = (Outcome.CREATOR_CAP, Outcome.CATEGORY_CAP, Outcome.BELOW_LIMIT)
_CAUSES = ("lease_expired", "superseded", "reconciled")


class Recorder:
    """Writes to `Metrics`; also keeps the two totals that Admin.Status reports."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        # Looked up once: `labels` costs more than the increment, and this runs per batch.
        stages = ("queue", "retrieve", "blend", "score", "select", "verify")
        self._stages = {stage: metrics.stage_seconds.labels(stage) for stage in stages}
        self._rank = metrics.rank_seconds.labels()
        self._served_by = [metrics.source_served.labels(source.name) for source in SOURCES]
        self._proposed_by = [metrics.source_candidates.labels(source.name) for source in SOURCES]
        self.model_transport: Callable[[], str] = lambda: ""
        """How tensors travel to the model now."""
        self._events = {kind: metrics.events.labels(name) for kind, name in KIND_NAMES.items()}
        self._dead_by = {cause: metrics.dead_impressions.labels(cause.value) for cause in Cause}
        self._waits = {p: metrics.queue_wait_seconds.labels(p.name.lower()) for p in Priority}
        drops = metrics.slate_drops
        self._not_shown = [
            (int(drop), drops.labels("verify", drop.name.lower())) for drop in Drop if drop not in _NO_DROPS
        ]
        self._not_chosen = [(int(one), drops.labels("select", one.name.lower())) for one in _NOT_CHOSEN]
        self._excluded = drops.labels("merge", "excluded")
        self._ranked_at: dict[str, Any] = {}
        self._refusals: dict[tuple[str, str], list[Any]] = {}
        self._shed = {(r, p): metrics.shed.labels(r.value, p.name.lower()) for r in ShedReason for p in Priority}
        self._viewers_forgotten = 0
        self.events_applied = 0
        self.events_rejected = 0

    def watch_transport(self, transport: Callable[[], str]) -> None:
        """Asks ``transport`` whenever somebody looks at the metrics or the status."""
        self.model_transport = transport

        def is_used(name: str) -> float:
            return float(transport() == name)

        for name in ("in_process", "plain", "system_shm", "cuda_shm"):
            self.metrics.model_transport.labels(name).set_function(partial(is_used, name))

    def applied(self, applied: Applied) -> None:
        """One batch went through the table."""
        self.events_applied += int(applied.by_code[fence.APPLIED])
        for kind in np.flatnonzero(applied.by_kind).tolist():
            self._events[kind].inc(int(applied.by_kind[kind]))
        for code in np.flatnonzero(applied.by_code[1:]).tolist():
            self._rejected(code + 1, int(applied.by_code[code + 1]))
        if heartbeats := int(applied.by_kind[fence.HEARTBEAT]):
            self.metrics.heartbeats_stalled.inc(heartbeats - int(np.count_nonzero(applied.renewed)))

    def malformed(self, rejected: list[Rejection]) -> None:
        """Events refused before the table saw them. Any thread."""
        for code, count in Counter(r.code for r in rejected).items():
            self._rejected(code, count)

    def _rejected(self, code: int, count: int) -> None:
        self.events_rejected += count
        self.metrics.events_rejected.labels(ingest_pb2.RejectCode.Name(code)).inc(count)

    def acknowledged(self, submission: Submission, codes: NDArray[np.uint8], now_ms: int) -> None:
        """A batch is durable and applied."""
        seconds = max(0, now_ms - submission.received_ms) / 1000
        self.metrics.apply_seconds.observe(seconds)
        for row in submission.batch.events.ended_reason:
            if codes[row] == fence.APPLIED:
                self.metrics.end_to_gone_seconds.observe(seconds)

    def impressions(self, seen: int, causes: list[Cause]) -> None:
        """Clients reported so many impressions; a cause for each whose session was over by then."""
        self.metrics.impressions.inc(seen)
        for cause in causes:
            self._dead_by[cause].inc()

    def clock_stepped(self, stepped_ms: int) -> None:
        """How far the machine's clock is from the server's."""
        self.metrics.clock_stepped_seconds.set(stepped_ms / 1000)

    def ended(self, ends: list[End]) -> None:
        """Sessions ended. Reasons are free text, so only the known causes become labels."""
        for end in ends:
            self.metrics.ends.labels(end.reason if end.reason in _CAUSES else "end_event").inc()

    def scored(self, result: RefreshResult) -> None:
        """A score refresh came back."""
        self.metrics.model_bad_rows.inc(result.model_rows_bad)

    def model_called(self, outcome: str, seconds: float) -> None:
        """The model was called (or skipped). Refresh thread."""
        self.metrics.model_calls.labels(outcome).inc()
        if outcome != "skipped":
            self.metrics.model_seconds.observe(seconds)

    def features(self, states: NDArray[np.uint8], features: FeatureSet) -> None:
        """Completeness of the features of all live rows, states uint8[n, F]."""
        n = max(1, len(states))
        for state, name in ((State.MISSING, "missing"), (State.STALE, "stale")):
            counts = np.count_nonzero(states == state, axis=0)
            for feature, count in zip(features.names, counts, strict=True):
                self.metrics.feature_missing_share.labels(feature, name).set(count / n)

    def ranked(self, slates: SlateBatch, level: str, started_s: float) -> None:
        """One batch was ranked and encoded."""
        m, times = self.metrics, slates.times
        for stage in ("retrieve", "blend", "select", "verify"):
            self._stages[stage].observe(getattr(times, f"{stage}_us") / 1e6)
        now_s, received_s = time.monotonic(), [query.received_s for query in slates.batch.requests]
        self._rank.observe_all([now_s - came_s for came_s in received_s])
        self._stages["queue"].observe_all([max(0.0, started_s - came_s) for came_s in received_s])
        m.batch_rows.observe(len(slates.batch))
        if level not in self._ranked_at:
            self._ranked_at[level] = m.rank_requests.labels("ok", level)
        self._ranked_at[level].inc(len(slates.batch))
        if slates.ranked_by is not None:
            self._stages["score"].observe(times.score_us / 1e6)
            if slates.ranked_by.gone:
                m.slate_drops.labels("score", "session_changed").inc(slates.ranked_by.gone)
        tally = slates.tally
        m.served.inc(tally.shown)
        m.exploration_served.inc(tally.explored)
        if seen := int(slates.batch.seen.sum()):
            m.seen_excluded.inc(seen)
        for counts, children in ((tally.served, self._served_by), (tally.proposed, self._proposed_by)):
            for count, child in zip(counts.tolist(), children, strict=True):
                if count:
                    child.inc(count)
        if tally.excluded:
            self._excluded.inc(tally.excluded)
        for counts, named in ((tally.drops.tolist(), self._not_shown), (tally.outcomes.tolist(), self._not_chosen)):
            for which, child in named:
                if counts[which]:
                    child.inc(counts[which])

    def ranked_by_candidate(self, viewers: int) -> None:
        """Viewers in a canary's share were ranked by the version on trial."""
        self.metrics.candidate_ranked.inc(viewers)

    def ranked_on_host(self, reason: str, viewers: int) -> None:
        """The GPU's pipeline left requests to the host, and why."""
        self.metrics.host_ranked.labels(reason).inc(viewers)

    def refused(self, method: str, code: str) -> None:
        """A call was answered with an error status. Any thread."""
        counters = self._refusals.get((method, code))
        if counters is None:  # looked up once: under overload this runs thousands of times a second
            counters = [self.metrics.rpc_errors.labels(method, code)]
            if method in ("Rank", "RankBatch"):
                counters.append(self.metrics.rank_requests.labels(code, "none"))
            self._refusals[method, code] = counters
        for counter in counters:
            counter.inc()

    def embedding_looked_up(self, outcome: str, cached: bool) -> None:
        """An embedding was looked up. Any thread."""
        self.metrics.viewer_embeddings.labels(outcome, str(cached).lower()).inc()

    def ranker_called(self, outcome: str, seconds: float) -> None:
        """The ranker was asked about a batch, or was not because it fails."""
        self.metrics.ranker_calls.labels(outcome).inc()
        if outcome not in ("breaker_open", "busy"):
            self.metrics.ranker_seconds.observe(seconds)

    def shed(self, reason: ShedReason, priority: Priority) -> None:
        """A request was turned away. Any thread."""
        self._shed[reason, priority].inc()

    def waited(self, items: Sequence[Waiting[Any]], begun_s: float) -> None:
        """These are ranked from ``begun_s`` on."""
        for priority, waits in self._waits.items():
            waits.observe_all([max(0.0, begun_s - item.arrived_s) for item in items if item.priority is priority])

    def abandoned(self, viewers: int) -> None:
        """Callers went away before their turn."""
        self.metrics.rank_requests.labels("abandoned", "none").inc(viewers)

    def fault(self, where: str) -> None:
        """An unexpected exception was caught and logged."""
        self.metrics.rpc_errors.labels(where, "internal").inc()

    def ticked(self, table: LiveTable, streams: StreamState, expired: Expired, queue_rows: int, seconds: float) -> None:
        """One tick passed."""
        m = self.metrics
        m.tick_seconds.observe(seconds)
        m.lease_expiries.inc(expired.suspects)
        for state, count in zip(("live", "suspect", "ended"), table.count_states(), strict=True):
            m.streams.labels(state).set(count)
        m.queue_rows.set(queue_rows)
        if isinstance(viewers := table.follower, ViewerTable):
            m.viewers.set(len(viewers))
            m.viewers_forgotten.inc(viewers.forgotten - self._viewers_forgotten)
            self._viewers_forgotten = viewers.forgotten
        live = table.columns.state[: table.rows] == fence.LIVE
        for rule, count in count_by_first_rule(streams.book, streams.rule_bits[: table.rows][live]).items():
            m.excluded_by_rule.labels(rule).set(count)

    def admitted(self, quality: float, limit: int) -> None:
        """What admission has settled at."""
        self.metrics.quality_factor.set(quality)
        self.metrics.admission_limit.set(limit)

    def disclosed(self, level: int, score_age_ms: int, applied_offset: int) -> None:
        """What replies say about themselves now."""
        self.metrics.degradation_level.set(level)
        self.metrics.score_age_seconds.set(score_age_ms / 1000)
        self.metrics.applied_offset.set(applied_offset)
