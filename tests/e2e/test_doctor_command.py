"""`liverank doctor` as a command: exit status, table, JSON; beside a running server, Triton, broken libraries."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from liverank.v1 import ingest_pb2, ingest_pb2_grpc

from loadtest.processes import ROOT, running_server, start_server, to_toml
from server.doctor import model
from server.doctor.base import Finding
from tests.app import FEATURES, put_current_model
from tests.doctor import context, the_failure
from tests.events import event, started
from tests.triton_server import put_model, running_triton, small_net

Report = dict[str, Any]


def doctor(
    folder: Path,
    settings: dict[str, dict[str, Any]] | None = None,
    before: Callable[[], None] | None = None,
    **environment: str,
) -> tuple[int, Report]:
    """Exit status and JSON of a run in ``folder`` with these settings; a traceback fails the test."""
    (folder / "doctor.toml").write_text(to_toml(settings or {}))
    # The repository comes last, as when installed: a folder in ``environment``'s PYTHONPATH is found first.
    path = os.pathsep.join(filter(None, [environment.pop("PYTHONPATH", ""), str(ROOT)]))
    done = subprocess.run(
        [sys.executable, "-m", "server", "doctor", "--config", "doctor.toml", "--json"],
        cwd=folder,
        env={**os.environ, **environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=before,
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    *table, last = done.stdout.splitlines()
    report: Report = json.loads(last)
    assert table[-1].startswith("can serve" if report["can_serve"] else "cannot serve as configured: ")
    assert all(finding["mend"] for finding in report["findings"] if finding["status"] != "ok")
    for finding in report["findings"]:
        assert any(line.split()[:2] == [shown(finding["status"]), finding["check"]] for line in table), finding
    return done.returncode, report


def shown(status: str) -> str:
    return "FAIL" if status == "fail" else status


def failed(report: Report) -> dict[str, Report]:
    return {f["check"]: f for f in report["findings"] if f["status"] == "fail"}


def told(report: Report, check: str) -> str:
    return next(f["found"] for f in report["findings"] if f["check"] == check)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def one(made: ingest_pb2.Event) -> ingest_pb2.EventBatch:
    return ingest_pb2.EventBatch(producer_id="p", events=[made])


FREE = {"serve": {"port": 0, "metrics_port": 0}}


def test_the_defaults_can_serve_and_nothing_is_left_behind(tmp_path: Path) -> None:
    code, report = doctor(tmp_path, FREE)
    assert (code, report["can_serve"], failed(report)) == (0, True, {})
    assert report["doctor"] == "liverank"
    assert set(report["counts"]) == {"ok", "warn", "fail"}
    assert sum(report["counts"].values()) == len(report["findings"])
    assert {tuple(f) for f in report["findings"]} == {("check", "status", "found", "mend")}
    areas = {f["check"].partition(".")[0] for f in report["findings"]}
    assert areas == {
        "settings",
        "machine",
        "device",
        "libraries",
        "files",
        "memory",
        "clock",
        "ports",
        "security",
        "admission",
        "model",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["doctor.toml"]


def test_bad_settings_cannot_serve(tmp_path: Path) -> None:
    code, report = doctor(tmp_path, {"table": {"capacity": 0}, "serve": {"prt": 1}})
    assert code == 1
    found = failed(report)["settings.values"]["found"]
    assert "table.capacity" in found and "serve.prt" in found


def test_a_settings_file_that_is_not_text_cannot_serve(tmp_path: Path) -> None:
    code, report = doctor(tmp_path, {}, before=lambda: (tmp_path / "doctor.toml").write_bytes(b"\xff\xfe") and None)
    assert code == 1 and "settings.values" in failed(report)


def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "place").write_text("not a folder")
    code, report = doctor(
        tmp_path,
        {
            **FREE,
            "log": {"path": "place/events.sqlite3"},
            "scoring": {"model_repository": "nowhere"},
            "rank": {"rules_file": "nowhere.toml"},
        },
    )
    assert code == 1
    assert set(failed(report)) == {"files.log_folder", "files.snapshots", "files.rules", "model.scores"}


def test_too_few_open_files_cannot_serve(tmp_path: Path) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    code, report = doctor(tmp_path, FREE, before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard)))
    assert code == 1 and set(failed(report)) == {"machine.open_files"}


def test_a_running_server_is_recognised_and_left_alone(tmp_path: Path) -> None:
    with running_server(tmp_path / "server", {"table": {"capacity": 1_000}}) as server:
        port = int(server.address.rpartition(":")[2])
        settings = {
            "serve": {"port": port, "metrics_port": server.metrics_port},
            "table": {"capacity": 1_000},
            "log": {"path": str(tmp_path / "server/events.sqlite3")},
        }
        with grpc.insecure_channel(server.address) as channel:
            publish = ingest_pb2_grpc.IngestStub(channel).Publish
            (ack,) = publish(iter([one(started("a", 1, now_ms()))]))
            assert (ack.offset, ack.accepted) == (1, 1)
            code, report = doctor(tmp_path, settings)
            assert (code, failed(report)) == (0, {})
            assert "liverank that answers SERVING" in told(report, "ports.grpc")
            assert "liverank's metrics" in told(report, "ports.metrics")
            assert "last of 1 records intact" in told(report, "files.log")
            (ack,) = publish(iter([one(event("a", 2, now_ms(), 1, heartbeat={"media_sequence": 1}))]))
            assert (ack.offset, ack.accepted) == (2, 1), "the server still writes"
        # Another server that wants only the metrics port of the first.
        code, report = doctor(tmp_path, {"serve": {"port": 0, "metrics_port": server.metrics_port}})
        assert code == 1 and "another liverank's metrics" in failed(report)["ports.metrics"]["found"]


def test_the_log_of_a_killed_server_is_read_and_not_changed(tmp_path: Path) -> None:
    server = start_server(tmp_path / "server", {"table": {"capacity": 1_000}})
    try:
        with grpc.insecure_channel(server.address) as channel:
            (ack,) = ingest_pb2_grpc.IngestStub(channel).Publish(iter([one(started("a", 1, now_ms()))]))
            assert (ack.offset, ack.accepted) == (1, 1)
    finally:
        server.process.kill()
        server.process.wait()
    before = {path.name: path.read_bytes() for path in (tmp_path / "server").glob("events.sqlite3*")}
    assert len(before) == 3, "a WAL was left"
    code, report = doctor(tmp_path, {**FREE, "log": {"path": str(tmp_path / "server/events.sqlite3")}})
    assert code == 0 and "last of 1 records intact" in told(report, "files.log")
    assert {path.name: path.read_bytes() for path in (tmp_path / "server").glob("events.sqlite3*")} == before


@pytest.mark.parametrize(
    ("name", "content", "check", "word"),
    [
        ("numba.py", "raise ImportError('Numba needs NumPy 2.1 or less')", "libraries.numba", "NumPy 2.1"),
        (
            "onnxruntime.py",
            "import os, signal; os.kill(os.getpid(), signal.SIGILL)",
            "libraries.onnxruntime",
            "SIGILL",
        ),
        (
            "liverank/v1/ranking_pb2_grpc.py",
            "from google.protobuf import runtime_version as r\n"
            "r.ValidateProtobufRuntimeVersion(r.Domain.PUBLIC, 99, 0, 0, '', 'ranking.proto')",
            "libraries.liverank.v1.ranking_pb2_grpc",
            "VersionError",
        ),
    ],
)
def test_a_broken_library_is_a_finding(tmp_path: Path, name: str, content: str, check: str, word: str) -> None:
    broken = tmp_path / "first" / name
    broken.parent.mkdir(parents=True)
    broken.write_text(content)
    if "/" in name:
        for module in (ROOT / "liverank").rglob("*.py"):
            copy = tmp_path / "first" / module.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if not copy.exists():
                copy.write_bytes(module.read_bytes())
    code, report = doctor(tmp_path, FREE, PYTHONPATH=str(tmp_path / "first"))
    assert code == 1
    assert word in failed(report)[check]["found"] and "pip install" in failed(report)[check]["mend"]
    assert "not checked" in told(report, "model.model")


def test_a_broken_library_that_these_settings_do_not_use_only_warns(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "first/faiss.py").write_text("raise ImportError('no')")
    code, report = doctor(tmp_path, FREE, PYTHONPATH=str(tmp_path / "first"))
    assert code == 0 and "libraries.faiss" in {f["check"] for f in report["findings"] if f["status"] == "warn"}
    code, report = doctor(tmp_path, {**FREE, "retrieval": {"engine": "faiss_cpu"}}, PYTHONPATH=str(tmp_path / "first"))
    assert code == 1 and "libraries.faiss" in failed(report)


def test_a_real_triton_is_asked_for_its_model(tmp_path: Path) -> None:
    repository = tmp_path / "models"
    put_current_model(repository)
    put_model(repository, "stranger", small_net(), schema="other")
    put_model(repository, "idle", small_net(2, len(FEATURES), FEATURES.schema), 1, FEATURES.schema, len(FEATURES))
    with running_triton(repository, tmp_path / "triton.log", "trendiness", "stranger") as triton:

        def scoring(name: str) -> dict[str, Any]:
            return {"mode": "triton", "triton_address": triton.address, "model_name": name}

        def failure(name: str) -> Finding:
            """The same check without another start of the command."""
            return the_failure(model.model, context(tmp_path, scoring=scoring(name)))

        code, report = doctor(tmp_path, {**FREE, "scoring": scoring("trendiness")})
        assert (code, failed(report)) == (0, {})
        assert "trendiness/1 (triton, tensors system_shm)" in told(report, "model.scores")
        other, idle = failure("stranger"), failure("idle")
        assert other.check == idle.check == "model.scores"
        assert "'other'" in other.found and "Load idle in Triton" in idle.mend
        triton.kill()
        code, report = doctor(tmp_path, {**FREE, "scoring": scoring("trendiness")})
        assert code == 1 and "triton_address" in failed(report)["model.reachable"]["mend"]
