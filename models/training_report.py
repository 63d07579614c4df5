"""One self-contained HTML page about a training: curves, calibration, segments, the effect of places, the record."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from loadtest.report_style import STYLE
from loadtest.svg import Series, legend, line_chart

Curve = Sequence[tuple[float, float, int]]
"""See `models.evaluation_ranker.calibration_curve`."""


def write_report(
    path: Path,
    experiment: Mapping[str, Any],
    *,
    calibration: Mapping[str, Curve] | None = None,
    segments: Sequence[Mapping[str, Any]] = (),
    places: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Writes the page; folders are made.

    Args:
        experiment: of `models.experiment.record`.
        calibration: by head. segments: of `segment_table`. places: by name, how likely place 1, 2, … is looked at.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(experiment, calibration=calibration, segments=segments, places=places))


def page(
    experiment: Mapping[str, Any],
    *,
    calibration: Mapping[str, Curve] | None = None,
    segments: Sequence[Mapping[str, Any]] = (),
    places: Mapping[str, Sequence[float]] | None = None,
) -> str:
    """See `write_report`."""
    figures = [_course(experiment["epochs"])]
    figures += [_calibration(head, curve) for head, curve in (calibration or {}).items()]
    if places:
        figures.append(_places(places))
    facts = " · ".join(
        f"{key.replace('_', ' ')} {escape(str(experiment[key]))}"
        for key in ("data_hash", "feature_schema", "metrics_hash", "parameters", "best_epoch", "commit")
    )
    name = escape(str(experiment["model"]))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>liverank: training of {name}</title><style>{STYLE}</style></head><body><main>"
        f'<header><h1>{name}</h1><p class="small">{facts}</p></header>'
        f'<div class="charts">{"".join(figures)}</div>{_segments(segments)}'
        f"<section><h2>Metrics</h2>{_table(_flat(experiment['metrics']))}</section>"
        f"<section><h2>Settings</h2><pre>{escape(json.dumps(experiment['settings'], indent=1))}</pre></section>"
        "</main></body></html>"
    )


def _course(epochs: Sequence[Mapping[str, float]]) -> str:
    numbers = list(range(1, len(epochs) + 1))
    series = [
        Series("learned from", numbers, [_finite(e["train_loss"]) for e in epochs], 0, dots=len(epochs) == 1),
        Series("held out", numbers, [_finite(e["held_out_loss"]) for e in epochs], 1, "6 4", dots=len(epochs) == 1),
    ]
    chart = line_chart("Loss by epoch", "epoch", "loss", series, from_zero=False)
    return _figure(
        "Loss by epoch", chart + legend(series), "The weights of the epoch with the least held-out loss are kept."
    )


def _calibration(head: str, curve: Curve) -> str:
    most = max((max(p, y) for p, y, _ in curve), default=0.0) or 1e-6
    series = [
        Series("as it came", [p for p, _, _ in curve], [y for _, y, _ in curve], 0),
        Series("perfect", [0.0, most], [0.0, most], 5, "4 4"),
    ]
    chart = line_chart(f"Calibration of {head}", "probability", "share that did", series)
    return _figure(f"Calibration: {head}", chart + legend(series), "Each point is a tenth of the rows.")


def _places(places: Mapping[str, Sequence[float]]) -> str:
    dashes = ("", "6 4", "2 3")
    series = [
        Series(name, list(range(1, len(values) + 1)), list(values), i, dashes[i % 3])
        for i, (name, values) in enumerate(places.items())
    ]
    chart = line_chart("Effect of places", "place", "looked at, of place 1", series)
    return _figure("Effect of places", chart + legend(series), "Learned from clicks; neutral when serving.")


def _figure(title: str, body: str, note: str) -> str:
    return f"<figure><h2>{escape(title)}</h2>{body}<figcaption><p>{escape(note)}</p></figcaption></figure>"


def _segments(segments: Sequence[Mapping[str, Any]]) -> str:
    if not segments:
        return ""
    heads = [key for key in segments[0] if key not in ("segment", "rows")]
    top = "".join(f'<th colspan="3">{escape(head)}</th>' for head in heads)
    second = "<th>rate</th><th>predicted</th><th>AUC</th>" * len(heads)
    body = "".join(
        f"<tr><th>{escape(str(s['segment']))}</th><td>{s['rows']:,}</td>"
        + "".join(f"<td>{_number(s[head][key])}</td>" for head in heads for key in ("rate", "mean", "auc"))
        + "</tr>"
        for s in segments
    )
    return (
        f'<section><h2>By segment</h2><div class="scroll"><table><thead><tr><th></th><th></th>{top}</tr>'
        f"<tr><th>segment</th><th>rows</th>{second}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def _flat(metrics: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Names with dots, and values; an interval is one value."""
    if isinstance(metrics, Mapping):
        if {"value", "low", "high"} <= set(metrics):
            low, high = _number(metrics["low"]), _number(metrics["high"])
            return [(prefix, f"{_number(metrics['value'])} [{low}, {high}]")]
        return [row for key, value in metrics.items() for row in _flat(value, f"{prefix}.{key}" if prefix else key)]
    return [(prefix, _number(metrics) if isinstance(metrics, int | float) else str(metrics))]


def _table(rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<div class="scroll"><table><tbody>{body}</tbody></table></div>'


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
