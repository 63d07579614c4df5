"""What a run leaves behind: plain values for a JSON file, from which the report is drawn."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtest.bench.load import nearest_rank
from loadtest.bench.openloop import ANSWERED, Arrivals

FORMAT = "liverank-load/1"
CURVE = (
    0.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 97.5, 99.0, 99.5, 99.9, 99.95, 99.99, 100.0,
)  # fmt: skip
"""Percentiles of the curve, as far as there are enough calls to tell them."""


def calls_record(arrivals: Arrivals, kind: NDArray[np.uint8] | None = None, wanted: int = 0) -> dict[str, Any]:
    """Totals, percentiles and seconds of one kind of call, ``kind == wanted`` (None: of all)."""
    mine = np.ones(len(arrivals.due_s), np.bool_) if kind is None else kind == wanted
    outcome, names = arrivals.outcome[mine], arrivals.outcome_names
    counts = np.bincount(outcome, minlength=len(names))
    latency_s = arrivals.latency_s[mine]
    return totals(latency_s) | {
        "errors": {name: int(n) for name, n in zip(names[1:], counts[1:], strict=True) if n},
        "seconds": seconds(arrivals.due_s[mine], latency_s, outcome != ANSWERED),
    }


def totals(latency_s: NDArray[np.float64]) -> dict[str, Any]:
    """Counts and percentiles; latency_s float64[n], NaN where there was no answer.

    ``p…_ms`` and ``curve`` count calls without an answer as infinitely slow, which JSON has no number for: null.
    """
    answered = np.sort(latency_s[~np.isnan(latency_s)])
    failed = len(latency_s) - len(answered)
    at = {q: plain_ms(nearest_rank(answered, failed, max(q, 1e-9))) for q in CURVE}
    shown = [q for q in CURVE if q in (0.0, 100.0) or len(latency_s) * (1 - q / 100) >= 1]
    return {
        "due": len(latency_s),
        "answered": len(answered),
        "failed": failed,
        **{f"p{q:g}_ms".replace("p100_ms", "max_ms"): at[q] for q in (50.0, 90.0, 99.0, 99.9, 100.0)},
        "curve": {"q": shown, "ms": [at[q] for q in shown]},
    }


def seconds(
    due_s: NDArray[np.float64], latency_s: NDArray[np.float64], failed: NDArray[np.bool_], width_s: float = 1.0
) -> dict[str, list[Any]]:
    """By the second in which calls were *due* (a stalled second shows in its own place): columns.

    Empty seconds are there, with zeros and nulls. Percentiles are null too where a failure reaches them.
    """
    if len(due_s) == 0:
        return {"t_s": [], "due": [], "failed": [], "p50_ms": [], "p99_ms": [], "max_ms": []}
    bucket = (due_s // width_s).astype(np.int64)
    n = int(bucket.max()) + 1
    order = np.argsort(bucket, kind="stable")
    borders = np.searchsorted(bucket[order], np.arange(n + 1))
    columns: dict[str, list[Any]] = {"p50_ms": [], "p99_ms": [], "max_ms": []}
    for first, end in itertools.pairwise(borders):
        mine = latency_s[order[first:end]]
        answered = np.sort(mine[~np.isnan(mine)])
        for name, q in (("p50_ms", 50.0), ("p99_ms", 99.0)):
            columns[name].append(plain_ms(nearest_rank(answered, len(mine) - len(answered), q)))
        columns["max_ms"].append(plain_ms(float(answered[-1]) if len(answered) else math.nan))
    return {
        "t_s": [round(i * width_s, 3) for i in range(n)],
        "due": np.bincount(bucket, minlength=n).tolist(),
        "failed": np.bincount(bucket[failed], minlength=n).tolist(),
        **columns,
    }


def samples(values_s: list[float]) -> dict[str, Any]:
    """Percentiles of a few samples, ms; nulls without any. NaN did not happen and is left out."""
    values = np.array(values_s, np.float64)
    ordered = np.sort(values[~np.isnan(values)])
    at = {f"{name}_ms": plain_ms(nearest_rank(ordered, 0, q)) for name, q in (("p50", 50), ("p99", 99), ("max", 100))}
    return {"n": len(ordered), **at}


def plain_ms(value_s: float) -> float | None:
    """Seconds as milliseconds that JSON can hold; null for what is infinite or unknown."""
    return round(value_s * 1000, 3) if math.isfinite(value_s) else None
