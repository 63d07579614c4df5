"""`liverank report`: one self-contained HTML page of plots from the record of a load run, or of two side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from loadtest.load.record import FORMAT
from loadtest.report_style import STYLE
from loadtest.svg import Band, Mark, Series, Value, bar_legend, legend, line_chart, stacked_bars
from server.errors import ConfigError

Record = dict[str, Any]
RANK_STAGES = ("queue", "retrieve", "blend", "select", "verify")
_Q_TICKS = (0.0, 50.0, 90.0, 99.0, 99.9, 99.99)
_LOG_FROM = 20.0  # largest ÷ smallest latency from which an axis is logarithmic


def read_record(path: Path) -> Record:
    """A record that `liverank load --out` wrote.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    try:
        record: Any = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ConfigError(f"{path}: a record of the format {FORMAT!r} wanted, as `liverank load --out` writes it")
    return record


def page(records: Sequence[Record]) -> str:
    """The page of one run, or of two: the first is A, the second B. Needs nothing from anywhere else."""
    if not 1 <= len(records) <= 2:
        raise ValueError(f"records: one or two wanted, got {len(records)}")
    title = " against ".join(dict.fromkeys(r["scenario"] for r in records))
    charts = [
        _latency(records), _percentiles(records), _throughput(records), _events(records), _stages(records),
        _stages_over_time(records), _freshness(records), _process(records),
    ]  # fmt: skip
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>liverank load: {escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"{_head(records)}{_numbers(records)}{_actions(records)}"
        f'<div class="charts">{"".join(charts)}</div>{_reading()}</main></body></html>'
    )


def _name(records: Sequence[Record], i: int) -> str:
    """ "A " or "B " where two runs share a chart."""
    return "" if len(records) == 1 else f"{'AB'[i]} "


def _head(records: Sequence[Record]) -> str:
    found = []
    for i, r in enumerate(records):
        verdict = (
            '<p class="good">✓ held what it should</p>'
            if r["ok"]
            else f'<ul class="bad">{"".join(f"<li>✗ {escape(fault)}</li>" for fault in r["faults"])}</ul>'
        )
        models = ", ".join(r["models"]) or "no reply"
        found.append(
            f"<header><h1>{_name(records, i)}{escape(r['scenario'])}</h1><p>{escape(r['about'])}</p>{verdict}"
            f'<p class="small">{r["duration_s"]:.0f} s · {r["streams"]:,} streams · scores: {escape(models)} · '
            f"commit {escape(r['commit'] or 'unknown')} · {escape(r['machine'])} · "
            f"target {escape(r['target'])}</p></header>"
        )
    return f'<div class="heads">{"".join(found)}</div>'


def _numbers(records: Sequence[Record]) -> str:
    """All totals as a table: what the plots show can be read, and read aloud."""
    rows = []
    for call in dict.fromkeys(name for r in records for name in r["calls"]):
        for i, r in enumerate(records):
            entry = r["calls"].get(call)
            if entry is None:
                continue
            cells = "".join(
                f"<td>{_ms(entry[key])}</td>" for key in ("p50_ms", "p90_ms", "p99_ms", "p99.9_ms", "max_ms")
            )
            errors = ", ".join(f"{escape(code)} {count}" for code, count in entry["errors"].items())
            rows.append(
                f"<tr><th>{_name(records, i)}{escape(call)}</th><td>{entry['due']:,}</td><td>{entry['failed']:,}</td>"
                f"{cells}<td>{errors}</td></tr>"
            )
    for key, what in (("visible", "start acknowledged → shown"), ("gone", "end acknowledged → gone")):
        for i, r in enumerate(records):
            entry = r["freshness"][key]
            rows.append(
                f"<tr><th>{_name(records, i)}{what}</th><td>{entry['n']}</td><td></td><td>{_ms(entry['p50_ms'])}</td>"
                f"<td></td><td>{_ms(entry['p99_ms'])}</td><td></td><td>{_ms(entry['max_ms'])}</td><td></td></tr>"
            )
    shown = " · ".join(
        f"{_name(records, i)}{r['events']['accepted']:,} events accepted, "
        f"{sum(r['events']['rejected'].values()):,} refused, "
        f"<strong>{r['shown_after_end']} shown after their end</strong>, "
        f"generator late by {_ms(r['generator']['late_p99_ms'])} ms (p99) on {r['generator']['cpu_cores']} cores"
        + _waited(r)
        for i, r in enumerate(records)
    )
    heads = "".join(f"<th>{h}</th>" for h in ("", "due", "failed", "p50", "p90", "p99", "p99.9", "max", "errors"))
    return (
        '<p class="small">Milliseconds from when a call was due; ∞: calls without an answer reach this percentile.</p>'
        f'<div class="scroll"><table aria-label="Totals"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        f'<p class="small">{shown}</p>'
    )


def _waited(r: Record) -> str:
    own = r["generator"]
    if not own["no_caller_free"]:
        return ""
    return f", {own['no_caller_free']:,} calls waited because {own['callers']} others were not answered yet"


def _actions(records: Sequence[Record]) -> str:
    found = []
    for i, r in enumerate(records):
        if r["actions"]:
            items = "".join(
                f"<li>{a['at_s']:.1f} s, {escape(a['do'])}: {escape(a['told'])}{'' if a['ok'] else ' ✗'}</li>"
                for a in r["actions"]
            )
            found.append(f"<div><h2>{_name(records, i)}What happened</h2><ol>{items}</ol></div>")
    return f'<div class="heads">{"".join(found)}</div>' if found else ""


def _figure(heading: str, note: str, chart: str, key: str = "") -> str:
    return f"<figure><figcaption><h2>{heading}</h2><p>{note}</p></figcaption>{key}{chart}</figure>"


def _latency(records: Sequence[Record]) -> str:
    series = []
    for i, r in enumerate(records):
        columns = r["calls"].get("Rank", {}).get("seconds")
        if columns:
            p50 = (i, "5 4") if len(records) == 2 else (0, "")
            p99 = (i, "") if len(records) == 2 else (1, "")
            series += [
                Series(f"{_name(records, i)}p50", columns["t_s"], columns["p50_ms"], *p50),
                Series(f"{_name(records, i)}p99", columns["t_s"], columns["p99_ms"], *p99),
            ]
    log_y = _wide(series)
    chart = line_chart(
        "Rank latency over time", "time in the run, s", f"latency, ms{' (log)' if log_y else ''}", series,
        marks=_marks(records), bands=_bands(records), log_y=log_y,
    )  # fmt: skip
    note = "By the second in which calls were due. A gap: calls without an answer reach the percentile."
    return _figure("Rank latency over time", note, chart, legend(series))


def _percentiles(records: Sequence[Record]) -> str:
    series = []
    for i, r in enumerate(records):
        for place, call in enumerate(
            name for name in ("Rank", "RankBatch", "CheckLive", "Publish") if name in r["calls"]
        ):
            curve = r["calls"][call]["curve"]
            points = [(q, ms) for q, ms in zip(curve["q"], curve["ms"], strict=True) if q < 100]
            series.append(
                Series(
                    f"{_name(records, i)}{call}", [_nines(q) for q, _ in points], [ms for _, ms in points], place,
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


def _throughput(records: Sequence[Record]) -> str:
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
            Series(f"{_name(records, i)}answered", times, [due[t] - failed[t] for t in times], i, "5 4" if i else "")
        )
        if any(failed.values()):
            series.append(Series(f"{_name(records, i)}failed", times, [failed[t] for t in times], 2 + i, "2 3"))
    chart = line_chart(
        "Calls per second", "time in the run, s", "calls due in a second", series,
        marks=_marks(records), bands=_bands(records),
    )  # fmt: skip
    return _figure(
        "Calls per second", "All reading calls, by the second in which they were due.", chart, legend(series)
    )


def _events(records: Sequence[Record]) -> str:
    series = [
        Series(
            f"{_name(records, i)}accepted", r["events"]["per_s"]["t_s"], r["events"]["per_s"]["accepted"], i,
            "5 4" if i else "",
        )
        for i, r in enumerate(records)
    ]  # fmt: skip
    chart = line_chart(
        "Events per second", "time in the run, s", "events per second", series,
        marks=_marks(records), bands=_bands(records),
    )  # fmt: skip
    return _figure("Events per second", "Durable and applied, heartbeats included.", chart, legend(series))


def _stages(records: Sequence[Record]) -> str:
    rows: list[tuple[str, list[tuple[str, float]]]] = []
    missing = []
    for i, r in enumerate(records):
        whole = r["stages"].get("whole_ms")
        if whole is None:
            missing.append(f"{_name(records, i)}not known: {r['stages']['missing']}")
            continue
        parts = [(stage, whole[stage]) for stage in RANK_STAGES if whole.get(stage) is not None]
        if whole.get("rank") is not None:
            parts.append(("rest: decode, encode, hand over", max(0.0, whole["rank"] - sum(ms for _, ms in parts))))
        rows.append((_name(records, i).strip() or "Rank", parts))
    said = "".join(f'<p class="none">{escape(text)}</p>' for text in missing)
    names = list(dict.fromkeys(part for _, parts in rows for part, ms in parts if ms > 0))
    chart = stacked_bars("Where the time of a Rank goes", "mean time on the server, ms", rows) if rows else ""
    note = "Mean wall time from the server's own metrics: request decoded to reply encoded."
    return _figure("Where the time goes", note, said + chart, bar_legend(names))


def _stages_over_time(records: Sequence[Record]) -> str:
    series = []
    for i, r in enumerate(records):
        for place, stage in enumerate(("rank", "apply", "tick", "model")):
            means = r["stages"].get("mean_ms", {}).get(stage)
            if means:
                name = {"rank": "Rank", "apply": "batch of events applied", "tick": "tick", "model": "model call"}[
                    stage
                ]
                series.append(
                    Series(f"{_name(records, i)}{name}", r["stages"]["t_s"], means, place, "5 4" if i else "")
                )
    chart = line_chart(
        "The server's work over time", "time in the run, s", "mean time, ms", series,
        marks=_marks(records), bands=_bands(records),
    )  # fmt: skip
    return _figure("The server's work over time", "Means between two readings of its metrics.", chart, legend(series))


def _freshness(records: Sequence[Record]) -> str:
    series = []
    for i, r in enumerate(records):
        probes = r["freshness"]["probes"]
        series += [
            Series(f"{_name(records, i)}start → shown", probes["t_s"], probes["visible_ms"], 2 * i, dots=True),
            Series(f"{_name(records, i)}end → gone", probes["t_s"], probes["gone_ms"], 2 * i + 1, dots=True),
        ]
    chart = line_chart(
        "From event to reply", "time in the run, s", "from its acknowledgement, ms", series,
        marks=_marks(records), bands=_bands(records),
    )  # fmt: skip
    note = "Probes: a stream starts, is looked for until a reply has it, ends, and is looked for again."
    return _figure("From event to reply", note, chart, legend(series))


def _process(records: Sequence[Record]) -> str:
    series = [
        Series(
            f"{_name(records, i)}resident memory", r["process"]["t_s"], r["process"]["rss_mb"], i, "5 4" if i else ""
        )
        for i, r in enumerate(records)
        if "t_s" in r["process"]
    ]
    missing = [
        f"{_name(records, i)}not known: {r['process']['missing']}"
        for i, r in enumerate(records)
        if "missing" in r["process"]
    ]
    said = "".join(f'<p class="none">{escape(text)}</p>' for text in missing)
    chart = line_chart("Server memory", "time in the run, s", "MB", series, from_zero=False) if series else ""
    cores = " · ".join(
        f"{_name(records, i)}CPU: {sum(r['process']['cpu_cores']) / len(r['process']['cpu_cores']):.2f} cores"
        for i, r in enumerate(records)
        if "t_s" in r["process"]
    )
    return _figure(
        "Server memory", cores or "Its process, where it runs on this machine.", said + chart, legend(series)
    )


def _reading() -> str:
    return (
        '<section class="small"><h2>How to read this</h2><p>Load is open loop: calls become due on a schedule whatever '
        "the server does, and latency counts from then. A stalled second therefore shows as a second of slow calls. "
        "The generator's own lateness is part of every latency; where it is not small against the figures, the "
        "generator was the limit. It usually shares the machine with the server. Compare runs of the same scenario on "
        "the same machine only.</p></section>"
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


def _ms(value: Value) -> str:
    return "∞" if value is None else f"{value:.1f}" if value >= 0.1 or value <= 0 else f"{value:.3f}"
