"""The doctor itself: the contract of a check, what it does with all of them, how findings are told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from server.doctor import files, libraries, run
from server.doctor.base import Context, Finding, Status, fail, ok
from server.doctor.run import as_report, as_table, can_serve, examine, unknown_variables
from tests.app import put_current_model
from tests.doctor import context


def test_settings_in_order_have_only_good_findings(tmp_path: Path) -> None:
    put_current_model(tmp_path / "models")
    findings = examine(context(tmp_path))
    assert can_serve(findings), [f for f in findings if f.status is Status.FAIL]
    assert not (tmp_path / "events.sqlite3").exists(), "a doctor makes no files"


# --- contract and run ---------------------------------------------------------------------------


def test_a_finding_that_is_not_ok_must_have_a_mend() -> None:
    with pytest.raises(ValueError, match="needs a mend"):
        Finding("area.thing", Status.WARN, "odd")


def test_a_check_that_breaks_is_a_finding_and_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_current_model(tmp_path / "models")

    def declared(context: Context) -> Iterator[Finding]:
        raise AttributeError("a bug in a check")

    declared.__module__ = files.__name__

    checks = tuple(declared if check is files.declared else check for check in run.WITH_LIBRARIES)
    monkeypatch.setattr(run, "WITH_LIBRARIES", checks)
    findings = examine(context(tmp_path))
    broken = next(f for f in findings if f.check == "files.declared")
    assert broken.status is Status.FAIL and "AttributeError" in broken.found
    assert "ports.grpc" in {f.check for f in findings}


def test_checks_that_load_libraries_wait_until_the_libraries_are_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(libraries.IMPORTS, "no_such_module_of_liverank", "nothing")
    findings = examine(context(tmp_path))
    told = {f.check: f for f in findings}
    assert told["libraries.no_such_module_of_liverank"].status is Status.FAIL
    assert "not checked" in told["model.model"].found
    assert not can_serve(findings)


def test_the_table_shows_each_mend_and_the_verdict() -> None:
    text = as_table([ok("a.b", "fine"), fail("c.d", "broken", "glue it")])
    assert text.splitlines()[0] == "ok    a.b  fine"
    assert "FAIL  c.d  broken" in text and "→ glue it" in text
    assert text.endswith("cannot serve as configured: c.d")
    assert as_table([ok("a.b", "fine")]).endswith("can serve")


def test_the_report_counts_and_lists() -> None:
    report = as_report([ok("a.b", "fine"), fail("c.d", "broken", "glue it")])
    assert report["can_serve"] is False
    assert report["counts"] == {"ok": 1, "warn": 0, "fail": 1}
    assert report["findings"] == [
        {"check": "a.b", "status": "ok", "found": "fine", "mend": ""},
        {"check": "c.d", "status": "fail", "found": "broken", "mend": "glue it"},
    ]


def test_a_variable_that_no_setting_reads_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unknown_variables() == []
    monkeypatch.setenv("LIVERANK_SERVE__PORT", "0")
    monkeypatch.setenv("LIVERANK_SCORNG__MODE", "triton")
    (stray,) = unknown_variables()
    assert stray.status is Status.WARN and "LIVERANK_SCORNG__MODE" in stray.found and "SERVE__PORT" not in stray.found
