"""Settings: frozen, typed, from a TOML file and LIVERANK_* variables; unknown keys are refused.

``LIVERANK_SCORING__MODE=local`` overrides ``[scoring] mode``. See docs/configuration in README.
"""

from __future__ import annotations

import ipaddress
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from server.errors import ConfigError

ROOT = Path(__file__).resolve().parent

Milliseconds = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ServeSettings(_Section):
    host: str = "127.0.0.1"
    port: int = Field(7710, ge=0, le=65535, description="gRPC port; 0: a free one")
    metrics_port: int = Field(7711, ge=0, le=65535, description="Prometheus port; 0: a free one")
    max_rank_calls: int = Field(
        256, ge=1, le=65_536, description="interactive Rank calls in the server at once; upper bound of the limit"
    )
    edges: int = Field(0, ge=0, le=256, description="processes that share the port; 0: one process does it all")
    max_open_streams: int = Field(64, ge=1, le=4096, description="open Publish and WatchEnded calls")
    max_queue_rows: int = Field(4096, ge=1, description="viewers waiting to be ranked")
    max_batch_rows: int = Field(64, ge=1, description="viewers ranked together")
    batch_window_us: int = Field(200, ge=0, le=10_000, description="under load, how long a batch may take to fill")
    max_message_bytes: int = Field(16 << 20, ge=1 << 10)
    drain_grace_ms: Milliseconds = 10_000
    watch_buffer: int = Field(65_536, ge=16, description="ends remembered and buffered per watcher")


class AdmissionSettings(_Section):
    target_ms: Milliseconds = Field(200, description="arrival to reply of an interactive request")
    target_percentile: float = Field(95.0, gt=0.0, lt=100.0, description="share of requests that meet it, per cent")
    target_wait_ms: Milliseconds = Field(30, description="mean wait that the limit settles at, beyond one batch")
    min_limit: int = Field(8, ge=1, description="interactive requests that are always let in")
    quality_floor: float = Field(0.25, gt=0.0, le=1.0, description="least share of candidates; below it, shed")
    quality_step: float = Field(0.005, gt=0.0, le=0.1, description="the factor's step up, per request in time")
    hold_ms: Milliseconds = Field(1_000, description="quality does not rise so soon after shedding")


class TableSettings(_Section):
    capacity: int = Field(20_000, ge=1, le=4_000_000, description="rows: live + suspect + tombstones")
    embedding_dim: int = Field(64, ge=1, le=1024)
    lease_ms: Milliseconds = 15_000
    grace_ms: Milliseconds = Field(30_000, description="SUSPECT this long, then ENDED")
    tombstone_ms: Milliseconds = Field(900_000, description="ENDED streams are remembered this long")
    max_lateness_ms: Milliseconds = 600_000
    max_future_ms: Milliseconds = 5_000
    max_producers: int = Field(1024, ge=1)
    max_events_per_batch: int = Field(10_000, ge=1)
    reconcile_max_share: float = Field(
        0.5, gt=0.0, le=1.0, description="a Reconcile that would end more of all open streams is refused"
    )
    reconcile_always: int = Field(5, ge=0, description="unless it ends no more streams than this")
    features_file: Path = ROOT / "live" / "features.toml"
    currencies: dict[str, float] = Field(
        default={"USD": 0.01, "EUR": 0.0108, "GBP": 0.0127, "JPY": 0.0067, "IDR": 0.00000062, "CNY": 0.0014},
        description="value of one minor unit in the reference currency",
    )

    @model_validator(mode="after")
    def _tombstones_outlive_lateness(self) -> TableSettings:
        if self.tombstone_ms <= self.max_lateness_ms:
            raise ValueError(
                f"tombstone_ms ({self.tombstone_ms}) must be larger than max_lateness_ms "
                f"({self.max_lateness_ms}), or a late event could resurrect an ended stream"
            )
        return self


class KafkaSettings(_Section):
    bootstrap_servers: str = Field("", description="host:port,host:port; needed for log.kind = kafka")
    topic: str = Field("liverank-events", min_length=1, description="of exactly one partition: its order is the log's")
    dead_letter_topic: str = Field("", description="for records that nobody can decode; empty: <topic>-dead-letters")
    publish: bool = Field(True, description="false: a follower, which refuses Publish and writes nothing")
    time_record_ms: Milliseconds = Field(500, description="a silent log gets an empty record, so that time goes on")
    ack_timeout_ms: Milliseconds = Field(5_000, description="Publish fails if the brokers do not answer for so long")
    options: dict[str, str] = Field(default={}, description="further librdkafka properties, such as security.protocol")


class EmbeddingSettings(_Section):
    """Viewers' embeddings in Redis, for requests that name a viewer and bring none; see docs/viewers.md."""

    url: SecretStr = Field(SecretStr(""), description="redis://, rediss:// or unix://; empty: nobody is looked up")
    key_prefix: str = Field("viewer:embedding:", description="before the viewer_id; values: D little-endian float32")
    deadline_ms: Milliseconds = Field(5, description="a request waits so long; then it is ranked without")
    timeout_ms: Milliseconds = Field(100, description="of one command; then the connection is given up")
    cache_viewers: int = Field(100_000, ge=1, description="embeddings kept here, also that there is none")
    cache_ms: Milliseconds = Field(60_000, description="how old a kept one may be")
    max_waiting: int = Field(4_096, ge=1, description="viewers asked for at once; more are ranked without")
    breaker_failures: int = Field(3, ge=1, description="failures in a row that open the breaker")
    breaker_open_ms: Milliseconds = Field(1_000, description="then one trial command per this time")

    @field_validator("url")
    @classmethod
    def _names_a_redis(cls, url: SecretStr) -> SecretStr:
        if url.get_secret_value() and not url.get_secret_value().startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("redis://, rediss:// or unix:// wanted")
        return url


class ViewerSettings(_Section):
    """What is remembered of viewers; see docs/viewers.md."""

    capacity: int = Field(
        1_000_000, ge=0, le=50_000_000, description="viewers remembered; 0: none. Used ones cost memory"
    )
    sessions: int = Field(200_000, ge=1, le=8_000_000, description="visited sessions whose embedding is remembered")
    exclude_reported: bool = Field(True, description="a viewer is not shown again what the viewer reported")
    exclude_watched_ms: int = Field(0, ge=0, description="nor a session that was watched at least so long; 0: is shown")
    exclude_within_ms: Milliseconds = Field(86_400_000, description="unless that was longer ago")
    embeddings: EmbeddingSettings = EmbeddingSettings()


class LogSettings(_Section):
    kind: Literal["sqlite", "kafka"] = "sqlite"
    path: Path = Field(
        Path("liverank-data/events.sqlite3"), description="SQLite file; for kafka, only its name's place for snapshots"
    )
    group_commit_rows: int = Field(1024, ge=1, description="batches written per commit at most")
    retain_records: int = Field(0, ge=0, description="records kept beyond those that kept snapshots need (sqlite)")
    accept_lost_history: bool = Field(
        False, description="start although records before the oldest are gone and no snapshot covers them"
    )
    kafka: KafkaSettings = KafkaSettings()

    @model_validator(mode="after")
    def _kafka_is_named(self) -> LogSettings:
        if self.kind == "kafka" and not self.kafka.bootstrap_servers:
            raise ValueError("kafka.bootstrap_servers: host:port wanted for kind = 'kafka', got none")
        return self


class SnapshotSettings(_Section):
    path: Path | None = Field(None, description="folder; default: beside log.path, with suffix .snapshots")
    every_ms: Milliseconds = Field(60_000, description="time between snapshots, if anything was applied")
    keep: int = Field(3, ge=1, description="newest snapshots kept; the log is kept back to the oldest of them")


class ScoringSettings(_Section):
    mode: Literal["triton", "local"] = "local"
    triton_address: str = "127.0.0.1:8001"
    transport: Literal["auto", "cuda_shm", "system_shm", "plain"] = Field(
        "auto", description="of tensors to Triton; auto: shared memory with a Triton on this machine, else plain"
    )
    model_name: str = "trendiness"
    model_repository: Path = ROOT.parent / "model_repository"
    refresh_ms: Milliseconds = 1_000
    deadline_ms: Milliseconds = 800
    max_score_age_ms: Milliseconds = Field(15_000, description="last good scores are used this long")
    breaker_failures: int = Field(3, ge=1, description="failures in a row that open the breaker")
    breaker_open_ms: Milliseconds = Field(2_000, description="then one trial call per this time")


class RankerSettings(_Section):
    """The model viewer × stream, asked for every batch; where it is: scoring.mode and what belongs to it."""

    model: str = Field("", description='its name in the model repository, such as "ranker"; empty: stream-level scores')
    deadline_ms: Milliseconds = Field(25, description="a batch waits so long, then it is ranked without")
    candidates: int = Field(200, ge=1, le=4096, description="of each request that are scored, best stream-level first")
    warm_ms: Milliseconds = Field(10_000, description="a start waits so long for the model to load")
    breaker_failures: int = Field(3, ge=1, description="failures in a row that open the breaker")
    breaker_open_ms: Milliseconds = Field(1_000, description="then one trial call per this time")


class RolloutSettings(_Section):
    """See docs/models.md. The limits end a canary by themselves."""

    file: Path | None = Field(None, description="which version serves; default: beside log.path, .rollout.json")
    min_metrics: dict[str, float] = Field({"auc": 0.6}, description="a version below any of these is not taken")
    max_metrics: dict[str, float] = Field({}, description="nor one above any of these")
    max_drift: float = Field(0.10, gt=0.0, description="relative distance of the mean scores")
    max_failures: int = Field(3, ge=1, description="refreshes in a row that the candidate failed")
    max_latency_ratio: float = Field(3.0, ge=1.0, description="of the time of a refresh to the serving version's")
    latency_floor_ms: Milliseconds = Field(100, description="a refresh this fast is never too slow")
    min_refreshes: int = Field(3, ge=1, description="before drift and latency count")
    min_impressions: int = Field(200, ge=1, description="of each side, before the share of dead ones counts")
    max_dead_increase: float = Field(0.005, gt=0.0, le=1.0, description="of the share of dead impressions")


class ApproximateSettings(_Section):
    index: Literal["none", "cagra"] = Field("none", description="an approximate index beside the exact engine")
    recall: float = Field(0.95, gt=0.0, lt=1.0, description="recall@k that must be proven for it to answer")
    measured_share: float = Field(0.02, gt=0.0, le=1.0, description="queries also answered exactly")
    window: int = Field(500, ge=10, le=100_000, description="measured queries judged together")
    overfetch: int = Field(4, ge=1, le=64, description="candidates asked for per place")
    rebuild_ms: Milliseconds = 60_000
    max_changed_rows: int = Field(4_096, ge=0, description="rows changed since the build: beyond, exact")

    @model_validator(mode="after")
    def _perfect_recall_is_proof(self) -> ApproximateSettings:
        # See server/retrieval/recall.py::lower_bound
        if 1.0 - 3.33 / (self.window + 1) < self.recall:
            raise ValueError(f"window ({self.window}) is too short to ever prove a recall of {self.recall}")
        return self


class RetrievalSettings(_Section):
    engine: Literal["exact", "faiss_cpu", "exact_gpu", "faiss_gpu"] = "exact"
    scan: Literal["auto", "int8", "float32"] = Field(
        "auto",
        description="what the exact engine scans on a CPU: an int8 copy of the embeddings, which rules out what cannot "
        "be among the best, or the embeddings; same answers. auto: int8 on a CPU with AVX-512 VNNI",
    )
    approximate: ApproximateSettings = ApproximateSettings()
    personal: int = Field(200, ge=0, le=2048, description="candidates from this source, likewise below")
    trending: int = Field(200, ge=0, le=2048)
    trending_per_group: int = Field(20, ge=0, le=256, description="per category and per language")
    followed: int = Field(100, ge=0, le=2048)
    fresh: int = Field(50, ge=0, le=2048)
    fresh_age_ms: Milliseconds = 600_000


class RankSettings(_Section):
    default_limit: int = Field(20, ge=1)
    max_limit: int = Field(100, ge=1, le=500)
    reserve: int = Field(20, ge=0, le=100, description="ranked back-fill behind each slate")
    min_budget_ms: Milliseconds = Field(2, description="less time than this left: the popular list")
    tick_ms: Milliseconds = 100
    rules_file: Path = ROOT / "rules" / "default.toml"


class DeviceSettings(_Section):
    kind: Literal["auto", "cuda", "cpu"] = Field("auto", description="auto: a GPU if there is one")
    allow_cpu: bool = Field(False, description="with auto: serve from the CPU when the GPU that is there is broken")


class SecuritySettings(_Section):
    """See docs/security.md."""

    cert_file: Path | None = Field(None, description="PEM, the server's certificate and its chain; turns TLS on")
    key_file: Path | None = Field(None, description="PEM, its key")
    client_ca_file: Path | None = Field(None, description="PEM; clients must show a certificate of these CAs")
    access_file: Path | None = Field(None, description="tokens and certificate names with roles; without it, anybody")
    reload_ms: Milliseconds = Field(1_000, description="how often access and certificate files are looked at")
    allow_insecure_public: bool = Field(False, description="listen beyond loopback without TLS or access file")
    public_metrics: bool = Field(False, description="metrics on serve.host too when that is not loopback")
    requests_per_second: float = Field(0.0, ge=0.0, le=1e9, description="per client; 0: no limit")
    burst_s: float = Field(2.0, gt=0.0, le=3600.0, description="seconds' worth of requests that may come at once")
    max_open_streams_per_client: int = Field(0, ge=0, description="open Publish and WatchEnded calls; 0: no limit")
    max_streams_per_producer: int = Field(0, ge=0, lt=1 << 32, description="rows per producer_id; 0: no limit")
    producers_own_streams: bool = Field(False, description="only the producer_id that started a stream may change it")
    audit_file: Path | None = Field(None, description="JSON lines: Admin calls, Reconcile, reloaded files")
    audit_max_bytes: int = Field(16 << 20, ge=1 << 10, description="larger: rotated; five old ones are kept")

    @model_validator(mode="after")
    def _belong_together(self) -> SecuritySettings:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file: both or none wanted")
        if self.client_ca_file is not None and self.cert_file is None:
            raise ValueError("client_ca_file: needs cert_file and key_file")
        if self.producers_own_streams and self.access_file is None:
            raise ValueError("producers_own_streams: needs access_file; without it a producer_id proves nothing")
        return self


class TelemetrySettings(_Section):
    row_log: Path | None = Field(None, description="folder for feature rows of served slates; see docs/datasets.md")
    row_log_share: float = Field(0.01, gt=0.0, le=1.0, description="share of the replies, chosen by chance")
    row_log_file_bytes: int = Field(64 << 20, ge=1 << 10, description="a file that is larger is followed by the next")
    row_log_files: int = Field(16, ge=1, description="newest files kept")


class Settings(BaseSettings):
    """All settings of one server."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix="LIVERANK_", env_nested_delimiter="__")

    serve: ServeSettings = ServeSettings()
    admission: AdmissionSettings = AdmissionSettings()
    table: TableSettings = TableSettings()
    log: LogSettings = LogSettings()
    snapshot: SnapshotSettings = SnapshotSettings()
    scoring: ScoringSettings = ScoringSettings()
    ranker: RankerSettings = RankerSettings()
    viewers: ViewerSettings = ViewerSettings()
    rollout: RolloutSettings = RolloutSettings()
    retrieval: RetrievalSettings = RetrievalSettings()
    rank: RankSettings = RankSettings()
    device: DeviceSettings = DeviceSettings()
    security: SecuritySettings = SecuritySettings()
    telemetry: TelemetrySettings = TelemetrySettings()

    @property
    def metrics_host(self) -> str:
        """Where metrics are served: serve.host if that is loopback or allowed, else 127.0.0.1."""
        if self.security.public_metrics or is_loopback(self.serve.host):
            return self.serve.host
        return "127.0.0.1"

    @model_validator(mode="after")
    def _nobody_gets_in(self) -> Settings:
        serve, security = self.serve, self.security
        missing = [name for name in ("cert_file", "access_file") if getattr(security, name) is None]
        if missing and not security.allow_insecure_public and not is_loopback(serve.host):
            raise ValueError(
                f"serve.host: {serve.host!r} is not loopback, and security.{' and security.'.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} not set, so anybody could "
                f"{'read along' if missing == ['cert_file'] else 'publish and administer'}; set what is missing, "
                "listen on 127.0.0.1, or, where a proxy in front does this work, set security.allow_insecure_public"
            )
        return self

    @property
    def snapshot_folder(self) -> Path:
        """Where snapshots are."""
        return self.snapshot.path or self.log.path.with_suffix(".snapshots")

    @property
    def rollout_file(self) -> Path:
        """Which version of each model serves."""
        return self.rollout.file or self.log.path.with_suffix(".rollout.json")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (env_settings, init_settings)  # a variable overrides the file


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def load_settings(path: Path | None = None) -> Settings:
    """Reads settings from ``path`` (TOML) and the environment.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown or outside its limits.
    """
    values: dict[str, object] = {}
    if path is not None:
        try:
            values = tomllib.loads(path.read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path}: {error}") from error
    return parse_settings(values, where=str(path or "environment"))


def parse_settings(values: dict[str, object], where: str = "settings") -> Settings:
    """Checks ``values`` (nested sections). Raises ConfigError naming each wrong key."""
    try:
        return Settings(**values)  # type: ignore[arg-type]
    except ValidationError as error:
        faults = "; ".join(
            ": ".join([*filter(None, [".".join(str(part) for part in fault["loc"])]), fault["msg"]])
            for fault in error.errors()
        )
        raise ConfigError(f"{where}: {faults}") from error
