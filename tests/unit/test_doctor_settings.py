"""The doctor's checks of ports, files, model and clock; each finding provoked by the thing itself."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper

from loadtest.faults.broker import running_broker
from server.clock import ManualClock
from server.doctor import admission, clock, files, kafka, model, ports, ranker, security
from server.doctor.base import Context, Status
from server.doctor.eventlog import DamagedLogError, read_last
from server.errors import LogError
from server.log.base import Record
from server.log.sqlite import SqliteLog
from tests import rankers
from tests.app import FEATURES, put_current_model
from tests.certificates import Authority
from tests.doctor import all_ok, context, found, the_failure
from tests.secured import write_access
from tests.triton_server import put_model, small_net

PUBLIC = {"allow_insecure_public": True}


def test_free_ports_are_ok(tmp_path: Path) -> None:
    assert all_ok(ports.ports, context(tmp_path))


def test_a_port_whose_connections_were_just_closed_is_free(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        number = gone.getsockname()[1]
        with socket.create_connection(("127.0.0.1", number)) as client:
            gone.accept()[0].close()  # who closes first keeps the port in TIME_WAIT
            assert client.recv(1) == b""
    assert all_ok(ports.ports, context(tmp_path, serve={"port": number}))


@pytest.mark.parametrize("key", ["port", "metrics_port"])
def test_a_port_taken_by_another_program_fails(tmp_path: Path, key: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        number = other.getsockname()[1]
        failure = the_failure(ports.ports, context(tmp_path, serve={key: number}))
    assert f"serve.{key}" in failure.mend and str(number) in failure.found and "another program" in failure.found
    assert all_ok(ports.ports, context(tmp_path, serve={key: number})), "free again"


def test_the_same_port_twice_fails(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        number = other.getsockname()[1]
    assert the_failure(ports.ports, context(tmp_path, serve={"port": number, "metrics_port": number})).mend


def test_an_address_of_another_machine_fails(tmp_path: Path) -> None:
    told = found(ports.ports, context(tmp_path, serve={"host": "192.0.2.1"}, security=PUBLIC))
    assert told["ports.grpc"].status is Status.FAIL and "serve.host" in told["ports.grpc"].mend
    told = found(ports.ports, context(tmp_path, serve={"host": "no such host"}, security=PUBLIC))
    assert told["ports.grpc"].status is Status.FAIL


def test_a_privileged_port_fails_for_an_ordinary_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "why_not", lambda host, port: errno.EACCES if port else 0)  # tests may run as root
    assert "1024" in the_failure(ports.ports, context(tmp_path, serve={"port": 443})).mend


# --- security -----------------------------------------------------------------------------------


def test_an_open_server_is_fine_on_loopback_and_a_warning_elsewhere(tmp_path: Path) -> None:
    assert all_ok(security.security, context(tmp_path))
    told = found(security.security, context(tmp_path, serve={"host": "0.0.0.0"}, security=PUBLIC))
    assert {finding.status for finding in told.values()} == {Status.WARN}


def test_security_files_that_cannot_be_used_fail(tmp_path: Path) -> None:
    cert, key = Authority(tmp_path, "ca").issue("server")
    files = {"cert_file": str(cert), "key_file": str(key), "access_file": str(tmp_path / "access.toml")}
    write_access(tmp_path / "access.toml", "reader")
    assert all_ok(security.security, context(tmp_path, security=files))
    assert (
        "cannot be read" in the_failure(security.security, context(tmp_path, security={"access_file": "/none"})).found
    )
    key.write_text("no key")
    assert "cert_file" in the_failure(security.security, context(tmp_path, security=files)).found


# --- files --------------------------------------------------------------------------------------


def test_broken_feature_and_rules_files_fail(tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text("[[feature]]\nname = 'x'\nkind = 'nonsense'\n")
    assert "kind" in the_failure(files.declared, context(tmp_path, table={"features_file": str(bad)})).found
    bad.write_bytes(b"\xff\xfe")
    assert "features_file" in the_failure(files.declared, context(tmp_path, table={"features_file": str(bad)})).mend
    bad.write_text("[rule.x]\nwhen = [{ feature = 'nonsense', above = 1, until = 0 }]\n[surface.default]\n")
    assert "nonsense" in the_failure(files.declared, context(tmp_path, rank={"rules_file": str(bad)})).found
    missing = context(tmp_path, rank={"rules_file": str(tmp_path / "none.toml")})
    assert the_failure(files.declared, missing).check == "files.rules"


def test_a_file_in_the_place_of_the_logs_folder_fails(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("not a folder")
    about = context(tmp_path, log={"path": str(tmp_path / "data" / "deeper" / "events.sqlite3")})
    failure = the_failure(files.log_folder, about)
    assert "is not a folder" in failure.found and "log.path" in failure.mend
    assert all_ok(files.log_file, about)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_fails(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    assert the_failure(files.log_folder, context(tmp_path, log={"path": str(folder / "x")})).mend


def test_a_full_disk_fails_and_a_filling_one_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path).free
    monkeypatch.setattr(files, "WANTED_FREE_BYTES", 2 * free)
    assert found(files.log_folder, context(tmp_path))["files.disk"].status is Status.WARN
    monkeypatch.setattr(files, "LEAST_FREE_BYTES", 2 * free)
    assert the_failure(files.log_folder, context(tmp_path)).check == "files.disk"


def written_log(tmp_path: Path, stamp_ms: int = 1_000) -> Path:
    """A cleanly closed log of three records."""
    path = tmp_path / "events.sqlite3"
    log = SqliteLog(path)
    log.append([Record(n, stamp_ms, b"batch %d" % n) for n in (1, 2, 3)])
    log.close()
    return path


def test_an_intact_log_is_ok_and_stays_untouched(tmp_path: Path) -> None:
    path = written_log(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    made_at_ns = tmp_path.stat().st_mtime_ns
    assert "3 records intact" in found(files.log_file, context(tmp_path))["files.log"].found
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert tmp_path.stat().st_mtime_ns == made_at_ns, "no file came and went either"
    assert read_last(path).offset == 3


def test_a_log_that_is_being_written_is_read_to_its_newest_record(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path / "events.sqlite3")
    assert "no records yet" in found(files.log_file, context(tmp_path))["files.log"].found
    for offset in range(1, 20):
        log.append([Record(offset, 7, b"x")])
        assert read_last(tmp_path / "events.sqlite3").offset == offset
    log.close()


@pytest.mark.parametrize(("damaged", "status"), [("= 3", Status.WARN), (">= 2", Status.FAIL)])
def test_a_damaged_last_record_warns_and_fails_where_a_start_would_refuse(
    tmp_path: Path, damaged: str, status: Status
) -> None:
    path = written_log(tmp_path)
    database = sqlite3.connect(path)
    database.execute(f"UPDATE log SET payload = x'00' WHERE record {damaged}")
    database.commit()
    database.close()
    finding = found(files.log_file, context(tmp_path))["files.log"]
    assert finding.status is status and "record 3" in finding.found and "backup" in finding.mend
    if status is Status.FAIL:
        with pytest.raises(LogError, match="is damaged"):
            SqliteLog(path)
    else:
        SqliteLog(path).close()


def test_a_file_that_is_no_log_fails(tmp_path: Path) -> None:
    path = tmp_path / "events.sqlite3"
    path.write_bytes(b"not a database at all" * 100)
    assert the_failure(files.log_file, context(tmp_path)).check == "files.log"
    path.unlink()
    sqlite3.connect(path).execute("CREATE TABLE other (x)").connection.close()
    with pytest.raises(DamagedLogError, match="no such table"):
        read_last(path)
    path.unlink()
    path.mkdir()
    assert "log.path" in the_failure(files.log_file, context(tmp_path)).mend


def test_a_backup_with_a_wal_that_was_not_merged_warns(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path / "events.sqlite3")
    log.append([Record(1, 7, b"x")])
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("events.sqlite3", "events.sqlite3-wal"):
        shutil.copy(tmp_path / name, copy / name)
    log.close()
    about = context(tmp_path, log={"path": str(copy / "events.sqlite3")})
    assert found(files.log_file, about)["files.log"].status is Status.WARN
    assert sorted(p.name for p in copy.iterdir()) == ["events.sqlite3", "events.sqlite3-wal"]


def test_the_snapshots_folder_must_be_writable_and_should_have_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all_ok(files.snapshots, context(tmp_path))
    (tmp_path / "file").write_text("")
    about = context(tmp_path, snapshot={"path": str(tmp_path / "file" / "deeper")})
    failure = the_failure(files.snapshots, about)
    assert failure.check == "files.snapshots" and "snapshot.path" in failure.mend
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage._replace(free=4 * 256 * 600))
    finding = found(files.snapshots, context(tmp_path))["files.snapshots_disk"]
    assert finding.status is Status.WARN and "4 snapshots" in finding.found
    assert all_ok(files.snapshots, context(tmp_path, snapshot={"keep": 1})), "half as many fit"


# --- kafka and admission --------------------------------------------------------------------------


def test_with_kafka_the_sqlite_file_is_nobodys_business_and_the_brokers_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(kafka.kafka(context(tmp_path))) == []
    (tmp_path / "events.sqlite3").write_bytes(b"not a database at all")
    with running_broker("events") as broker:
        broker.create("four", 4)

        def about(**more: Any) -> Context:
            return context(
                tmp_path,
                log={
                    "path": str(tmp_path / "events.sqlite3"), "kind": "kafka",
                    "kafka": {"bootstrap_servers": broker.servers, "topic": "events", **more},
                },
            )  # fmt: skip

        assert list(files.log_folder(about())) == list(files.log_file(about())) == []
        assert all_ok(kafka.kafka, about())
        assert "4 partitions" in the_failure(kafka.kafka, about(topic="four")).found
        assert "operations.md" in the_failure(kafka.kafka, about(topic="none")).mend
        assert the_failure(kafka.kafka, about(options={"acks ": "0"})).check == "kafka.client"
        broker.down()
        begun_s = time.monotonic()
        gone = found(kafka.kafka, about())["kafka.brokers"]
        assert gone.status is Status.WARN and "bootstrap_servers" in gone.mend
        assert time.monotonic() - begun_s < 30.0, "the client itself tries for a minute"
        monkeypatch.setitem(sys.modules, "confluent_kafka", None)
        assert "liverank[kafka]" in the_failure(kafka.kafka, about()).mend


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"admission": {"target_wait_ms": 200}}, "target_wait_ms"),
        ({"admission": {"min_limit": 300}}, "serve.max_rank_calls"),
        ({"serve": {"max_queue_rows": 4}}, "serve.max_queue_rows"),
        ({"serve": {"batch_window_us": 9_000}, "admission": {"target_wait_ms": 5}}, "batch_window_us"),
        ({"rank": {"min_budget_ms": 300}}, "min_budget_ms"),
    ],
)
def test_admission_settings_that_contradict_each_other_warn(
    tmp_path: Path, sections: dict[str, dict[str, Any]], told: str
) -> None:
    assert all_ok(admission.admission, context(tmp_path))
    (finding,) = admission.admission(context(tmp_path, **sections))
    assert finding.status is Status.WARN and told in finding.found and "overload.md" in finding.mend


# --- model --------------------------------------------------------------------------------------


def test_a_missing_model_fails(tmp_path: Path) -> None:
    failure = the_failure(model.model, context(tmp_path))
    assert "model.onnx" in failure.found and "scoring.model_repository" in failure.mend


def test_a_damaged_model_file_fails(tmp_path: Path) -> None:
    put_current_model(tmp_path / "models")
    (tmp_path / "models/trendiness/1/model.onnx").write_bytes(b"\0damaged")
    assert the_failure(model.model, context(tmp_path)).mend
    put_current_model(tmp_path / "models", version=2)
    (tmp_path / "models/trendiness/config.pbtxt").write_text("no { such thing")
    assert "config.pbtxt" in the_failure(model.model, context(tmp_path)).found


def test_a_model_of_another_schema_fails(tmp_path: Path) -> None:
    put_model(tmp_path / "models", "trendiness", small_net(), schema="other", n_features=6)
    failure = the_failure(model.model, context(tmp_path))
    assert "'other'" in failure.found and FEATURES.schema in failure.found and "make train" in failure.mend


def test_a_model_of_these_features_is_ok(tmp_path: Path) -> None:
    put_current_model(tmp_path / "models")
    assert FEATURES.schema in found(model.model, context(tmp_path))["model.scores"].found
    assert all_ok(model.model, context(tmp_path))


def test_a_model_that_scores_no_finite_number_fails(tmp_path: Path) -> None:
    broken = small_net(1, len(FEATURES), FEATURES.schema)
    for weights in broken.graph.initializer:
        nothing = np.full(list(weights.dims), np.nan, np.float32)
        weights.CopyFrom(numpy_helper.from_array(nothing, weights.name))
    put_model(tmp_path / "models", "trendiness", broken, 1, FEATURES.schema, len(FEATURES))
    assert "not a finite number" in the_failure(model.model, context(tmp_path)).found


def test_a_model_waits_for_its_features(tmp_path: Path) -> None:
    bad = context(tmp_path, table={"features_file": str(tmp_path / "none.toml")})
    assert "features" in found(model.model, bad)["model.scores"].mend


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:0", "127.0.0.1:99999999"])
def test_a_triton_that_is_not_there_fails(tmp_path: Path, address: str) -> None:
    failure = the_failure(model.model, context(tmp_path, scoring={"mode": "triton", "triton_address": address}))
    assert "triton_address" in failure.mend


def test_a_listener_that_is_no_triton_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "FIRST_CALL_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as other:
        scoring = {"mode": "triton", "triton_address": f"127.0.0.1:{other.getsockname()[1]}"}
        assert the_failure(model.model, context(tmp_path, scoring=scoring)).check == "model.scores"


# --- ranker -------------------------------------------------------------------------------------


def with_ranker(tmp_path: Path, put: Any = None, **changes: Any) -> Context:
    """Settings that name a ranker for embeddings of 4 numbers, after a model of that name was put there."""
    if put is not None:
        rankers.put_ranker(tmp_path / "models", put, FEATURES.schema, len(FEATURES), 4)
    return context(tmp_path, ranker={"model": "ranker", **changes})


def test_without_a_ranker_nothing_is_said_of_one(tmp_path: Path) -> None:
    assert found(ranker.ranker, context(tmp_path)) == {}


def test_a_ranker_of_these_features_and_embeddings_is_ok(tmp_path: Path) -> None:
    about = with_ranker(tmp_path, rankers.telling(len(FEATURES), 4), deadline_ms=10_000)
    assert "ranker/1 ranks 200 candidates" in found(ranker.ranker, about)["ranker.scores"].found
    assert all_ok(ranker.ranker, about)


def test_a_ranker_that_is_missing_or_damaged_fails(tmp_path: Path) -> None:
    assert "model.onnx" in the_failure(ranker.ranker, with_ranker(tmp_path)).mend
    about = with_ranker(tmp_path, rankers.telling(len(FEATURES), 4))
    (tmp_path / "models/ranker/1/model.onnx").write_bytes(b"\0damaged")
    assert the_failure(ranker.ranker, about).check == "ranker.scores"


def test_a_ranker_of_other_features_or_of_other_embeddings_fails(tmp_path: Path) -> None:
    repository, n = tmp_path / "models", len(FEATURES)
    rankers.put_ranker(repository, rankers.telling(n, 4), "other", n, 4)
    assert "Train" in the_failure(ranker.ranker, with_ranker(tmp_path)).mend
    rankers.put_ranker(repository, rankers.telling(n, 8), FEATURES.schema, n, 8, version=2)
    assert "Train" in the_failure(ranker.ranker, with_ranker(tmp_path)).mend


def test_a_ranker_whose_heads_are_no_numbers_fails(tmp_path: Path) -> None:
    about = with_ranker(tmp_path, rankers.constant(len(FEATURES), 4, [float("nan")] * 4))
    assert "make train" in the_failure(ranker.ranker, about).mend


def test_a_ranker_beyond_its_deadline_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0])
    monkeypatch.setattr(ranker.time, "monotonic", lambda: next(ticks, 2.0))
    opened = type("Fast", (), {"heads": lambda *_: type("Heads", (), {"model_version": "ranker/7"})})()
    told = ranker._ranked(with_ranker(tmp_path), opened, len(FEATURES))
    assert told.status is Status.WARN and "ranker.deadline_ms is 25" in told.found


def test_a_ranker_on_a_triton_that_is_not_there_fails(tmp_path: Path) -> None:
    scoring = {"mode": "triton", "triton_address": "127.0.0.1:1"}
    failure = the_failure(ranker.ranker, context(tmp_path, scoring=scoring, ranker={"model": "ranker"}))
    assert "triton_address" in failure.mend


def test_a_ranker_waits_for_its_features(tmp_path: Path) -> None:
    bad = context(tmp_path, table={"features_file": str(tmp_path / "none.toml")}, ranker={"model": "ranker"})
    assert "features" in found(ranker.ranker, bad)["ranker.scores"].mend


# --- clock --------------------------------------------------------------------------------------


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def test_a_clock_behind_the_logs_stamps_fails(tmp_path: Path) -> None:
    written_log(tmp_path, stamp_ms=now_ms())
    assert all_ok(clock.wall_clock, context(tmp_path))
    stale = context(tmp_path, ManualClock(now_ms() - 3_600_000))
    assert "newest stamp" in the_failure(clock.wall_clock, stale).found
    a_little = context(tmp_path, ManualClock(now_ms() - 3_000))
    assert found(clock.wall_clock, a_little)["clock.wall"].status is Status.WARN


def test_a_clock_before_the_installation_fails(tmp_path: Path) -> None:
    stale = context(tmp_path, ManualClock(clock.installed_ms() - 86_400_000))
    assert "installed" in the_failure(clock.wall_clock, stale).found


def test_a_clock_that_goes_back_fails(tmp_path: Path) -> None:
    class Backwards:
        def __init__(self) -> None:
            self.at_ms = now_ms() + 10_000

        def now_ms(self) -> int:
            self.at_ms -= 1
            return self.at_ms

    assert the_failure(clock.wall_clock, context(tmp_path, Backwards())).check == "clock.monotone"


@pytest.mark.parametrize(("state", "status"), [(None, Status.OK), (True, Status.OK), (False, Status.WARN)])
def test_what_the_kernel_says_about_ntp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: bool | None, status: Status
) -> None:
    assert clock.ntp_state() in (None, True, False)
    monkeypatch.setattr(clock, "ntp_state", lambda: state)
    assert found(clock.synchronised, context(tmp_path))["clock.ntp"].status is status
