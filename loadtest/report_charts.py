"""The charts of the report: one function each, from the records of one run or two to a figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from loadtest.svg import Band, Mark, Series, bar_legend, legend, line_chart, stacked_bars

Record = dict[str, Any]
RANK_STAGES = ("queue", "retrieve", "blend", "select", "verify")
_Q_TICKS = (0.0, 50.0, 90.0, 99.0, 99.9, 99.99)
_LOG_FROM = 20.0  # largest ÷ smallest latency from which an axis is logarithmic


def run_name(records: Sequence[Record], i: int) -> str:
    """ "A " or "B " where two runs share a chart."""
    return "" if len(records) == 1 else f"{'AB'[i]} "


def _figure(heading: str, note: str, chart: str, key: str = "") -> str:
    return f"<figure><figcaption><h2>{heading}</h2><p>{note}</p></figcaption>{key}{chart}</figure>"


def latency(records: Sequence[Record]) -> str:
    """Rank's p50 and p99 by second."""
    series = []
    for i, r in enumerate(records):
        columns = r["calls"].get("Rank", {}).get("seconds")
        if columns:
            p50 = (i, "5 4") if len(records) == 2 else (0, "")
            p99 = (i, "") if len(records) == 2 else (1, "")
            series += [
                Series(f"{run_name(records, i)}p50", columns["t_s"], columns["p50_ms"], *p50),
                Series(f"{run_name(records, i)}p99", columns["t_s"], columns["p99_ms"], *p99),
            ]
    log_y = _wide(series)
    chart = line_chart(
        "Rank latency over time", "time in the run, s", f"latency, ms{' (log)' if log_y else ''}", series,
        marks=_marks(records), bands=_bands(records), log_y=log_y,
    )  # fmt: skip
    note = "By the second in which calls were due. A gap: calls without an answer reach the percentile."
    return _figure("Rank latency over time", note, chart, legend(series))


def percentiles(records: Sequence[Record]) -> str:
    """Every kind of call by percentile."""
    series = []
    for i, r in enumerate(records):
        for place, call in enumerate(
            name for name in ("Rank", "RankBatch", "CheckLive", "Publish") if name in r["calls"]
        ):
            curve = r["calls"][call]["curve"]
            points = [(q, ms) for q, ms in zip(curve["q"], curve["ms"], strict=True) if q < 100]
            series.append(
                Series(
                    f"{run_name(records, i)}{call}", [_nines(q) for q, _ in points], [ms for _, ms in points], place,
                    "5 4" if i else "",
                )
            )  # fmt: skip
    most = max((x for s in series for x in s.x), default=1.0)
    ticks = [(_nines(q), f"{q:g}") for q in _Q_TICKS if _nines(q) <= most + 1e-9]
    ticks = [*ticks, (most, "")] if most > ticks[-1][0] else ticks
    log_y = _wide(series)
    label = f"latency, ms{' (log)' if log_y else ''}"
    chart = line_chart("Latency by percentile", "percentile of all calls, %", label, series, x_ticks=ticks, log_y=log_y)
    note = "How slow the slowest are. A line ends where there are too few calls to tell, or where calls failed."
    return _figure("Latency by percentile", note, chart, legend(series))


def throughput(records: Sequence[Record]) -> str:
    """Calls answered and failed by second."""
    series = []
    for i, r in enumerate(records):
        due: dict[float, int] = {}
        failed: dict[float, int] = {}
        for call, entry in r["calls"].items():
            if call != "Publish":
                for t_s, d, f in zip(*(entry["seconds"][key] for key in ("t_s", "due", "failed")), strict=True):
                    due[t_s], failed[t_s] = due.get(t_s, 0) + d, failed.get(t_s, 0) + f
        times = sorted(due)
        series.append(
            Series(f"{run_name(records, i)}answered", times, [due[t] - failed[t] for t in times], i, "5 4" if i else "")
        )
        if any(failed.values()):
            series.append(Series(f"{run_name(records, i)}failed", times, [failed[t] for t in times], 2 + i, "2 3"))
    chart = line_chart(
        "Calls per second", "time in the run, s", "calls due in a second", series,
        marks=_marks(records), bands=_bands(records),
    )  # fmt: skip
    return _figure(
        "Calls per second", "All reading calls, by the second in which they were due.", chart, legend(series)
    )


def events(records: Sequence[Record]) -> str:
    """Events accepted by second."""
    series = [
        Series(
            f"{run_name(records, i)}accepted", r["events"]["per_s"]["t_s"], r["events"]["per_s"]["accepted"], i,
            "5 4" if i else "",
        )
        for i, r in enumerate(records)
    ]  # fmt: skip
    chart = line_chart(
        "Events per second", "time in the run, s", "events per second", series,
        marks=_marks(records), bands=_bands(records),
    )  # fmt: skip
    return _figure("Events per second", "Durable and applied, heartbeats included.", chart, legend(series))


def stages(records: Sequence[Record]) -> str:
    """A bar per run: where a Rank spends its time on the server."""
    rows: list[tuple[str, list[tuple[str, float]]]] = []
    missing = []
    for i, r in enumerate(records):
        whole = r["stages"].get("whole_ms")
        if whole is None:
            missing.append(f"{run_name(records, i)}not known: {r['stages']['missing']}")
            continue
        parts = [(stage, whole[stage]) for stage in RANK_STAGES if whole.get(stage) is not None]
        if whole.get("rank") is not None:
            parts.append(("rest: decode, encode, hand over", max(0.0, whole["rank"] - sum(ms for _, ms in parts))))
        rows.append((run_name(records, i).strip() or "Rank", parts))
    said = "".join(f'<p class="none">{escape(text)}</p>' for text in missing)
    names = list(dict.fromkeys(part for _, parts in rows for part, ms in parts if ms > 0))
    chart = stacked_bars("Where the time of a Rank goes", "mean time on the server, ms", rows) if rows else ""
    note = "Mean wall time from the server's own metrics: request decoded to reply encoded."
    return _figure("Where the time goes", note, said + chart, bar_legend(names))


def stages_over_time(records: Sequence[Record]) -> str:
    """Mean times of the server's work between two readings."""
    series = []
    for i, r in enumerate(records):
        for place, stage in enumerate(("rank", "apply", "tick", "model")):
            means = r["stages"].get("mean_ms", {}).get(stage)
            if means:
                name = {"rank": "Rank", "apply": "batch of events applied", "tick": "tick", "model": "model call"}[
                    stage
                ]
                series.append(
                    Series(f"{run_name(records, i)}{name}", r["stages"]["t_s"], means, place, "5 4" if i else "")
                )
    chart = line_chart(
        "The server's work over time", "time in the run, s", "mean time, ms", series,
        marks=_marks(records), bands=_bands(records),
    )  # fmt: skip
    return _figure("The server's work over time", "Means between two readings of its metrics.", chart, legend(series))


def freshness(records: Sequence[Record]) -> str:
    """Probes: from acknowledged to seen."""
    series = []
    for i, r in enumerate(records):
        probes = r["freshness"]["probes"]
        series += [
            Series(f"{run_name(records, i)}start → shown", probes["t_s"], probes["visible_ms"], 2 * i, dots=True),
            Series(f"{run_name(records, i)}end → gone", probes["t_s"], probes["gone_ms"], 2 * i + 1, dots=True),
        ]
    chart = line_chart(
        "From event to reply", "time in the run, s", "from its acknowledgement, ms", series,
        marks=_marks(records), bands=_bands(records),
    )  # fmt: skip
    note = "Probes: a stream starts, is looked for until a reply has it, ends, and is looked for again."
    return _figure("From event to reply", note, chart, legend(series))


def process(records: Sequence[Record]) -> str:
    """Resident memory."""
    series = [
        Series(
            f"{run_name(records, i)}resident memory", r["process"]["t_s"], r["process"]["rss_mb"], i, "5 4" if i else ""
        )
        for i, r in enumerate(records)
        if "t_s" in r["process"]
    ]
    missing = [
        f"{run_name(records, i)}not known: {r['process']['missing']}"
        for i, r in enumerate(records)
        if "missing" in r["process"]
    ]
    said = "".join(f'<p class="none">{escape(text)}</p>' for text in missing)
    chart = line_chart("Server memory", "time in the run, s", "MB", series, from_zero=False) if series else ""
    cores = " · ".join(
        f"{run_name(records, i)}CPU: {sum(r['process']['cpu_cores']) / len(r['process']['cpu_cores']):.2f} cores"
        for i, r in enumerate(records)
        if "t_s" in r["process"]
    )
    return _figure(
        "Server memory", cores or "Its process, where it runs on this machine.", said + chart, legend(series)
    )


def _marks(records: Sequence[Record]) -> list[Mark]:
    """Numbered like the list of what happened; of one run only, or nobody could tell them apart."""
    return [Mark(a["at_s"], str(n)) for n, a in enumerate(records[0]["actions"], 1)] if len(records) == 1 else []


def _bands(records: Sequence[Record]) -> list[Band]:
    phases = [[Band(p["begin_s"], p["end_s"], p["name"]) for p in r["phases"]] for r in records]
    return phases[0] if all(p == phases[0] for p in phases) else []


def _nines(q: float) -> float:
    """Place of a percentile on an axis that gives every further nine the same room."""
    return -math.log10(1 - q / 100)


def _wide(series: Sequence[Series]) -> bool:
    values = [y for s in series for y in s.y if y]
    return bool(values) and min(values) > 0 and max(values) / min(values) > _LOG_FROM


CHARTS: tuple[Callable[[Sequence[Record]], str], ...] = (
    latency, percentiles, throughput, events, stages, stages_over_time, freshness, process,
)  # fmt: skip
"""In the order of the page."""
