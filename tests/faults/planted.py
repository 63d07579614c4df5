"""A server with bugs planted into it on demand: the liveness checker must find each of them. Only for tests.

plant NAME       one of BUGS
plant none       the server is as it should be again
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np

from kernels import fence, verify
from loadtest.faults.launcher import COMMANDS, main
from server.applier import Applier, PublishResult
from server.engine import Engine
from server.live import table as table_module
from server.log.commit import CommitPath, Committed
from server.log.sqlite import SqliteLog
from server.ranking import pipeline

DELAY_S = 0.15


def skip_the_last_check() -> None:
    """Slates are what the tick's candidate lists held."""

    def blind(argument: Any) -> Any:
        if not isinstance(argument, verify.RowColumns):
            return argument
        return argument._replace(
            state=np.full_like(argument.state, fence.LIVE),
            lease_expires_ms=np.full_like(argument.lease_expires_ms, 1 << 60),
            rule_bits=np.zeros_like(argument.rule_bits),
        )

    def unchecked(*arguments: Any) -> Any:
        return verify.verify_slates(*map(blind, arguments))

    pipeline.verify_slates = unchecked  # type: ignore[assignment]


def renew_on_any_heartbeat() -> None:
    """A heartbeat renews whether or not media moved."""
    right = fence.fence_events

    def renewing(columns: Any, slots: Any, kinds: Any, *rest: Any, **limits: Any) -> Any:
        beating = slots[(kinds == fence.HEARTBEAT) & (slots >= 0)]
        columns.media_sequence[beating] = -2
        return right(columns, slots, kinds, *rest, **limits)

    table_module.fence.fence_events = renewing


def acknowledge_before_applying() -> None:
    """The log's word is passed on at once; the table follows a moment later."""
    # (time.monotonic() when due, group), oldest first; engine thread only.
    waiting: list[tuple[float, list[Committed]]] = []

    def hasty(self: Applier, group: list[Committed], commit: CommitPath) -> None:
        for committed in group:
            codes = np.zeros(len(committed.submission.batch.events), np.uint8)
            committed.submission.done.set_result(PublishResult(committed.record.offset, codes))
        waiting.append((time.monotonic() + DELAY_S, group))

    def tick(self: Engine) -> None:
        while waiting and waiting[0][0] <= time.monotonic():
            _, group = waiting.pop(0)
            again = [replace(c, submission=replace(c.submission, done=Future())) for c in group]
            RIGHT_APPLY(self.applier, again, self._commit)
        RIGHT_TICK(self)

    Applier.apply = hasty  # type: ignore[method-assign]
    Engine._tick = tick  # type: ignore[method-assign]


def ignore_the_epoch() -> None:
    """A start or heartbeat of an epoch that is over counts for the stream all the same."""
    right = fence.fence_events

    def forgetful(columns: Any, slots: Any, kinds: Any, epochs: Any, *rest: Any, **limits: Any) -> Any:
        known = slots >= 0
        late = known & (kinds == fence.STARTED) & (epochs <= columns.epoch[np.maximum(slots, 0)])
        columns.state[slots[late]] = fence.FREE
        return right(columns, slots, kinds, epochs, *rest, **limits)

    table_module.fence.fence_events = forgetful


def acknowledge_before_it_is_durable() -> None:
    """Nothing reaches the disk, and nobody is told."""
    SqliteLog.append = lambda self, records: None  # type: ignore[method-assign]


BUGS: dict[str, Callable[[], None]] = {
    "skip the last check": skip_the_last_check,
    "renew on any heartbeat": renew_on_any_heartbeat,
    "acknowledge before applying": acknowledge_before_applying,
    "ignore the epoch": ignore_the_epoch,
    "acknowledge before it is durable": acknowledge_before_it_is_durable,  # only a kill shows it, and must follow
}
RIGHT_TICK, RIGHT_APPLY, RIGHT_APPEND = Engine._tick, Applier.apply, SqliteLog.append
RIGHT_FENCE, RIGHT_VERIFY = fence.fence_events, verify.verify_slates


def plant(name: str) -> None:
    """Mends everything, then plants ``name``."""
    Engine._tick, Applier.apply = RIGHT_TICK, RIGHT_APPLY  # type: ignore[method-assign]
    SqliteLog.append = RIGHT_APPEND  # type: ignore[method-assign]
    table_module.fence.fence_events = RIGHT_FENCE
    pipeline.verify_slates = RIGHT_VERIFY
    if name != "none":
        BUGS[name]()


if __name__ == "__main__":
    sys.exit(main({**COMMANDS, "plant": plant}))
