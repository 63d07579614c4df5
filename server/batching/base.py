"""What waits to be ranked, and what one turn of the engine takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")


class Priority(IntEnum):
    """Lower goes first. BATCH is what nobody looks at a screen for."""

    INTERACTIVE = 0
    BATCH = 1


class Answer(Protocol):
    """Who waits for replies: a `concurrent.futures.Future`, or what stands for a call on the wire. Thread-safe."""

    def set_running_or_notify_cancel(self) -> bool:
        """Work begins; False when nobody waits any more."""

    def cancel(self) -> bool:
        """Nobody waits any more; True if work had not begun."""

    def cancelled(self) -> bool: ...

    def done(self) -> bool: ...

    def set_result(self, result: Any, /) -> None: ...

    def set_exception(self, error: BaseException, /) -> None: ...


class Tray(Protocol):
    """Where many answers go at once: all that one batch has for one edge."""

    def fill(self, answers: Sequence[Any], replies: Sequence[Any], rows: Sequence[int]) -> None:
        """Resolves each of ``answers``, of one row each, with the reply of its row."""


@dataclass(eq=False, slots=True)
class Waiting(Generic[T]):
    """A call, or a part of a large one.

    rows: what is to be ranked, one per viewer, at least one. client: who asks; fairness is between clients.
    arrived_s, deadline_s: on the queue's clock. min_offset: not ranked before the table has applied it; the queue
    moves arrived_s to when it was.
    done: resolves to one reply per row; cancelled by a caller who stops waiting. tray: takes its reply, together with
    those of others; only for one row.
    """

    rows: Sequence[T]
    client: str
    priority: Priority
    arrived_s: float
    deadline_s: float
    min_offset: int
    done: Answer
    tray: Tray | None = None
    gone: bool = field(default=False, init=False)
    """It left the queue; owned by the queue."""

    def __len__(self) -> int:
        return len(self.rows)


@dataclass
class Turn(Generic[T]):
    """What one turn took from the queue; every future in it is running, and must be resolved.

    rank: to be ranked together, at most ``max_batch_rows`` rows. late: no time is left to rank them, so they
    are answered with less; bounded likewise. unreached: their deadline passed before their min_offset was applied.
    abandoned_rows: viewers dropped because nobody waits for them any more; their futures are cancelled.
    """

    rank: list[Waiting[T]] = field(default_factory=list)
    late: list[Waiting[T]] = field(default_factory=list)
    unreached: list[Waiting[T]] = field(default_factory=list)
    abandoned_rows: int = 0

    def taken(self) -> list[Waiting[T]]:
        """All that is to be resolved."""
        return [*self.rank, *self.late, *self.unreached]


def hand_out(items: Sequence[Waiting[T]], replies: Sequence[Any]) -> None:
    """Resolves each with its part of ``replies``, which are those of all rows, in order."""
    trays: dict[Tray, tuple[list[Answer], list[int]]] = {}
    at = 0
    for item in items:
        if item.tray is None:
            item.done.set_result(replies if len(item) == len(replies) else replies[at : at + len(item)])
        else:
            if item.tray not in trays:
                trays[item.tray] = ([], [])
            answers, rows = trays[item.tray]
            answers.append(item.done)
            rows.append(at)
        at += len(item)
    for tray, (answers, rows) in trays.items():
        tray.fill(answers, replies, rows)
