"""Open-loop load: requests become due at a constant rate, whatever the server does.

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

import grpc

from loadtest.bench.load import Ask, Calls, LoadReport, code_of, report


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
    """Sends requests at times begin + i / rate for ``seconds``; each waits for its time or is late.

    Args:
        ask: blocking; give it a deadline, or a dead server holds the run. Called from ``callers`` threads.
        requests: taken in turn.
        rate_per_s: arrivals per second, > 0.
        callers: requests that can be in flight at once. Further ones that are due wait, and their waiting counts.
        max_calls: bound on the whole run.
        overrun_s: what is still unsent this long after the last request was due is given up, and counted.
        clock, wait: seconds; tests pass their own.

    Raises:
        ValueError: a number is out of range.
    """
    if rate_per_s <= 0 or seconds <= 0 or callers < 1 or max_calls < 1:
        raise ValueError("rate_per_s, seconds, callers, max_calls: must be positive")
    planned = max(1, min(round(rate_per_s * seconds), max_calls))
    tickets = itertools.count()  # next() on it is atomic: one C call under the interpreter's lock
    begun_s = clock()
    gives_up_s = begun_s + planned / rate_per_s + overrun_s

    def run(_: int) -> tuple[Calls, int, float]:
        calls, unsent, worst_s = Calls([], Counter()), 0, 0.0
        while (ticket := next(tickets)) < planned:
            due_s = begun_s + ticket / rate_per_s
            now_s = clock()
            if now_s < due_s:
                wait(due_s - now_s)
            elif now_s > gives_up_s:
                unsent += 1
                continue
            worst_s = max(worst_s, clock() - due_s)
            try:
                ask(requests[ticket % len(requests)])
                calls.taken_s.append(clock() - due_s)
            except grpc.RpcError as error:
                calls.errors[code_of(error)] += 1
        return calls, unsent, worst_s

    callers = min(callers, planned)
    with ThreadPoolExecutor(callers) as pool:
        seen = list(pool.map(run, range(callers)))
    return report(
        [calls for calls, _, _ in seen],
        clock() - begun_s,
        unsent=sum(unsent for _, unsent, _ in seen),
        worst_send_delay_s=max(worst_s for _, _, worst_s in seen),
    )
