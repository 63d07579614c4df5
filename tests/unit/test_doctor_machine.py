"""The doctor's checks of machine and memory; provoked for real where possible."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from server.doctor import machine, memory
from server.doctor.base import Finding, Status
from server.doctor.run import can_serve
from tests.doctor import all_ok, context, found, the_failure


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
