"""A scenario: what is asked and published, and when. One TOML file, checked like the server's settings.

    [fleet]                   # the streams it brings along
    streams = 500
    [[phase]]
    name = "raid"
    duration_s = 30
    calls_per_s = 80          # all reading calls together
    events_per_s = 300
    [[phase.action]]
    do = "raid"
    at_s = 5

docs/loadtest.md explains every key. Unknown keys are refused, with the place and what is allowed.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from loadtest.load.schedule import Schedule, Segment
from server.errors import ConfigError

FOLDER = Path(__file__).resolve().parents[1] / "scenarios"
MAX_CALLS, MAX_EVENTS, MAX_SECONDS = 2_000_000, 20_000_000, 4 * 3600.0

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(ge=0.0, le=100_000.0, allow_inf_nan=False)]
Kind = Literal[
    "viewer_count", "joined", "left", "watched", "chatted", "liked", "followed", "shared", "bid", "purchased",
    "reported",
]  # fmt: skip
DEFAULT_MIX: dict[Kind, float] = {
    "viewer_count": 10.0, "joined": 12.0, "left": 8.0, "watched": 20.0, "chatted": 16.0, "liked": 28.0,
    "followed": 2.0, "shared": 1.0, "bid": 2.0, "purchased": 0.9, "reported": 0.1,
}  # fmt: skip


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Fleet(_Part):
    """The streams that the scenario starts, keeps alive with heartbeats, and ends."""

    streams: int = Field(500, ge=1, le=1_000_000, description="live at the beginning")
    heartbeat_ms: int = Field(4_000, ge=200, le=60_000, description="well within the server's lease")
    embedding_dim: int = Field(64, ge=0, le=1024, description="as the server's table; 0: no embeddings")
    zipf: float = Field(1.0, ge=0.0, le=4.0, description="exponent of the streams' popularity: who gets the events")


class Viewers(_Part):
    """Who asks."""

    count: int = Field(1_000, ge=1, le=100_000)
    zipf: float = Field(1.0, ge=0.0, le=4.0, description="exponent with which some ask more often than others")
    limit: int = Field(20, ge=1, le=500)
    filtered_share: Share = Field(0.33, description="calls that want one language")


class End(_Part):
    """Ends a share of the streams that are live, drawn at random."""

    do: Literal["end"]
    at_s: float = Field(ge=0.0)
    share: float = Field(gt=0.0, le=1.0)


class Start(_Part):
    """A burst of new streams."""

    do: Literal["start"]
    at_s: float = Field(ge=0.0)
    streams: int = Field(ge=1, le=100_000)


class Raid(_Part):
    """A crowd arrives at one stream: joins and chats, evenly over ``over_s``."""

    do: Literal["raid"]
    at_s: float = Field(ge=0.0)
    place: int = Field(100, ge=1, description="by popularity; 1 is the most popular stream")
    joins: int = Field(2_000, ge=0, le=1_000_000)
    chats: int = Field(1_000, ge=0, le=1_000_000)
    over_s: float = Field(5.0, gt=0.0)


class ReloadRules(_Part):
    """Admin.ReloadRules; with --self the rules file really changes before."""

    do: Literal["reload_rules"]
    at_s: float = Field(ge=0.0)


class SwapModel(_Part):
    """Puts a new version into the model repository, complete or not at all, and waits until replies name it."""

    do: Literal["swap_model"]
    at_s: float = Field(ge=0.0)


Action = Annotated[End | Start | Raid | ReloadRules | SwapModel, Field(discriminator="do")]


class Phase(_Part):
    """A stretch of time with one kind of traffic."""

    name: str = Field(min_length=1, max_length=40)
    duration_s: float = Field(gt=0.0, le=MAX_SECONDS)
    calls_per_s: Rate = Field(description="Rank, RankBatch and CheckLive together, at the begin of the phase")
    calls_per_s_end: Rate | None = Field(None, description="at its end; the rate moves linearly. Absent: constant")
    rank_batch_share: Share = Field(0.0, description="of the calls")
    batch_viewers: int = Field(32, ge=1, le=4096, description="viewers per RankBatch")
    check_live_share: Share = Field(0.1, description="of the calls")
    events_per_s: Rate = Field(0.0, description="published beside heartbeats, starts and ends")
    events_per_s_end: Rate | None = None
    mix: dict[Kind, Annotated[float, Field(ge=0.0)]] = Field(DEFAULT_MIX, description="weight of each kind of event")
    regions: dict[str, Annotated[float, Field(ge=0.0)]] = Field(
        {"": 1.0}, description="weight of the viewers' regions; empty: unknown"
    )
    action: tuple[Action, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Phase:
        if self.rank_batch_share + self.check_live_share > 1.0:
            raise ValueError(
                f"rank_batch_share ({self.rank_batch_share}) + check_live_share ({self.check_live_share}) "
                "must not exceed 1"
            )
        for name in ("mix", "regions"):
            if not sum(getattr(self, name).values()) > 0:
                raise ValueError(f"{name}: at least one weight above 0 wanted")
        for i, action in enumerate(self.action):
            if action.at_s > self.duration_s:
                raise ValueError(
                    f"action.{i}.at_s ({action.at_s}) counts from the begin of the phase and must lie within its "
                    f"{self.duration_s} s"
                )
        return self

    @property
    def calls(self) -> Segment:
        end = self.calls_per_s if self.calls_per_s_end is None else self.calls_per_s_end
        return Segment(self.duration_s, self.calls_per_s, end)

    @property
    def events(self) -> Segment:
        end = self.events_per_s if self.events_per_s_end is None else self.events_per_s_end
        return Segment(self.duration_s, self.events_per_s, end)


class Expect(_Part):
    """What a run must hold, or `liverank load` exits with 1. Nothing shown after its end is always expected."""

    rank_p99_ms: float | None = Field(None, gt=0.0, description="failed calls count as infinitely slow")
    failed_share: Share = Field(0.01, description="of all calls, at most")


class Scenario(_Part):
    """What one file says."""

    name: str = Field(min_length=1, max_length=60)
    about: str = Field("", max_length=1000)
    seed: int = Field(7, ge=0)
    probe_every_s: float = Field(2.0, ge=0.0, description="a stream is started, seen, ended this often; 0: never")
    fleet: Fleet = Fleet()
    viewers: Viewers = Viewers()
    expect: Expect = Expect()
    phase: tuple[Phase, ...] = Field(max_length=100)

    @model_validator(mode="after")
    def _bounded(self) -> Scenario:
        if not self.phase:
            raise ValueError("phase: at least one [[phase]] wanted, got none")
        for name, found, most in (
            ("duration_s of all phases, in seconds", self.duration_s, MAX_SECONDS),
            ("calls of all phases", self.calls.count, MAX_CALLS),
            ("events of all phases", self.events.count, MAX_EVENTS),
        ):
            if found > most:
                raise ValueError(f"{name}: at most {most:,.0f} allowed, got {found:,.0f}")
        if not self.calls.count:
            raise ValueError("calls_per_s: at least one call in the whole scenario wanted, got none")
        return self

    @property
    def calls(self) -> Schedule:
        return Schedule(phase.calls for phase in self.phase)

    @property
    def events(self) -> Schedule:
        return Schedule(phase.events for phase in self.phase)

    @property
    def duration_s(self) -> float:
        return sum(phase.duration_s for phase in self.phase)

    @property
    def actions(self) -> list[tuple[float, Action]]:
        """(seconds from the begin of the run, action), in order."""
        found: list[tuple[float, Action]] = []
        begin_s = 0.0
        for phase in self.phase:
            found += [(begin_s + action.at_s, action) for action in phase.action]
            begin_s += phase.duration_s
        return sorted(found, key=lambda item: item[0])

    def scaled(self, time_scale: float = 1.0, rate_scale: float = 1.0) -> Scenario:
        """The same shape, shorter or longer, with more or less traffic.

        Raises:
            ConfigError: a scale is not positive, or the result is out of bounds.
        """
        if not (0 < time_scale <= 100 and 0 < rate_scale <= 1000):
            raise ConfigError(
                f"time scale above 0 to 100 and rate scale above 0 to 1000 allowed, got {time_scale} and {rate_scale}"
            )
        values = self.model_dump(exclude_none=True)
        for phase in values["phase"]:
            phase["duration_s"] *= time_scale
            for name in ("calls_per_s", "calls_per_s_end", "events_per_s", "events_per_s_end"):
                if name in phase:
                    phase[name] *= rate_scale
            for action in phase["action"]:
                action["at_s"] *= time_scale
                if "over_s" in action:
                    action["over_s"] *= time_scale
        return parse_scenario(values, f"{self.name}, scaled")


def load_scenario(name_or_path: str) -> Scenario:
    """A scenario by the name of a shipped one, or from a TOML file.

    Raises:
        ConfigError: there is none, it cannot be read, or a key is unknown or outside its limits.
    """
    path = FOLDER / f"{name_or_path}.toml"
    if not path.is_file():
        path = Path(name_or_path)
    if not path.is_file():
        raise ConfigError(f"scenario {name_or_path!r}: no such file, and none of {', '.join(shipped())}")
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return parse_scenario({"name": path.stem, **values}, str(path))


def parse_scenario(values: dict[str, object], where: str) -> Scenario:
    """Checks ``values``. Raises ConfigError naming each wrong key, such as ``phase.1.action.0.share``."""
    try:
        return Scenario.model_validate(values)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(str(part) for part in fault['loc']) or 'scenario'}: {fault['msg']}" for fault in error.errors()
        )
        raise ConfigError(f"{where}: {faults}") from error


def shipped() -> list[str]:
    """Names of the scenarios that come along."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))
