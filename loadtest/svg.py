"""Charts as inline SVG: lines, dots and bars with axes, and nothing else.

Colours are CSS classes (``c0`` … ``c5``), which the page defines for light and dark; a series is told apart by its
dashes too. Everything scales with its box; text is large enough to read when a phone shrinks it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

Value = float | None
WIDTH, HEIGHT = 540, 300
LEFT, RIGHT, TOP, BOTTOM = 66, 18, 14, 44
SIGNS = 36  # above the plot, for the names of bands and the numbers of marks: no line runs through them
_TICKS = 5
_LEAST_LOG = 1e-6


@dataclass(frozen=True)
class Series:
    """Points of one line; None in ``y`` is a gap. colour: number of the CSS class. dash: an SVG dash pattern."""

    name: str
    x: Sequence[float]
    y: Sequence[Value]
    colour: int = 0
    dash: str = ""
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """Something that happened at ``x``: a vertical line with a short label."""

    x: float
    label: str


@dataclass(frozen=True)
class Band:
    """A named stretch of the x axis."""

    begin: float
    end: float
    label: str


class Scale:
    """Values to places on the page, with round ticks."""

    def __init__(self, least: float, most: float, begin: float, end: float, log: bool = False) -> None:
        self._log = log
        self.ticks = log_ticks(least, most) if log else nice_ticks(least, most)
        least, most = self.ticks[0], self.ticks[-1]
        self._least, self._most, self._begin, self._end = least, most, begin, end

    def __call__(self, value: float) -> float:
        """Place of ``value``; what lies outside is put on the border."""
        low, high = self._least, self._most
        if self._log:
            value, low, high = math.log10(max(value, self._least)), math.log10(low), math.log10(high)
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return self._begin + share * (self._end - self._begin)


def nice_ticks(least: float, most: float) -> list[float]:
    """About five round numbers whose steps are 1, 2 or 5 times a power of ten; they reach around [least, most]."""
    if not most - least > 1e-9 * max(1.0, abs(least), abs(most)):  # all alike
        most = least + 1.0
    rough = (most - least) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(least / step + 1e-9), math.ceil(most / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(least: float, most: float) -> list[float]:
    """1, 2 and 5 times powers of ten around [least, most], both above 0; powers alone where those are too many."""
    powers = range(math.floor(math.log10(least)) - 1, math.ceil(math.log10(most)) + 2)
    steps = [round(m * 10.0**e, 12) for e in powers for m in (1, 2, 5)]
    first = max(i for i, step in enumerate(steps) if step <= least * (1 + 1e-9))
    last = min(i for i, step in enumerate(steps) if step >= most * (1 - 1e-9))
    found = steps[first : max(last, first + 1) + 1]
    if len(found) <= 2 * _TICKS:
        return found
    least, most = math.log10(found[0]), math.log10(found[-1])
    return [10.0**e for e in range(math.floor(least + 1e-9), math.ceil(most - 1e-9) + 1)]


def number(value: float) -> str:
    """A number as an axis shows it."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1000:,.0f}k"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    *,
    marks: Sequence[Mark] = (),
    bands: Sequence[Band] = (),
    x_ticks: Sequence[tuple[float, str]] | None = None,
    log_y: bool = False,
    from_zero: bool = True,
) -> str:
    """A chart as one ``<svg>``, or a sentence where there is nothing to draw.

    x_ticks: places and labels, where the axis is not plainly linear; they also bound it.
    """
    points = [(x, y) for s in series for x, y in zip(s.x, s.y, strict=True) if y is not None]
    if not points:
        return '<p class="none">Nothing was measured.</p>'
    xs, ys = [x for x, _ in points], [y for _, y in points]
    if x_ticks:
        xs = [x for x, _ in x_ticks]
    log_y = log_y and min(ys) >= _LEAST_LOG
    x_at = _PlainX(xs, x_ticks)
    least = min(ys) if log_y or not from_zero else min(0.0, min(ys))
    y_at = Scale(least, max(ys), HEIGHT - BOTTOM, TOP + (SIGNS if bands or marks else 0), log_y)
    parts = [_bands(bands, x_at), _axes(x_at, y_at, x_label, y_label), *(_series(s, x_at, y_at) for s in series)]
    return _svg(title, [*parts, _marks(marks, x_at)])


def stacked_bars(title: str, x_label: str, rows: Sequence[tuple[str, Sequence[tuple[str, float]]]]) -> str:
    """A horizontal bar per row, cut into (name, value) parts; parts of one name share a colour."""
    rows = [(name, [(part, value) for part, value in parts if value > 0]) for name, parts in rows]
    most = max((sum(value for _, value in parts) for _, parts in rows), default=0.0)
    if most <= 0:
        return '<p class="none">Nothing was measured.</p>'
    names = list(dict.fromkeys(part for _, parts in rows for part, _ in parts))
    height = TOP + 46 * len(rows) + BOTTOM
    at = Scale(0.0, most, LEFT, WIDTH - RIGHT)
    found = []
    for tick in at.ticks:
        found.append(f'<line class="grid" x1="{at(tick):.1f}" x2="{at(tick):.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        found.append(_text(at(tick), height - BOTTOM + 17, number(tick), "middle"))
    found.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 6, x_label, "middle", "label"))
    for place, (row, parts) in enumerate(rows):
        top = TOP + 46 * place + 6
        found.append(_text(LEFT - 6, top + 22, row, "end"))
        total = 0.0
        for part, value in parts:
            left, right = at(total), at(total + value)
            colour = names.index(part) % 6
            width = max(right - left, 0.5)
            found.append(
                f'<rect class="bar f{colour}" x="{left:.1f}" y="{top}" width="{width:.1f}" height="34">'
                f"<title>{escape(part)}: {value:.3f} ms</title></rect>"
            )
            total += value
    return _svg(title, found, height)


def legend(series: Sequence[Series]) -> str:
    """Names beside their lines, as HTML that wraps."""
    return _keys((s.name, _stroke(s)) for s in series)


def bar_legend(names: Sequence[str]) -> str:
    """The same for `stacked_bars`; names in its order."""
    return _keys((name, f'<rect class="bar f{i % 6}" width="26" height="10"/>') for i, name in enumerate(names))


def _stroke(s: Series) -> str:
    if s.dots:
        return f'<circle class="dot f{s.colour % 6}" cx="13" cy="5" r="4"/>'
    return f'<line class="line c{s.colour % 6}" x1="1" x2="25" y1="5" y2="5" stroke-dasharray="{s.dash}"/>'


def _keys(items: Iterable[tuple[str, str]]) -> str:
    found = (
        f'<li><svg class="key" viewBox="0 0 26 10" aria-hidden="true">{sign}</svg>{escape(name)}</li>'
        for name, sign in items
    )
    return f'<ul class="legend">{"".join(found)}</ul>'


class _PlainX:
    """The x axis: linear between its least and its most value."""

    def __init__(self, xs: Sequence[float], ticks: Sequence[tuple[float, str]] | None) -> None:
        self.least, self.most = min(xs), max(xs)
        if not self.most - self.least > 1e-9:
            self.most = self.least + 1.0
        round_ticks = [t for t in nice_ticks(self.least, self.most) if self.least <= t <= self.most]
        self.ticks = list(ticks) if ticks else [(t, number(t)) for t in round_ticks]

    def __call__(self, x: float) -> float:
        share = (min(max(x, self.least), self.most) - self.least) / (self.most - self.least)
        return LEFT + share * (WIDTH - LEFT - RIGHT)


def _series(s: Series, x_at: Callable[[float], float], y_at: Callable[[float], float]) -> str:
    runs: list[list[str]] = [[]]
    alone: list[tuple[float, float]] = []
    for x, y in zip(s.x, s.y, strict=True):
        if y is None:
            runs.append([])
            continue
        runs[-1].append(f"{x_at(x):.1f},{y_at(y):.1f}")
        alone.append((x_at(x), y_at(y)))
    if s.dots:
        return "".join(f'<circle class="dot f{s.colour % 6}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in alone)
    dash = f' stroke-dasharray="{s.dash}"' if s.dash else ""
    return "".join(
        f'<polyline class="line c{s.colour % 6}"{dash} points="{" ".join(run)}"/>'
        if len(run) > 1
        else f'<circle class="dot f{s.colour % 6}" cx="{run[0].split(",")[0]}" cy="{run[0].split(",")[1]}" r="2"/>'
        for run in runs
        if run
    )


def _axes(x_at: _PlainX, y_at: Scale, x_label: str, y_label: str) -> str:
    bottom = HEIGHT - BOTTOM
    found = []
    for tick in y_at.ticks:
        y = y_at(tick)
        found.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        found.append(_text(LEFT - 6, y + 4, number(tick), "end"))
    for place, label in x_at.ticks:
        x = x_at(place)
        anchor = "end" if x > WIDTH - RIGHT - 8 and len(label) > 3 else "middle"
        found.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        found.append(_text(x + (RIGHT if anchor == "end" else 0), bottom + 18, label, anchor))
    found.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    found.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "middle", "label"))
    middle = (TOP + bottom) / 2
    found.append(
        f'<text class="label" text-anchor="middle" transform="translate(13 {middle:.0f}) rotate(-90)">'
        f"{escape(y_label)}</text>"
    )
    return "".join(found)


def _bands(bands: Sequence[Band], x_at: _PlainX) -> str:
    """Every other one shaded, each with its name where it fits."""
    found = []
    for i, band in enumerate(bands):
        left, right = x_at(band.begin), x_at(band.end)
        if i % 2:
            found.append(
                f'<rect class="band" x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" '
                f'height="{HEIGHT - BOTTOM - TOP}"/>'
            )
        if right - left > 6.2 * len(band.label):
            found.append(_text((left + right) / 2, TOP + 12, band.label, "middle", "phase"))
    return "".join(found)


def _marks(marks: Sequence[Mark], x_at: _PlainX) -> str:
    found = []
    for mark in marks:
        x = x_at(mark.x)
        found.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP + 32}" y2="{HEIGHT - BOTTOM}"/>')
        found.append(f'<circle class="flag" cx="{x:.1f}" cy="{TOP + 24}" r="8"/>')
        found.append(_text(x, TOP + 28, mark.label, "middle", "flagged"))
    return "".join(found)


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(title: str, parts: Sequence[str], height: int = HEIGHT) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title, quote=True)}">'
        f"{''.join(parts)}</svg>"
    )
