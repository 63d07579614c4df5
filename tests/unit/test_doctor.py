"""The doctor itself, and its checks of machine, memory, devices and libraries; provoked for real where possible."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from server.doctor import device, files, libraries, machine, memory, run
from server.doctor.base import Context, Finding, Status, fail, ok
from server.doctor.run import as_report, as_table, can_serve, examine, unknown_variables
from tests.app import put_current_model
from tests.doctor import all_ok, context, found, the_failure

H100 = "NVIDIA H100, 580.65.06, 81559 MiB, 80000 MiB"


def machine_with(tmp_path: Path, available_mib: int, **group_files: str) -> Path:
    """A root with this much memory, and these files of the memory control group (version 2)."""
    root = tmp_path / "root"
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {available_mib << 10} kB\n")
    (root / "proc/self/cgroup").write_text("0::/pod/container\n")
    folder = root / "sys/fs/cgroup/pod"
    folder.mkdir(parents=True)
    for name, content in group_files.items():
        (folder / name.replace("_", ".")).write_text(content)
    return root


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


# --- machine ------------------------------------------------------------------------------------


def test_this_machine_can_run_it(tmp_path: Path) -> None:
    assert can_serve([*machine.python(context(tmp_path)), *machine.cores(context(tmp_path))])


def test_an_old_python_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "OLDEST_PYTHON", (3, 99))
    assert the_failure(machine.python, context(tmp_path)).check == "machine.python"


@pytest.mark.parametrize(
    ("files_of_group", "cores"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_a_containers_share_of_the_cores_is_read(
    tmp_path: Path, files_of_group: dict[str, str], cores: float | None
) -> None:
    for name, content in files_of_group.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert machine.cpu_quota(tmp_path) == cores
    told = found(machine.cores, context(tmp_path, root=tmp_path))["machine.cores"]
    if cores:
        assert told.status is Status.WARN


def test_blas_threads_that_take_cores_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "4")
    assert found(machine.cores, context(tmp_path))["machine.blas_threads"].status is Status.WARN


def test_more_open_streams_than_open_files_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (256, 4096))
    assert "256" in the_failure(machine.open_files, context(tmp_path, serve={"max_open_streams": 4096})).found
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (512, 4096))
    assert found(machine.open_files, context(tmp_path))["machine.open_files"].status is Status.WARN


# --- memory -------------------------------------------------------------------------------------


def test_a_row_costs_at_least_its_columns_and_nothing_is_allocated_for_the_rest(tmp_path: Path) -> None:
    large = context(tmp_path, table={"capacity": 4_000_000, "embedding_dim": 1024})
    assert 4 * 1024 + 800 < memory.bytes_per_row(large) < 4 * (4 * 1024 + 800)


def test_a_capacity_that_does_not_fit_fails_and_says_what_would(tmp_path: Path) -> None:
    root = machine_with(tmp_path, 600)
    failure = the_failure(memory.table_memory, context(tmp_path, root=root, table={"capacity": 1_000_000}))
    assert "table.capacity" in failure.mend
    fits = int(failure.mend.split("table.capacity to ")[1].split(" ")[0].replace(",", ""))
    assert all_ok(memory.table_memory, context(tmp_path, root=root, table={"capacity": fits}))
    assert not all_ok(memory.table_memory, context(tmp_path, root=root, table={"capacity": fits * 2}))


def test_the_control_group_limits_memory_and_its_page_cache_is_free(tmp_path: Path) -> None:
    group = {"memory_max": f"{500 << 20}\n", "memory_current": f"{450 << 20}\n", "memory_stat": "inactive_file 0\n"}
    root = machine_with(tmp_path, 64_000, **group)
    assert memory.available_bytes(root) == (50 << 20, "limit of the control group")
    assert "of memory" in the_failure(memory.table_memory, context(tmp_path, root=root)).mend
    (root / "sys/fs/cgroup/pod/memory.stat").write_text(f"anon 1\ninactive_file {440 << 20}\n")
    assert memory.available_bytes(root)[0] == 490 << 20
    assert all_ok(memory.table_memory, context(tmp_path, root=root))


def test_version_1_of_control_groups_is_read(tmp_path: Path) -> None:
    root = machine_with(tmp_path, 64_000)
    (root / "proc/self/cgroup").write_text("3:cpuset:/\n4:memory:/a\n")
    folder = root / "sys/fs/cgroup/memory/a"
    folder.mkdir(parents=True)
    for name, content in {"limit_in_bytes": "1000", "usage_in_bytes": "400", "stat": "total_inactive_file 100"}.items():
        (folder / f"memory.{name}").write_text(content)
    assert memory.available_bytes(root)[0] == 700


def test_viewers_that_will_not_fit_are_warned_of_with_how_many_would(tmp_path: Path) -> None:
    root = machine_with(tmp_path, 800)
    told = found(memory.viewer_memory, context(tmp_path, root=root))["memory.viewers"]
    assert told.status is Status.WARN and "1,000,000 viewers" in told.found
    fits = int(told.mend.split("to ")[1].split(" or")[0].replace(",", ""))
    assert 0 < fits < 1_000_000 and all_ok(
        memory.viewer_memory, context(tmp_path, root=root, viewers={"capacity": fits})
    )
    assert not found(memory.viewer_memory, context(tmp_path, root=root, viewers={"capacity": 0}))
    unknown = found(memory.viewer_memory, context(tmp_path, root=tmp_path / "nowhere"))["memory.viewers"]
    assert unknown.status is Status.OK and "not known" in unknown.found


def test_unknown_memory_is_said_not_guessed(tmp_path: Path) -> None:
    told = found(memory.table_memory, context(tmp_path, root=tmp_path / "nowhere"))["memory.table"]
    assert told.status is Status.OK and "not known" in told.found


def test_triton_on_this_machine_needs_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "root"
    bare.mkdir()
    assert all_ok(memory.shared_memory, context(tmp_path, root=bare))  # not with the model in process
    triton = {"mode": "triton", "triton_address": "127.0.0.1:8001"}
    assert "/dev/shm" in the_failure(memory.shared_memory, context(tmp_path, root=bare, scoring=triton)).found
    (bare / "dev/shm").mkdir(parents=True)
    assert all_ok(memory.shared_memory, context(tmp_path, root=bare, scoring=triton))  # this disk's size
    monkeypatch.setattr(memory, "SHM_BYTES_WANTED", 1 << 60)
    assert "--shm-size" in the_failure(memory.shared_memory, context(tmp_path, root=bare, scoring=triton)).mend
    elsewhere = {"mode": "triton", "triton_address": "192.0.2.1:8001"}
    assert all_ok(memory.shared_memory, context(tmp_path, root=bare, scoring=elsewhere))


def test_shared_memory_too_small_for_the_tensors_warns_or_fails_as_the_transport_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = {"f_frsize": 1, "f_blocks": 64 << 20, "f_bavail": 64 << 20}  # Docker's default
    monkeypatch.setattr(memory.os, "statvfs", lambda path: SimpleNamespace(**size))

    def told(transport: str, address: str = "127.0.0.1:8001") -> Finding:
        scoring = {"mode": "triton", "triton_address": address, "transport": transport}
        return found(memory.shared_memory, context(tmp_path, scoring=scoring, table={"capacity": 500_000}))[
            "memory.shm"
        ]

    assert told("plain").status is Status.OK
    assert told("auto").status is Status.WARN and "inside the messages" in told("auto").found
    assert told("system_shm").status is Status.FAIL and "scoring.transport" in told("system_shm").mend
    assert "must see the same" in told("system_shm", "192.0.2.1:8001").found
    size["f_bavail"] = size["f_blocks"] = 512 << 20
    assert told("auto").status is told("system_shm").status is Status.OK


# --- device and libraries -----------------------------------------------------------------------


def test_no_gpu_is_fine(tmp_path: Path) -> None:
    told = found(device.gpu, context(tmp_path, root=tmp_path))["device.gpu"]
    assert told == ok("device.gpu", "no GPU: CPU paths")


def test_a_driver_is_reported_and_nothing_of_cuda_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    (tmp_path / "dev/nvidiactl").touch()
    told = found(device.gpu, context(tmp_path, root=tmp_path))["device.gpu"]
    assert "NVIDIA device nvidia0" in told.found and "nvidiactl" not in told.found
    assert not {"cupy", "cudf"} & set(sys.modules)


def test_nvidia_smi_tells_the_gpus_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100, 580.1, 81559 MiB'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    assert device.nvidia_devices(tmp_path) == ["NVIDIA H100, 580.1, 81559 MiB"]


def with_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str = H100) -> Path:
    """A root whose nvidia-smi prints ``line``."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{line}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    return tmp_path


def test_a_driver_too_old_for_cuda_13_fails_unless_the_cpu_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = with_gpu(tmp_path, monkeypatch, H100.replace("580.65.06", "550.90.07"))
    assert "550.90.07" in the_failure(device.gpu, context(tmp_path, root=root)).found
    lenient = context(tmp_path, root=root, device={"allow_cpu": True})
    assert found(device.gpu, lenient)["device.driver"].status is Status.WARN
    assert all_ok(device.gpu, context(tmp_path, root=root, device={"kind": "cpu"}))


def test_the_choice_of_the_device_is_made_for_real_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all_ok(device.backend, context(tmp_path, device={"kind": "cpu"}))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    device.ask_backend.cache_clear()
    assert "cpu: auto" in found(device.backend, context(tmp_path))["device.backend"].found
    failure = the_failure(device.backend, context(tmp_path, device={"kind": "cuda"}))
    assert "no GPU is visible" in failure.found and "--gpus all" in failure.mend
    device.ask_backend.cache_clear()


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (("cuda", "NVIDIA H100, memory pool: rmm"), Status.OK),
        (("cpu", "auto: the GPU cannot be used: torch was built without CUDA"), Status.WARN),
        (("", "NVIDIA H100 is there, but cupy cannot be imported"), Status.FAIL),
    ],
)
def test_a_gpu_that_is_there_and_broken_is_never_fine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: tuple[str, str], status: Status
) -> None:
    monkeypatch.setattr(device, "ask_backend", lambda kind, allow_cpu: answer)
    told = found(device.backend, context(tmp_path))["device.backend"]
    assert told.status is status and answer[1] in told.found


def test_a_process_that_dies_while_choosing_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_CHILD", "import os; os.abort()")
    device.ask_backend.cache_clear()
    assert device.ask_backend("auto", False)[0] == ""
    device.ask_backend.cache_clear()


def test_a_table_too_large_for_the_gpu_fails_and_says_what_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = with_gpu(tmp_path, monkeypatch)
    million = {"capacity": 1_000_000, "embedding_dim": 64}
    assert all_ok(device.memory, context(tmp_path, root=root, table=million))
    root = with_gpu_free(root, 2000)
    failure = the_failure(device.memory, context(tmp_path, root=root, table=million))
    fits = int(failure.mend.split("table.capacity to ")[1].split(" ")[0].replace(",", ""))
    assert all_ok(device.memory, context(tmp_path, root=root, table={**million, "capacity": fits}))
    assert not found(device.memory, context(tmp_path, root=root, table=million, device={"kind": "cpu"}))


def with_gpu_free(root: Path, free_mib: int) -> Path:
    (root / "nvidia-smi").write_text(f"#!/bin/sh\necho '{H100.replace('80000 MiB', f'{free_mib} MiB')}'\n")
    return root


def test_what_is_installed_satisfies_what_is_declared(tmp_path: Path) -> None:
    assert all_ok(libraries.versions, context(tmp_path))
    assert all_ok(libraries.known_clashes, context(tmp_path))
    assert ("numpy", ">=2.0,<3") in [
        (n, ",".join(sorted(w.split(","), reverse=True))) for n, w in libraries.requirements()
    ]


def test_a_missing_and_an_old_library_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {**libraries.installed_versions(), "numpy": "1.26.4"}
    del installed["numba"]
    monkeypatch.setattr(libraries, "installed_versions", lambda: installed)
    told = list(libraries.versions(context(tmp_path)))
    failures = {f.found.split()[0]: f for f in told if f.status is Status.FAIL}
    assert set(failures) == {"numpy", "numba"}
    assert failures["numpy"].mend.startswith("pip install 'numpy")


@pytest.mark.parametrize(
    ("version", "wanted", "answer"),
    [
        ("2.4.6", ">=2.0,<3", True),
        ("2.0", ">=2.0.0", True),
        ("3.0.0", "<3", False),
        ("1.76", ">=1.9", True),
        ("2.13.0+cpu", "<=2.13.0", True),
        ("2.0rc1", ">=2", True),
        ("7", "", True),
    ],
)
def test_version_ranges(version: str, wanted: str, answer: bool) -> None:
    assert libraries.satisfies(version, wanted) is answer


CUVS = {"faiss-gpu-cuvs": "1.15.1", "libcuvs-cu13": "26.6.0", "libraft-cu13": "26.6.0"}


@pytest.mark.parametrize(
    ("installed", "clash"),
    [
        ({"numpy": "2.5.0", "cudf-cu13": "26.6.1"}, "numpy 2.5.0 with cudf-cu13"),
        ({**CUVS, "numpy": "2.4.6", "cudf-cu13": "26.6.1", "pandas": "2.3.3", "cupy-cuda13x": "14.2.0"}, ""),
        ({"numpy": "2.5.0"}, ""),
        ({**CUVS, "numpy": "2.4.6", "cudf-cu13": "26.10.0"}, "RAPIDS"),
        ({**CUVS, "faiss-cpu": "1.15.1"}, "both installed"),
        ({"faiss-gpu-cuvs": "1.15.1"}, "without libcuvs-cu13"),
        ({"faiss-gpu-cu12": "1.12.0"}, "no code for Hopper"),
        ({"cudf-cu13": "26.6.0", "pandas": "3.0.1"}, "pandas 3.0.1 with cudf-cu13"),
        ({"pandas": "3.0.1"}, ""),
        ({"cudf-cu13": "26.6.0", "cupy-cuda12x": "13.6.0"}, "cupy-cuda12x beside cudf-cu13"),
        ({"cupy-cuda12x": "13.6.0", "cupy-cuda13x": "14.2.0"}, "overwrite each other"),
        ({"faiss-gpu": "1.15.1"}, "ignores filters"),
    ],
)
def test_known_clashes(installed: dict[str, str], clash: str) -> None:
    told = libraries.clashes(installed)
    assert [clash in finding.found and bool(finding.mend) for finding in told] == ([True] if clash else [])


def test_imports_are_tried_elsewhere_and_one_that_kills_its_process_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "illegal.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    (tmp_path / "talks.py").write_text("print('hello')\nraise SystemExit(3)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    told = libraries.try_imports(["json", "illegal", "talks", "csv"])
    assert told["json"] == told["csv"] == ""
    assert signal.Signals.SIGILL.name in told["illegal"]
    assert "SystemExit" in told["talks"]
    assert "illegal" not in sys.modules
