"""All Prometheus metrics, in one registry per server. Labels are bounded sets; no stream or viewer ids."""

from __future__ import annotations

import threading
from collections.abc import Callable
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from server.telemetry.distribution import Distribution

_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Metrics:
    """The server's metrics. Names start with ``liverank_``; units are in the names."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.stage_seconds = Distribution(
            "liverank_stage_seconds",
            "Wall time of a stage of one rank batch",
            ["stage"],
            buckets=_SECONDS,
            registry=r,
        )
        self.rank_seconds = Distribution(
            "liverank_rank_seconds", "Rank: request decoded to reply encoded", buckets=_SECONDS, registry=r
        )
        self.batch_rows = Histogram(
            "liverank_batch_rows",
            "Viewers ranked together",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
            registry=r,
        )
        self.rank_requests = Counter(
            "liverank_rank_requests_total", "Ranked viewers by outcome", ["status", "degradation"], registry=r
        )
        self.rpc_errors = Counter(
            "liverank_rpc_errors_total", "Calls refused or failed", ["method", "code"], registry=r
        )
        self.events = Counter("liverank_events_total", "Events applied", ["type"], registry=r)
        self.events_rejected = Counter("liverank_events_rejected_total", "Events refused", ["code"], registry=r)
        self.heartbeats_stalled = Counter(
            "liverank_heartbeats_stalled_total",
            "Heartbeats without media progress: no lease renewed",
            registry=r,
        )
        self.streams = Gauge("liverank_streams", "Rows of the table by state", ["state"], registry=r)
        self.capacity_rows = Gauge("liverank_capacity_rows", "Rows of the table", registry=r)
        self.lease_expiries = Counter(
            "liverank_lease_expiries_total", "Streams hidden because their lease ran out", registry=r
        )
        self.ends = Counter("liverank_ends_total", "Sessions ended, by cause", ["cause"], registry=r)
        self.end_to_gone_seconds = Histogram(
            "liverank_end_to_gone_seconds",
            "End event received to gone from every later reply",
            buckets=_SECONDS,
            registry=r,
        )
        self.impressions = Counter("liverank_impressions_total", "Impressions that clients reported", registry=r)
        self.dead_impressions = Counter(
            "liverank_dead_impressions_total",
            "Impressions of sessions that were over: us (must be 0), cache (past verify_by), client (on the way)",
            ["cause"],
            registry=r,
        )
        self.clock_stepped_seconds = Gauge(
            "liverank_clock_stepped_seconds",
            "Machine's clock minus server's while they disagree by a step, which is not followed; 0: they agree",
            registry=r,
        )
        self.source_candidates = Counter(
            "liverank_source_candidates_total",
            "Candidates proposed (one may count for several sources)",
            ["source"],
            registry=r,
        )
        self.source_served = Counter(
            "liverank_source_served_total",
            "Streams served (one may count for several sources)",
            ["source"],
            registry=r,
        )
        self.fallback_queries = Gauge(
            "liverank_search_fallback_queries",
            "Searches so far that needed a slower way than the usual one to be exact",
            registry=r,
        )
        self.searched_queries = Counter(
            "liverank_searched_queries_total",
            "Searches beside an approximate index by way of answering; measured and short ones were exact",
            ["way"],
            registry=r,
        )
        self.retrieval_approximate = Gauge(
            "liverank_retrieval_approximate", "1: an approximate index answers; 0: the exact engine", registry=r
        )
        self.recall_lower_bound = Gauge(
            "liverank_recall_lower_bound", "99 % lower bound of the approximate index's recall@k", registry=r
        )
        self.recall_gate_changes = Counter(
            "liverank_recall_gate_changes_total", "Changes of who answers searches", ["to", "reason"], registry=r
        )
        self.index_builds = Counter("liverank_index_builds_total", "Approximate indexes built", ["outcome"], registry=r)
        self.index_changed_rows = Gauge(
            "liverank_index_changed_rows", "Rows changed since the approximate index was built", registry=r
        )
        self.exploration_served = Counter(
            "liverank_exploration_served_total", "Streams served in exploration slots", registry=r
        )
        self.host_ranked = Counter(
            "liverank_gpu_requests_ranked_on_host_total",
            "Requests that the GPU's pipeline left to the host, by reason",
            ["reason"],
            registry=r,
        )
        self.served = Counter("liverank_served_total", "Streams served", registry=r)
        self.seen_excluded = Counter(
            "liverank_seen_excluded_total",
            "Live streams kept from a request because its viewer reported or watched them, candidates or not",
            registry=r,
        )
        self.viewers = Gauge("liverank_viewers", "Viewers that are remembered", registry=r)
        self.viewer_embeddings = Counter(
            "liverank_viewer_embeddings_total",
            "Viewers' embeddings looked up, by outcome: found, absent, or what failed; cached says where it came from",
            ["outcome", "cached"],
            registry=r,
        )
        self.viewers_forgotten = Counter(
            "liverank_viewers_forgotten_total", "Viewers that gave way to others: the table is full", registry=r
        )
        self.excluded_by_rule = Gauge(
            "liverank_streams_excluded",
            "Streams kept out now, by first rule that excludes them",
            ["rule"],
            registry=r,
        )
        self.slate_drops = Counter(
            "liverank_slate_drops_total", "Removed on the way to a slate, by stage and reason",
            ["stage", "reason"], registry=r,
        )  # fmt: skip
        self.score_age_seconds = Gauge("liverank_score_age_seconds", "Age of the stream scores in use", registry=r)
        self.degradation_level = Gauge(
            "liverank_degradation_level", "0 model, 1 last good scores, 2 formula, 3 popular", registry=r
        )
        self.model_calls = Counter(
            "liverank_model_calls_total", "Calls of the trendiness model", ["outcome"], registry=r
        )
        self.ranker_calls = Counter(
            "liverank_ranker_calls_total", "Batches by what became of their call of the ranker", ["outcome"], registry=r
        )
        self.ranker_seconds = Histogram(
            "liverank_ranker_seconds", "Ranker: asked to answered or given up", buckets=_SECONDS, registry=r
        )
        self.model_transport = Gauge(
            "liverank_model_transport", "1 for the way tensors travel to the model now", ["transport"], registry=r
        )
        self.model_transport_fallbacks = Counter(
            "liverank_model_transport_fallbacks_total", "Shared memory refused: tensors went plain", registry=r
        )
        self.model_seconds = Histogram(
            "liverank_model_seconds", "Time of a call of the trendiness model", buckets=_SECONDS, registry=r
        )
        self.model_bad_rows = Counter(
            "liverank_model_bad_rows_total", "Rows that the model scored non-finite", registry=r
        )
        self.model_versions = Gauge(
            "liverank_model_version", "Version of a model in a role: serving, previous, candidate; 0: none",
            ["model", "role"], registry=r,
        )  # fmt: skip
        self.canary_share = Gauge(
            "liverank_canary_share", "Share of the viewers that the candidate serves", ["model"], registry=r
        )
        self.candidate_ranked = Counter("liverank_candidate_ranked_total", "Viewers ranked by a candidate", registry=r)
        self.rollout_agreement = Gauge(
            "liverank_rollout_agreement", "The candidate's scores against those in use", ["model", "measure"],
            registry=r,
        )  # fmt: skip
        self.rollout_steps = Counter(
            "liverank_rollout_steps_total", "Steps of rollouts", ["model", "step", "outcome"], registry=r
        )
        self.rollbacks = Counter(
            "liverank_rollbacks_total", "Rollbacks by guardrail, or asked for", ["model", "guardrail"], registry=r
        )
        self.rollout_mends = Counter(
            "liverank_rollout_mends_total", "Versions that Triton had lost were loaded again", ["model"], registry=r
        )
        self.feature_missing_share = Gauge(
            "liverank_feature_missing_share", "Share of live streams for which a feature is missing or stale",
            ["feature", "state"], registry=r,
        )  # fmt: skip
        self.tick_seconds = Histogram("liverank_tick_seconds", "Time of one engine tick", buckets=_SECONDS, registry=r)
        self.apply_seconds = Histogram(
            "liverank_apply_seconds",
            "Batch of events received to applied and durable",
            buckets=_SECONDS,
            registry=r,
        )
        self.log_errors = Counter(
            "liverank_log_errors_total",
            "Writes to the log that failed: batches were refused; trim: old records stay",
            ["reason"],
            registry=r,
        )
        self.log_trimmed = Counter("liverank_log_trimmed_records_total", "Old records deleted from the log", registry=r)
        self.log_truncated = Counter(
            "liverank_log_truncated_records_total", "Damaged last records removed at start", registry=r
        )
        self.log_dead_letters = Counter(
            "liverank_log_dead_letters_total", "Records of the log that cannot be decoded", registry=r
        )
        self.log_gaps = Gauge(
            "liverank_log_gap_offsets", "Offsets of the log that held no record, since the start", registry=r
        )
        self.log_lead_seconds = Gauge(
            "liverank_log_stamp_lead_seconds", "Newest stamp in the log minus this server's clock", registry=r
        )
        self.recovery_lag_records = Gauge(
            "liverank_recovery_lag_records", "Records of the log known and not yet applied", registry=r
        )
        self.snapshots = Counter(
            "liverank_snapshots_total", "Snapshots: written, failed, or skipped as unusable", ["outcome"], registry=r
        )
        self.snapshot_seconds = Histogram(
            "liverank_snapshot_seconds", "Time of a whole snapshot", buckets=_SECONDS, registry=r
        )
        self.snapshot_pause_seconds = Histogram(
            "liverank_snapshot_pause_seconds", "Time a snapshot holds the engine", buckets=_SECONDS, registry=r
        )
        self.snapshot_bytes = Gauge("liverank_snapshot_bytes", "Size of the newest snapshot", registry=r)
        self.snapshot_offset = Gauge("liverank_snapshot_offset", "Log offset of the newest snapshot", registry=r)
        self.queue_rows = Gauge("liverank_queue_rows", "Viewers waiting to be ranked", registry=r)
        self.queue_wait_seconds = Distribution(
            "liverank_queue_wait_seconds", "Rank: call received to its batch begun", ["priority"],
            buckets=_SECONDS, registry=r,
        )  # fmt: skip
        self.shed = Counter(
            "liverank_shed_total", "Ranking calls turned away with RESOURCE_EXHAUSTED", ["reason", "priority"],
            registry=r,
        )  # fmt: skip
        self.quality_factor = Gauge(
            "liverank_quality_factor", "Share of the candidates that is scored, 1 unless short of time", registry=r
        )
        self.quality_factor.set(1.0)
        self.admission_limit = Gauge(
            "liverank_admission_limit", "Interactive calls let in at once while shedding", registry=r
        )
        self.applied_offset = Gauge("liverank_applied_offset", "Last log offset applied", registry=r)
        self.auth_refused = Counter(
            "liverank_auth_refused_total", "Calls refused before their method ran, by reason", ["reason"], registry=r
        )
        self.security_reloads = Counter(
            "liverank_security_reloads_total",
            "Access and certificate files read again",
            ["file", "outcome"],
            registry=r,
        )
        self.audit_lost = Counter("liverank_audit_lost_total", "Audit lines that could not be written", registry=r)
        self.row_log_rows = Counter("liverank_row_log_rows_total", "Feature rows of served slates logged", registry=r)
        self.row_log_dropped = Counter(
            "liverank_row_log_dropped_total", "Feature rows chosen and not logged, by reason", ["reason"], registry=r
        )
        self.watchers = Gauge("liverank_watchers", "Open WatchEnded calls", registry=r)

    def serve(self, host: str, port: int) -> tuple[int, Callable[[], None]]:
        """Starts the scrape endpoint; returns its port and how to stop it."""
        server: WSGIServer
        thread: threading.Thread
        server, thread = start_http_server(port, addr=host, registry=self.registry)

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return int(server.server_port), stop
