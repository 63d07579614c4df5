"""What came of a run: everything its parts saw, in one record, and whether it held what was expected."""

from __future__ import annotations

import math
import os
import platform
from typing import Any

import numpy as np

from loadtest.bench.openloop import Arrivals
from loadtest.load.actions import Actions
from loadtest.load.callers import KINDS, Callers
from loadtest.load.observe import Observer
from loadtest.load.prober import Prober
from loadtest.load.publisher import Publisher
from loadtest.load.record import FORMAT, calls_record, plain_ms, samples, seconds, totals
from loadtest.load.scenario import Scenario
from loadtest.revision import commit

MAX_CALLERS = 256
"""Calls in flight at once, at most; further ones wait, and their waiting counts."""


def outcome(
    scenario: Scenario,
    address: str,
    arrivals: Arrivals,
    callers: Callers,
    publisher: Publisher,
    prober: Prober,
    actions: Actions,
    observer: Observer,
) -> dict[str, Any]:
    """The record of a run whose parts have stopped."""
    calls = {name: calls_record(arrivals, callers.kind, i) for i, name in enumerate(KINDS) if (callers.kind == i).any()}
    seen, fresh = publisher.seen, prober.seen
    if seen.due_s:
        due_s = np.clip(seen.due_s, 0.0, math.ceil(scenario.duration_s) - 1e-6)
        latency_s = np.full(len(due_s), np.nan)
        latency_s[: len(seen.latency_s)] = seen.latency_s
        unacknowledged = len(due_s) - len(seen.latency_s)
        calls["Publish"] = totals(latency_s) | {
            "errors": {"UNACKNOWLEDGED": unacknowledged} if unacknowledged else {},
            "seconds": seconds(due_s, latency_s, np.isnan(latency_s)),
        }
    begins_s = np.cumsum([0.0, *(phase.duration_s for phase in scenario.phase)])
    late_s = arrivals.late_s[arrivals.awaited]
    record: dict[str, Any] = {
        "format": FORMAT,
        "scenario": scenario.name,
        "about": scenario.about,
        "target": address,
        "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "floor": "none of its own: a load tells what callers saw; `bench serve` has the constant reply",
        "wall_s": round(arrivals.wall_s, 2),
        "duration_s": scenario.duration_s,
        "streams": scenario.fleet.streams,
        "phases": [
            {"name": p.name, "begin_s": float(begins_s[i]), "end_s": float(begins_s[i + 1])}
            for i, p in enumerate(scenario.phase)
        ],
        "actions": actions.done,
        "calls": calls,
        "events": {
            "sent": seen.sent,
            "accepted": int(sum(seen.events)),
            "rejected": dict(seen.rejected),
            "per_s": _events_per_s(seen.due_s[: len(seen.events)], seen.events, scenario.duration_s),
        },
        "freshness": {
            "start_acked": samples(fresh.start_acked_s),
            "visible": samples(fresh.visible_s),
            "end_acked": samples(fresh.end_acked_s),
            "gone": samples(fresh.gone_s),
            "told": samples(fresh.told_s),
            "never_visible": fresh.never_visible,
            "never_told": fresh.never_told,
            "probes": {
                "t_s": [round(t, 3) for t in fresh.begun_s[: len(fresh.gone_s)]],
                "visible_ms": [plain_ms(s) for s in fresh.visible_s[: len(fresh.gone_s)]],
                "gone_ms": [plain_ms(s) for s in fresh.gone_s],
            },
        },
        "shown_after_end": len(callers.shown_after_end) + fresh.shown_after_end,
        "levels": dict(callers.levels),
        "models": dict(callers.models),
        "stages": observer.stages(),
        "process": observer.process(),
        "generator": {
            "late_p99_ms": round(float(np.percentile(late_s, 99)) * 1000, 3) if len(late_s) else None,
            "late_max_ms": round(float(late_s.max()) * 1000, 3) if len(late_s) else None,
            "callers": MAX_CALLERS,
            "no_caller_free": int((~arrivals.awaited).sum()),
        },
    }
    record["faults"] = _faults(scenario, record, publisher, prober)
    record["ok"] = not record["faults"]
    return record


def headline(record: dict[str, Any]) -> dict[str, Any]:
    """The record in one line: totals without the columns over time."""
    calls = {
        name: {key: value for key, value in entry.items() if key not in ("seconds", "curve")}
        for name, entry in record["calls"].items()
    }
    kept = (
        "scenario", "commit", "machine", "target", "wall_s", "ok", "faults", "events", "shown_after_end", "actions",
        "levels", "models", "generator", "floor",
    )  # fmt: skip
    freshness = {name: value for name, value in record["freshness"].items() if name != "probes"}
    return {"bench": "load"} | {key: record[key] for key in kept} | {"calls": calls, "freshness": freshness}


def _faults(scenario: Scenario, record: dict[str, Any], publisher: Publisher, prober: Prober) -> list[str]:
    """What did not hold, in words."""
    faults = [text for text in (publisher.seen.failure, prober.seen.failure) if text]
    if record["shown_after_end"]:
        faults.append(f"{record['shown_after_end']} streams shown after their end was acknowledged")
    if record["freshness"]["never_visible"]:
        faults.append(f"{record['freshness']['never_visible']} probes never became visible")
    faults += [f"{a['do']} at {a['at_s']:.1f} s: {a['told']}" for a in record["actions"] if not a["ok"]]
    if missing := len(scenario.actions) - len(record["actions"]):
        faults.append(f"{missing} actions were not carried out")
    calls = [entry for name, entry in record["calls"].items() if name != "Publish"]
    failed, due = sum(entry["failed"] for entry in calls), sum(entry["due"] for entry in calls)
    if failed > scenario.expect.failed_share * due:
        faults.append(f"{failed} of {due} calls failed; at most {scenario.expect.failed_share:.1%} expected")
    limit_ms = scenario.expect.rank_p99_ms
    p99_ms = record["calls"].get("Rank", {}).get("p99_ms")
    if limit_ms is not None and (p99_ms is None or p99_ms > limit_ms):
        faults.append(f"Rank p99 {'infinite' if p99_ms is None else f'{p99_ms} ms'}; at most {limit_ms} ms expected")
    return faults


def _events_per_s(due_s: list[float], events: list[int], duration_s: float) -> dict[str, list[Any]]:
    """By the second in which they were due; the last step falls on the end, and counts for the second before."""
    if not due_s:
        return {"t_s": [], "accepted": []}
    bucket = np.clip(np.array(due_s), 0.0, math.ceil(duration_s) - 1).astype(np.int64)
    counts = np.bincount(bucket, weights=np.array(events, np.float64))
    return {"t_s": list(range(len(counts))), "accepted": counts.astype(np.int64).tolist()}
