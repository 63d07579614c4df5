"""Load: what a driver reports, and the closed-loop driver. The open-loop one is in `openloop.py`.

Closed loop: c callers, each waits for its reply before it asks again. Right for throughput and for CPU per
reply at a given concurrency. Its latencies flatter: while a server stalls nobody asks, so a stall counts once
per caller instead of once per request that should have been sent (coordinated omission).
"""

from __future__ import annotations

import gc
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import grpc
import numpy as np
from numpy.typing import NDArray

Ask = Callable[[bytes], object]
"""Sends one serialised request and waits for the reply. Raises grpc.RpcError."""


@dataclass(frozen=True)
class Calls:
    """What one caller saw: seconds per answered call, status codes of the others."""

    taken_s: list[float]
    errors: Counter[str]


@dataclass(frozen=True)
class LoadReport:
    """What came of a run.

    latencies_s float64[answered], ascending; failed calls are in ``errors`` (by status code) and not in the
    latencies. unsent: planned but not sent when time was up. worst_send_delay_s: how late the generator itself
    began a call; part of that call's latency, and not small when its callers did not suffice.
    The percentiles are those of answered calls; `promised_ms` counts the others too.
    """

    latencies_s: NDArray[np.float64]
    errors: dict[str, int]
    wall_s: float
    unsent: int = 0
    worst_send_delay_s: float = 0.0

    @property
    def answered(self) -> int:
        return len(self.latencies_s)

    @property
    def per_s(self) -> float:
        """Replies per second achieved."""
        return self.answered / self.wall_s

    @cached_property
    def p50_ms(self) -> float:
        return self.percentile_ms(50)

    @cached_property
    def p99_ms(self) -> float:
        return self.percentile_ms(99)

    def percentile_ms(self, q: float) -> float:
        """Latency that ``q`` per cent of the answered calls did not exceed, ms; NaN without any."""
        return float(np.percentile(self.latencies_s, q)) * 1000 if self.answered else float("nan")

    @property
    def failed(self) -> int:
        """Calls without an answer: failed or never sent."""
        return sum(self.errors.values()) + self.unsent

    def promised_ms(self, q: float) -> float:
        """Latency within which ``q`` per cent of *all* calls were answered, ms; failed ones never were (infinity).

        This is what a promise to callers is held against: a server that refuses its slow calls has a fine p99.
        """
        return nearest_rank(self.latencies_s, self.failed, q) * 1000

    def summary(self) -> dict[str, object]:
        """Plain values for a line of JSON; latencies null when nothing was answered."""
        quantiles = {"p50_ms": 50.0, "p90_ms": 90.0, "p99_ms": 99.0, "max_ms": 100.0}
        return {
            "answered": self.answered,
            "achieved_per_s": round(self.per_s, 1),
            **{k: round(self.percentile_ms(q), 2) if self.answered else None for k, q in quantiles.items()},
            "errors": self.errors,
            "unsent": self.unsent,
            "worst_send_delay_ms": round(self.worst_send_delay_s * 1000, 2),
        }


@contextmanager
def without_pauses() -> Iterator[None]:
    """Inside, the garbage collector leaves out what there is already: visiting all of it stops every caller for up to
    a tenth of a second, which would be taken for the server's."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def closed_loop(
    ask: Ask,
    requests: list[bytes],
    callers: int,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> LoadReport:
    """``callers`` threads ask for ``seconds``, each as soon as it has its answer."""
    begun_s = clock()
    ends_at_s = begun_s + seconds

    def run(number: int) -> Calls:
        calls, i = Calls([], Counter()), number
        while (sent_s := clock()) < ends_at_s:
            try:
                ask(requests[i % len(requests)])
                calls.taken_s.append(clock() - sent_s)
            except grpc.RpcError as error:
                calls.errors[code_of(error)] += 1
            i += callers
        return calls

    with without_pauses(), ThreadPoolExecutor(callers) as pool:
        calls = list(pool.map(run, range(callers)))
    return report(calls, clock() - begun_s)


def report(calls: list[Calls], wall_s: float, unsent: int = 0, worst_send_delay_s: float = 0.0) -> LoadReport:
    """Joins what the callers saw."""
    errors = sum((c.errors for c in calls), Counter())
    latencies_s = np.sort(np.array([s for c in calls for s in c.taken_s], np.float64))
    return LoadReport(latencies_s, dict(errors), wall_s, unsent, worst_send_delay_s)


def nearest_rank(ascending: NDArray[np.float64], failed: int, q: float) -> float:
    """The smallest value that ``q`` per cent of all do not exceed, ``failed`` further ones being infinite.

    Args:
        ascending: float64[n]. With no values at all the answer is NaN.
        q: above 0, at most 100.
    """
    total = len(ascending) + failed
    if total == 0:
        return float("nan")
    place = max(0, math.ceil(round(q / 100 * total, 9)) - 1)
    return float(ascending[place]) if place < len(ascending) else math.inf


def code_of(error: grpc.RpcError) -> str:
    """Name of the status code."""
    code = getattr(error, "code", None)
    return str(code().name) if callable(code) else "UNKNOWN"
