"""The report page: well-formed, in need of nothing from elsewhere, and honest about what is missing."""

from __future__ import annotations

import copy
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.load.record import FORMAT, samples, seconds, totals
from loadtest.report import page, read_record
from loadtest.svg import Mark, Series, line_chart, log_ticks, nice_ticks, number, stacked_bars
from server.__main__ import main
from server.errors import ConfigError

VOID = {"meta", "link", "br", "img", "input", "hr"}


def calls(n: int, latency_s: float, failed: int = 0, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    due_s = np.sort(rng.random(n) * 20)
    taken_s = rng.gamma(2.0, latency_s / 2, n)
    taken_s[:failed] = math.nan
    return totals(taken_s) | {
        "errors": {"UNAVAILABLE": failed} if failed else {},
        "seconds": seconds(due_s, taken_s, np.isnan(taken_s)),
    }


def record(name: str = "spike", failed: int = 0, **keys: Any) -> dict[str, Any]:
    return {
        "format": FORMAT, "scenario": name, "about": "Five < six & 'more'.", "target": "127.0.0.1:1",
        "commit": "abc", "machine": "x86_64, 2 cores", "wall_s": 20.0, "duration_s": 20.0, "streams": 500,
        "phases": [
            {"name": "before", "begin_s": 0.0, "end_s": 10.0}, {"name": "after", "begin_s": 10.0, "end_s": 20.0},
        ],
        "actions": [{"at_s": 12.0, "do": "end", "told": "30 streams ended <b>", "ok": True}],
        "calls": {"Rank": calls(2_000, 0.003, failed), "CheckLive": calls(200, 0.001), "Publish": calls(200, 0.004)},
        "events": {"sent": 90, "accepted": 90, "rejected": {}, "per_s": {"t_s": [0, 1], "accepted": [40, 50]}},
        "freshness": {
            **{key: samples([0.05, 0.09]) for key in ("start_acked", "visible", "end_acked", "gone", "told")},
            "never_visible": 0, "never_told": 0,
            "probes": {"t_s": [1.0, 3.0], "visible_ms": [50.0, None], "gone_ms": [1.0, 2.0]},
        },
        "shown_after_end": 0, "levels": {"NONE": 2_000}, "models": {"trendiness/1": 2_000},
        "stages": {
            "t_s": [1.0, 3.0],
            "mean_ms": {"rank": [1.0, 1.2], "apply": [2.0, None], "retrieve": [0.5, 0.5]},
            "whole_ms": {"rank": 1.1, "apply": 2.0, "retrieve": 0.5, "queue": 0.1, "model": None},
        },
        "process": {"t_s": [1.0, 3.0], "cpu_cores": [0.5, 0.6], "rss_mb": [200.0, 201.0]},
        "generator": {"late_p99_ms": 0.4, "late_max_ms": 2.0, "cpu_cores": 0.1, "callers": 256, "no_caller_free": 0},
        "faults": [], "ok": True, **keys,
    }  # fmt: skip


class Checker(HTMLParser):
    """Every element is closed by its own end tag, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.charts: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "iframe", "object"), tag
        for name, _ in attrs:
            assert name not in ("src", "href", "srcset") and not name.startswith("on"), name
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.mark.parametrize("records", [[record()], [record(), record("steady")], [record(failed=150)]])
def test_a_page_is_well_formed_and_needs_nothing_from_elsewhere(records: list[dict[str, Any]]) -> None:
    text = page(records)
    assert text.startswith("<!doctype html>")
    Checker(text)
    for needle in ("http://", "https://", "//", "url(", "@import", "<script", "<link", "<img"):
        assert needle not in text, needle
    charts = re.findall(r'<svg class="chart".*?</svg>', text)
    assert len(charts) == 8
    for chart in charts:
        root = ElementTree.fromstring(chart)
        assert root.get("role") == "img" and root.get("aria-label")
        assert not re.search(r"nan|inf|None", chart)
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_what_a_record_says_is_text_and_never_markup() -> None:
    text = page([record(faults=["Rank <script>alert(1)</script>"], ok=False, target='"><b>')])
    assert "<script>" not in text and "<b>" not in text and "Five &lt; six &amp; &#x27;more&#x27;." in text
    assert "✗ Rank &lt;script&gt;" in text


def test_failed_calls_are_told_in_the_table_and_leave_gaps() -> None:
    one = record(failed=150)
    words = " ".join(Checker(page([one])).words)
    assert "UNAVAILABLE 150" in words and "∞" in words
    assert "∞" not in " ".join(Checker(page([record()])).words).replace("∞: calls", "")


def test_a_comparison_names_both_runs_in_every_chart() -> None:
    words = " ".join(Checker(page([record(), record("steady")])).words)
    for name in ("A spike", "B steady", "A Rank", "B Rank", "A p99", "B p99", "A answered", "B answered"):
        assert name in words, name


def test_what_was_not_measured_is_said() -> None:
    bare = record(stages={"missing": "no metrics address was given"}, process={"missing": "not ours"})
    bare["calls"].pop("Rank")
    bare["events"]["per_s"] = {"t_s": [], "accepted": []}
    words = " ".join(Checker(page([bare])).words)
    assert "not known: no metrics address was given" in words and "not known: not ours" in words
    assert words.count("Nothing was measured.") >= 2


def test_the_command_writes_a_page_from_one_record_or_two(tmp_path: Path) -> None:
    one, two, out = tmp_path / "1.json", tmp_path / "2.json", tmp_path / "out.html"
    one.write_text(json.dumps(record()))
    two.write_text(json.dumps(record("steady")))
    assert main(["report", str(one), "-o", str(out)]) == 0 and out.read_text() == page([record()])
    assert main(["report", str(one), str(two), "-o", str(out)]) == 0
    assert out.read_text() == page([read_record(one), read_record(two)])


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "other/1"}', ""])
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        read_record(path)
    assert main(["report", str(path), "-o", str(tmp_path / "out.html")]) == 2


@given(st.floats(-1e6, 1e6), st.floats(0.0, 1e6))
def test_ticks_are_few_round_numbers_around_what_they_show(least: float, span: float) -> None:
    ticks = nice_ticks(least, least + span)
    assert 2 <= len(ticks) <= 8 and sorted(set(ticks)) == ticks
    slack = 1e-6 * max(1.0, abs(least), span)
    assert ticks[0] <= least + slack and ticks[-1] >= least + span - slack


@given(st.floats(1e-3, 1e5), st.floats(1.0, 1e6))
def test_logarithmic_ticks_enclose_what_they_show(least: float, factor: float) -> None:
    ticks = log_ticks(least, least * factor)
    assert 2 <= len(ticks) <= 12 and ticks[0] <= least * 1.001 and ticks[-1] >= least * factor * 0.999


values = st.one_of(st.none(), st.floats(-1e5, 1e5))


@given(st.lists(st.tuples(st.floats(0, 1e4), values), max_size=20), st.booleans())
def test_no_point_lies_outside_of_its_chart(points: list[tuple[float, float | None]], log_y: bool) -> None:
    one = Series("one", [x for x, _ in points], [y for _, y in points])
    chart = line_chart("t", "x", "y", [one], marks=[Mark(3.0, "1")], log_y=log_y)
    for place in re.findall(r'points="([^"]*)"', chart):
        for pair in place.split():
            x, y = (float(v) for v in pair.split(","))
            assert 0 <= x <= 540 and 0 <= y <= 300
    assert chart.startswith("<svg" if any(y is not None for _, y in points) else "<p")


def test_a_gap_splits_a_line() -> None:
    chart = line_chart("t", "x", "y", [Series("one", [0, 1, 2, 3, 4], [1, 2, None, 2, 1])])
    assert chart.count("<polyline") == 2


def test_bars_are_as_long_as_their_values() -> None:
    chart = stacked_bars("t", "ms", [("A", [("one", 1.0), ("two", 3.0)]), ("B", [("two", 2.0)])])
    widths = [float(w) for w in re.findall(r'<rect [^>]*width="([\d.]+)"', chart)]
    assert widths[1] / widths[0] == pytest.approx(3.0, rel=0.01) and widths[2] / widths[0] == pytest.approx(
        2.0, rel=0.01
    )


def test_numbers_on_axes_are_short() -> None:
    assert [number(v) for v in (0.0, 0.25, 7.0, 1500.0, 20_000.0)] == ["0", "0.25", "7", "1,500", "20k"]


def test_at_most_two_runs_are_compared() -> None:
    with pytest.raises(ValueError, match="one or two"):
        page([copy.deepcopy(record()) for _ in range(3)])
