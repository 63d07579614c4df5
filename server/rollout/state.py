"""Where a model's rollout stands, and which steps are allowed from there. Pure: no I/O, no clock.

   push        shadow      canary 1 → 10 → 100 %      promote
∅ ─────▶ pushed ─────▶ shadow ─────▶ canary ─────▶ the candidate serves; the one before can come back
             ╰────────────┴────────────┴─── rollback ──▶ ∅, as it was
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from typing import Any

from server.errors import Refused

STEPS = (1.0, 10.0, 100.0)
"""Per cent of viewers that a canary serves, one after the other."""
MAX_VERSION = (1 << 31) - 1


class Stage(StrEnum):
    """What the candidate does."""

    NONE = "none"
    PUSHED = "pushed"  # loaded, warm, asked by nobody
    SHADOW = "shadow"  # scores a share of the traffic, serves nobody
    CANARY = "canary"  # serves a share of the viewers


@dataclass(frozen=True)
class Rollout:
    """One model's versions; 0 stands for none.

    serving: 0 means that nobody decided yet, so the newest version answers. previous: what `rollback` goes back to
    when there is no candidate. percent: of the traffic that the candidate scores (shadow) or serves (canary).
    hold_ms: a canary climbs to its next step by itself after so long without fault; 0: only when told. since_ms: when
    the present step began, Unix.
    """

    serving: int = 0
    previous: int = 0
    candidate: int = 0
    stage: Stage = Stage.NONE
    percent: float = 0.0
    hold_ms: int = 0
    since_ms: int = 0

    @property
    def held(self) -> tuple[int, ...]:
        """Versions that must be loaded."""
        return tuple(sorted({self.serving, self.previous, self.candidate} - {0})) if self.serving else ()

    def pinned(self, serving: int) -> Rollout:
        """From here on the version in use is named, and no newer one takes over by itself."""
        return self if self.serving else replace(self, serving=serving)

    def may_push(self, version: int) -> None:
        """Raises Refused."""
        if not 1 <= version <= MAX_VERSION:
            raise Refused(f"version: 1 to {MAX_VERSION} wanted, got {version}")
        if version == self.serving:
            raise Refused(f"version {version} serves already")
        if self.stage in (Stage.SHADOW, Stage.CANARY):
            raise Refused(f"version {self.candidate} is in {self.stage}: promote it or roll it back first")

    def pushed(self, version: int, now_ms: int) -> Rollout:
        """It is loaded and warm. Raises Refused."""
        self.may_push(version)
        return replace(self, candidate=version, stage=Stage.PUSHED, percent=0.0, hold_ms=0, since_ms=now_ms)

    def shadowed(self, version: int, percent: float, now_ms: int) -> Rollout:
        """It scores ``percent`` of the traffic; nobody sees it. Raises Refused."""
        self._is_candidate(version)
        if self.stage is Stage.CANARY:
            raise Refused(f"version {version} serves viewers already: roll it back first")
        if not 0.0 < percent <= 100.0:
            raise Refused(f"percent: above 0, at most 100 wanted, got {percent:g}")
        return replace(self, stage=Stage.SHADOW, percent=percent, hold_ms=0, since_ms=now_ms)

    def canaried(self, version: int, percent: float, hold_ms: int, now_ms: int) -> Rollout:
        """It serves ``percent`` of the viewers: one of STEPS, at most the next one up, any one down. Raises Refused."""
        self._is_candidate(version)
        if percent not in STEPS:
            raise Refused(f"percent: one of {', '.join(f'{step:g}' for step in STEPS)} wanted, got {percent:g}")
        now = self.percent if self.stage is Stage.CANARY else 0.0
        highest = next((step for step in STEPS if step > now), STEPS[-1])
        if percent > highest:
            raise Refused(f"percent: {highest:g} comes before {percent:g}; {now:g} is served now")
        if hold_ms < 0:
            raise Refused(f"hold_ms: not negative wanted, got {hold_ms}")
        return replace(self, stage=Stage.CANARY, percent=percent, hold_ms=hold_ms, since_ms=now_ms)

    def climbs(self, now_ms: int) -> float:
        """The step that is due now, 0 when none is."""
        if self.stage is not Stage.CANARY or not self.hold_ms or now_ms - self.since_ms < self.hold_ms:
            return 0.0
        return next((step for step in STEPS if step > self.percent), 0.0)

    def promoted(self, version: int, force: bool, now_ms: int) -> Rollout:
        """It serves everybody. Raises Refused."""
        self._is_candidate(version)
        if not force and (self.stage is not Stage.CANARY or self.percent < 100.0):
            raise Refused(f"version {version} is in {self._told()}; a canary of 100 % comes first (or force)")
        return Rollout(serving=version, previous=self.serving, since_ms=now_ms)

    def rolled_back(self, now_ms: int) -> Rollout:
        """Without the candidate; without one, back to the version before. Raises Refused: nothing to go back to."""
        if self.candidate:
            return replace(
                self, candidate=0, stage=Stage.NONE, percent=0.0, hold_ms=0, since_ms=now_ms
            )  # `previous` stays: it is what the version in use replaced
        if not self.previous:
            raise Refused("there is no candidate, and no version before this one to go back to")
        return Rollout(serving=self.previous, since_ms=now_ms)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the file."""
        return {**asdict(self), "stage": str(self.stage)}

    @classmethod
    def from_dict(cls, values: Any) -> Rollout:
        """The reverse. Raises ValueError, which says what is wrong."""
        if not isinstance(values, dict) or set(values) != {field.name for field in fields(cls)}:
            raise ValueError(f"keys {', '.join(field.name for field in fields(cls))} wanted")
        numbers = {name: value for name, value in values.items() if name != "stage"}
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers.values()):
            raise ValueError("numbers wanted")
        versions = [values[name] for name in ("serving", "previous", "candidate")]
        if not all(isinstance(version, int) and 0 <= version <= MAX_VERSION for version in versions):
            raise ValueError(f"versions of 0 to {MAX_VERSION} wanted")
        found = cls(**{**values, "stage": Stage(values["stage"])})
        if bool(found.candidate) != (found.stage is not Stage.NONE) or (found.candidate and not found.serving):
            raise ValueError(f"candidate {found.candidate} does not fit stage {found.stage}, serving {found.serving}")
        if not 0.0 <= found.percent <= 100.0:
            raise ValueError(f"percent {found.percent} is not one")
        return found

    def _is_candidate(self, version: int) -> None:
        if not self.candidate:
            raise Refused(f"version {version} was not pushed")
        if version != self.candidate:
            raise Refused(f"version {version} is not the candidate; {self.candidate} is")

    def _told(self) -> str:
        return f"{self.stage} at {self.percent:g} %" if self.percent else str(self.stage)
