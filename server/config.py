"""Settings: frozen, typed, from a TOML file and LIVERANK_* variables; unknown keys are refused.

``LIVERANK_SCORING__MODE=local`` overrides ``[scoring] mode``. See docs/configuration in README.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
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
    rank_threads: int = Field(128, ge=1, le=1024, description="Rank calls handled at once; each waits in a thread")
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
    target_wait_ms: Milliseconds = Field(50, description="mean wait that the limit settles at, beyond one batch")
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


class LogSettings(_Section):
    path: Path = Field(Path("liverank-data/events.sqlite3"), description="SQLite file")
    group_commit_rows: int = Field(1024, ge=1, description="batches written per commit at most")


class ScoringSettings(_Section):
    mode: Literal["triton", "local"] = "local"
    triton_address: str = "127.0.0.1:8001"
    model_name: str = "trendiness"
    model_repository: Path = ROOT.parent / "model_repository"
    refresh_ms: Milliseconds = 1_000
    deadline_ms: Milliseconds = 800
    max_score_age_ms: Milliseconds = Field(15_000, description="last good scores are used this long")
    breaker_failures: int = Field(3, ge=1, description="failures in a row that open the breaker")
    breaker_open_ms: Milliseconds = Field(2_000, description="then one trial call per this time")


class RetrievalSettings(_Section):
    engine: Literal["exact", "faiss_cpu"] = "exact"
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


class Settings(BaseSettings):
    """All settings of one server."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix="LIVERANK_", env_nested_delimiter="__")

    serve: ServeSettings = ServeSettings()
    admission: AdmissionSettings = AdmissionSettings()
    table: TableSettings = TableSettings()
    log: LogSettings = LogSettings()
    scoring: ScoringSettings = ScoringSettings()
    retrieval: RetrievalSettings = RetrievalSettings()
    rank: RankSettings = RankSettings()

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
            f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in error.errors()
        )
        raise ConfigError(f"{where}: {faults}") from error
