"""`liverank report`: one self-contained HTML page of plots from the record of a load run, or of two side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from loadtest.load.record import FORMAT
from loadtest.report_charts import CHARTS, Record, run_name
from loadtest.report_style import STYLE
from loadtest.svg import Value
from server.errors import ConfigError


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
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>liverank load: {escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"{_head(records)}{_numbers(records)}{_actions(records)}"
        f'<div class="charts">{"".join(chart(records) for chart in CHARTS)}</div>{_reading()}</main></body></html>'
    )


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
            f"<header><h1>{run_name(records, i)}{escape(r['scenario'])}</h1><p>{escape(r['about'])}</p>{verdict}"
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
                f"<tr><th>{run_name(records, i)}{escape(call)}</th><td>{entry['due']:,}</td>"
                f"<td>{entry['failed']:,}</td>{cells}<td>{errors}</td></tr>"
            )
    for key, what in (("visible", "start acknowledged → shown"), ("gone", "end acknowledged → gone")):
        for i, r in enumerate(records):
            entry = r["freshness"][key]
            rows.append(
                f"<tr><th>{run_name(records, i)}{what}</th><td>{entry['n']}</td><td></td>"
                f"<td>{_ms(entry['p50_ms'])}</td><td></td><td>{_ms(entry['p99_ms'])}</td><td></td>"
                f"<td>{_ms(entry['max_ms'])}</td><td></td></tr>"
            )
    shown = " · ".join(
        f"{run_name(records, i)}{r['events']['accepted']:,} events accepted, "
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
            found.append(f"<div><h2>{run_name(records, i)}What happened</h2><ol>{items}</ol></div>")
    return f'<div class="heads">{"".join(found)}</div>' if found else ""


def _reading() -> str:
    return (
        '<section class="small"><h2>How to read this</h2><p>Load is open loop: calls become due on a schedule whatever '
        "the server does, and latency counts from then. A stalled second therefore shows as a second of slow calls. "
        "The generator's own lateness is part of every latency; where it is not small against the figures, the "
        "generator was the limit. It usually shares the machine with the server. Compare runs of the same scenario on "
        "the same machine only.</p></section>"
    )


def _ms(value: Value) -> str:
    return "∞" if value is None else f"{value:.1f}" if value >= 0.1 or value <= 0 else f"{value:.3f}"
