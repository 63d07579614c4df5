"""The check of what is installed: deploy/dependencies.py."""

from __future__ import annotations

import importlib.util
import subprocess
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

FILE = Path(__file__).resolve().parents[2] / "deploy/dependencies.py"
spec = importlib.util.spec_from_file_location("dependencies", FILE)
assert spec is not None and spec.loader is not None
dependencies = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dependencies)


def package(version: str, *needs: str, **fields: str) -> Message:
    """Metadata of a distribution."""
    about = Message()
    about["Version"] = version
    for need in needs:
        about["Requires-Dist"] = need
    for name, value in fields.items():
        about[name.replace("_", "-")] = value
    return about


def walk(installed: dict[str, Message], *wanted: str) -> Any:
    return dependencies.walk([Requirement(line) for line in wanted], installed.get)


def test_what_needs_need_is_found_whatever_asks_for_it() -> None:
    installed = {
        "a": package("1.0", "b[fast]>=2", "never; python_version < '3'"),
        "b": package("2.1", "c; extra == 'fast'", "missing; extra == 'slow'"),
        "c": package("3.0", "a"),
    }
    found, faults = walk(installed, "A>=1")
    assert sorted(found) == ["a", "b", "c"] and faults == []


def test_a_version_outside_a_range_and_a_package_that_is_not_there_are_faults_of_who_asks() -> None:
    installed = {"a": package("1.0", "b>=2", "gone"), "b": package("1.9")}
    _, faults = walk(installed, "a<1", "a")
    assert faults == [
        "a asks for b>=2, installed is 1.9",
        "a asks for gone, which is not installed",
        "pyproject.toml asks for a<1, installed is 1.0",
    ]


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"License_Expression": "MIT"}, True),
        ({"License_Expression": "BSD-3-Clause AND (Apache-2.0 WITH LLVM-exception) AND Zlib"}, True),
        ({"License_Expression": "GPL-3.0-only OR MIT"}, True),
        ({"License_Expression": "MIT AND GPL-3.0-only"}, False),
        ({"License_Expression": "AGPL-3.0-or-later"}, False),
        ({"License": "3-Clause BSD License"}, True),
        ({"License": "MITIGATED Source Licence"}, False),
        ({"Classifier": "License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)"}, True),
        ({"Classifier": "License :: Other/Proprietary License", "License": "MIT"}, False),
        ({}, False),
    ],
)
def test_only_licences_that_may_be_used_pass(fields: dict[str, str], allowed: bool) -> None:
    about = package("1", **fields)
    assert bool(list(dependencies.licence_faults({"p": about}))) is not allowed


def test_everything_that_is_installed_here_is_in_order() -> None:
    project = dependencies.tomllib.loads(dependencies.PYPROJECT.read_text())["project"]
    found, faults = dependencies.walk(dependencies.declared(project, ["cpu"]), dependencies.find_installed)
    assert faults == [] and {"numpy", "grpcio", "onnxruntime", "faiss-cpu"} <= set(found)
    assert list(dependencies.licence_faults(found)) == []


def run_with(monkeypatch: pytest.MonkeyPatch, told: str | None, complaint: str = "") -> list[str]:
    """Makes pip-audit write this, or nothing; returns the list of the commands that were run."""
    commands: list[str] = []

    def run(command: list[Any], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(" ".join(map(str, command)))
        if told is not None:
            Path(command[-1]).write_text(told)
        return subprocess.CompletedProcess(command, 1, "", complaint)

    monkeypatch.setattr(dependencies.subprocess, "run", run)
    monkeypatch.setattr(dependencies, "find_installed", lambda name: package("1", License="MIT"))
    monkeypatch.setattr(dependencies, "declared", lambda project, extras: [Requirement("p")])
    return commands


def test_without_an_advisory_database_the_check_is_said_not_to_have_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_with(monkeypatch, None, "long\nFailed to resolve")
    assert dependencies.main([]) == 0
    said = capsys.readouterr().out
    assert (
        "NOT RUN, hence not passed" in said and "Failed to resolve" in said and "known vulnerabilities: 0" not in said
    )


def test_a_known_vulnerability_fails_the_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_with(monkeypatch, '{"dependencies": [{"name": "p", "version": "1", "vulns": [{"id": "CVE-1"}]}]}')
    assert dependencies.main([]) == 1 and "p 1: CVE-1" in capsys.readouterr().out


def test_packages_that_the_database_skipped_are_no_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = run_with(monkeypatch, '{"dependencies": [{"name": "p", "skip_reason": "unknown"}]}')
    assert dependencies.main([]) == 0 and "NOT RUN" in capsys.readouterr().out
    assert "osv" in commands[0], "the package index is not asked"
