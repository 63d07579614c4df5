"""What a check is: a function from a `Context` to findings. It changes nothing and takes no lock."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from server.clock import Clock
from server.config import Settings

if TYPE_CHECKING:
    from server.live.features import FeatureSet


class Status(StrEnum):
    """ok: as it should be. warn: serves, but worse than it could. fail: cannot serve as configured."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """What was found about one thing.

    check: "area.thing", the same in every run. mend: what to do about it; never empty unless ok.
    """

    check: str
    status: Status
    found: str
    mend: str = ""

    def __post_init__(self) -> None:
        if self.status is not Status.OK and not self.mend:
            raise ValueError(f"{self.check}: a finding that is not ok needs a mend")


def ok(check: str, found: str) -> Finding:
    """A finding with nothing to mend."""
    return Finding(check, Status.OK, found)


def warn(check: str, found: str, mend: str) -> Finding:
    """The server would serve, but worse than it could."""
    return Finding(check, Status.WARN, found, mend)


def fail(check: str, found: str, mend: str) -> Finding:
    """The server would not start, or not do what its settings say."""
    return Finding(check, Status.FAIL, found, mend)


@dataclass(frozen=True)
class Context:
    """What the checks look at.

    clock: the one a server would use. root: where the machine's own files (/proc, /sys, /dev) are looked up.
    """

    settings: Settings
    clock: Clock
    root: Path = Path("/")

    @cached_property
    def features(self) -> FeatureSet:
        """The declared features. Raises ConfigError or UnicodeDecodeError when the file is wrong."""
        # Imported here: it needs NumPy and Numba, and the doctor must speak without them.
        from server.live.features import FeatureSet

        return FeatureSet.load(self.settings.table.features_file)

    @cached_property
    def neighbour(self) -> str | None:
        """Health that a liverank already on the configured gRPC port answers, such as "SERVING"; None: no such."""
        from server.doctor.health import ask_health

        serve = self.settings.serve
        return ask_health(serve.host, serve.port) if serve.port else None


Check = Callable[[Context], Iterable[Finding]]
