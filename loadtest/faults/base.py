"""What a fault scenario is: it breaks something on a stage, mends it, and tells what it saw.

Adding one: a function with ``@scenario(...)`` in a module that `matrix.py` imports. Tests and the bench run it
in the same way: under traffic whose whole history is judged afterwards, unless ``traffic=False``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loadtest.faults.stage import Stage


class CannotPlay(Exception):
    """This machine cannot play a scenario; the message says why."""


@dataclass(frozen=True)
class Seen:
    """What a scenario saw itself.

    degrade_s: from the fault to the first answer that was not as usual; None: there was none. recover_s: from
    the end of the fault to usual answers again. disclosed: every unusual answer said so, by its status or its
    degradation and reasons (or a metric, see note). lost, shown_wrongly: beyond what traffic's history shows.
    """

    degrade_s: float | None
    recover_s: float | None
    disclosed: bool
    note: str = ""
    lost: int = 0
    shown_wrongly: int = 0


@dataclass(frozen=True)
class Outcome:
    """A row of the matrix. lost: acknowledged events and notices of ends; shown_wrongly: dead streams."""

    name: str
    lost: int
    shown_wrongly: int
    degrade_s: float | None
    recover_s: float | None
    disclosed: bool
    note: str
    details: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return self.lost == 0 and self.shown_wrongly == 0 and self.disclosed

    def row(self) -> dict[str, Any]:
        """Plain values for a line of JSON."""
        return {key: value for key, value in asdict(self).items() if key != "details"}


@dataclass(frozen=True)
class Scenario:
    """needs_triton: it breaks the model server; skipped, and said, where there is none."""

    name: str
    run: Callable[[Stage], Seen]
    needs_triton: bool
    traffic: bool


SCENARIOS: dict[str, Scenario] = {}


def scenario(
    name: str, needs_triton: bool = False, traffic: bool = True
) -> Callable[[Callable[[Stage], Seen]], Callable[[Stage], Seen]]:
    """Adds a function to the matrix under ``name``."""

    def add(run: Callable[[Stage], Seen]) -> Callable[[Stage], Seen]:
        SCENARIOS[name] = Scenario(name, run, needs_triton, traffic)
        return run

    return add
