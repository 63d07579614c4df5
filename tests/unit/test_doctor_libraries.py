"""The doctor's checks of devices and libraries; provoked for real where possible."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from server.doctor import device, libraries
from server.doctor.base import Status, ok
from tests.doctor import all_ok, context, found, the_failure

H100 = "NVIDIA H100, 580.65.06, 81559 MiB, 80000 MiB"


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
