"""Open-loop load: requests become due on a schedule, whatever the server does.

Latency counts from the moment a request was due, not from when a caller was free to send it. So a server that
stalls for a second at 1,000 requests per second shows a thousand slow replies, as its users would see it
(coordinated omission; Tene, "How NOT to measure latency", 2013; wrk2 does the same).
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from loadtest.bench.load import Ask, LoadReport, code_of, without_pauses

ANSWERED, UNSENT = 0, 1
_LOOKS_UP_EVERY_S = 0.5  # a sleeping caller notices that the run was abandoned


@dataclass(frozen=True)
class Arrivals:
    """What became of every request, in the order in which they were due; n of them.

    due_s float64[n] from the begin of the run. late_s float64[n]: how late the call began; NaN where it did not.
    awaited bool[n]: a caller was free when the call became due, so that its lateness is the generator's own; else all
    callers waited for replies. latency_s float64[n]: due to answered; NaN where there was no answer.
    outcome int16[n] into outcome_names, of which the first two are ANSWERED and UNSENT, the others status codes.
    """

    due_s: NDArray[np.float64]
    late_s: NDArray[np.float64]
    awaited: NDArray[np.bool_]
    latency_s: NDArray[np.float64]
    outcome: NDArray[np.int16]
    outcome_names: tuple[str, ...]
    wall_s: float

    def report(self) -> LoadReport:
        """The run as a whole."""
        counts = np.bincount(self.outcome, minlength=len(self.outcome_names))
        begun = ~np.isnan(self.late_s)
        return LoadReport(
            latencies_s=np.sort(self.latency_s[self.outcome == ANSWERED]),
            errors={name: int(n) for name, n in list(zip(self.outcome_names, counts, strict=True))[2:] if n},
            wall_s=self.wall_s,
            unsent=int(counts[UNSENT]),
            worst_send_delay_s=float(self.late_s[begun].max()) if begun.any() else 0.0,
        )


def open_loop(
    ask: Ask,
    requests: list[bytes],
    rate_per_s: float,
    seconds: float,
    *,
    callers: int = 128,
    max_calls: int = 1_000_000,
    overrun_s: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], None] = time.sleep,
) -> LoadReport:
    """`open_loop_at` a constant rate: request i is due at i / rate. ``requests`` are taken in turn.

    Raises:
        ValueError: a number is out of range.
    """
    if rate_per_s <= 0 or seconds <= 0 or callers < 1 or max_calls < 1:
        raise ValueError("rate_per_s, seconds, callers, max_calls: must be positive")
    due_s = np.arange(max(1, min(round(rate_per_s * seconds), max_calls))) / rate_per_s
    return open_loop_at(
        lambda number: ask(requests[number % len(requests)]),
        due_s,
        callers=callers,
        overrun_s=overrun_s + 1 / rate_per_s,
        clock=clock,
        wait=wait,
    ).report()


def open_loop_at(
    call: Callable[[int], object],
    due_s: NDArray[np.float64],
    *,
    callers: int = 128,
    overrun_s: float = 10.0,
    begun_s: float | None = None,
    look: Callable[[int, Any], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], None] = time.sleep,
) -> Arrivals:
    """Makes call i at ``due_s[i]``; each waits for its time or is late.

    Args:
        call: gets the number; blocks until it is answered or raises grpc.RpcError. Give it a deadline, or a dead
            server holds the run. Called from ``callers`` threads.
        due_s: float64[n], ascending, not negative; n > 0. Bounds the run in time and count.
        callers: calls that can be in flight at once. Further ones that are due wait, and their waiting counts.
        overrun_s: what is still unsent this long after the last one was due is given up, and counted.
        begun_s: on ``clock``, when the schedule begins; None: now.
        look: gets the number and what ``call`` returned, after the latency was taken.
        clock, wait: seconds; tests pass their own.

    Raises:
        ValueError: ``due_s`` is empty or does not ascend. Whatever else ``call`` raises.
    """
    planned = len(due_s)
    if planned == 0 or due_s[0] < 0 or np.any(np.diff(due_s) < 0):
        raise ValueError("due_s: at least one time, ascending, not negative")
    if callers < 1:
        raise ValueError("callers: must be positive")
    late_s, latency_s = np.full(planned, np.nan), np.full(planned, np.nan)
    awaited = np.zeros(planned, np.bool_)
    failures: list[tuple[int, str]] = []
    unsent: list[int] = []
    tickets = itertools.count()  # next() on it is atomic: one C call under the interpreter's lock
    abandoned = False
    begun_s = clock() if begun_s is None else begun_s
    times_s = (due_s + begun_s).tolist()
    gives_up_s = times_s[-1] + overrun_s

    def run(_: int) -> None:
        nonlocal abandoned
        try:
            while (ticket := next(tickets)) < planned and not abandoned:
                at_s = times_s[ticket]
                if clock() > max(gives_up_s, at_s):
                    unsent.append(ticket)
                    continue
                awaited[ticket] = clock() <= at_s
                while (left_s := at_s - clock()) > 0 and not abandoned:
                    wait(min(left_s, _LOOKS_UP_EVERY_S))
                late_s[ticket] = max(0.0, clock() - at_s)
                try:
                    answer = call(ticket)
                except grpc.RpcError as error:
                    failures.append((ticket, code_of(error)))
                    continue
                latency_s[ticket] = clock() - at_s
                if look is not None:
                    look(ticket, answer)
        except BaseException:
            abandoned = True
            raise

    callers = min(callers, planned)
    with without_pauses(), ThreadPoolExecutor(callers) as pool:
        try:
            for done in [pool.submit(run, i) for i in range(callers)]:
                done.result()
        except BaseException:  # the user's interrupt too: callers stop before their next call
            abandoned = True
            raise
    names = ("ANSWERED", "UNSENT", *sorted(Counter(code for _, code in failures)))
    outcome = np.full(planned, ANSWERED, np.int16)
    outcome[unsent] = UNSENT
    for ticket, code in failures:
        outcome[ticket] = names.index(code)
    return Arrivals(due_s, late_s, awaited, latency_s, outcome, names, clock() - begun_s)
