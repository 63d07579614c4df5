"""Servers under the same load one after the other: a server's turn, and what many turns come to."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from loadtest.bench.contestants import Contestant
from loadtest.bench.load import Ask, LoadReport, closed_loop

WARM_UP_S = 0.25
CPU_RESOLUTION_S = 0.01  # of /proc; less cannot be told from nothing


@dataclass(frozen=True)
class Turn:
    """One server's share of a round. CPU in ms per reply (for RankBatch: per slate)."""

    load: LoadReport
    cpu_ms: float
    client_cpu_ms: float


def take_turn(
    contestant: Contestant, ask: Ask, requests: list[bytes], callers: int, seconds: float, slates: int = 1
) -> Turn:
    """Closed loop of ``callers`` for ``seconds``, after a warm-up. Raises RuntimeError if no call was answered."""
    with contestant.awake():
        closed_loop(ask, requests, callers, min(WARM_UP_S, seconds))
        used_s, own_s = contestant.cpu_s, time.process_time()
        load = closed_loop(ask, requests, callers, seconds)
        used_s, own_s = contestant.cpu_s - used_s, time.process_time() - own_s
    if not load.answered:
        raise RuntimeError(f"{contestant.name}: no call was answered: {load.errors}")
    replies = load.answered * slates
    return Turn(load, max(used_s, CPU_RESOLUTION_S) * 1000 / replies, own_s * 1000 / replies)


def summary(turns: list[Turn]) -> dict[str, Any]:
    """Medians over the turns, as they stand in JSON."""
    return {
        "rps": round(median(t.load.per_s for t in turns)),
        "cpu_ms_per_reply": round(median(t.cpu_ms for t in turns), 4),
        "p50_ms": round(median(t.load.p50_ms for t in turns), 2),
        "p99_ms": round(median(t.load.p99_ms for t in turns), 2),
        "client_cpu_ms_per_reply": round(median(t.client_cpu_ms for t in turns), 4),
        "errors": errors_of(t.load for t in turns),
    }


def cpu_ratio(dividend: list[Turn], divisor: list[Turn]) -> float:
    """Median over rounds of CPU per reply ÷ CPU per reply."""
    return round(median(a.cpu_ms / b.cpu_ms for a, b in zip(dividend, divisor, strict=True)), 3)


def errors_of(loads: Iterable[LoadReport]) -> dict[str, int]:
    """Status code → calls that ended with it."""
    found: dict[str, int] = {}
    for load in loads:
        for code, count in load.errors.items():
            found[code] = found.get(code, 0) + count
    return found
