"""What liverank depends on: versions, combinations known to clash, and whether each can be imported."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata

from server.config import Settings
from server.doctor.base import Context, Finding, fail, ok, warn

Version = tuple[int, ...]

TIMEOUT_S = 120.0
REINSTALL = (
    "Reinstall into a fresh virtual environment: `make clean setup`, or `pip install --force-reinstall liverank`."
)

IMPORTS: dict[str, str] = {
    "numpy": "numpy",
    "numba": "numba",
    "grpc": "grpcio",
    "grpc_health.v1.health_pb2": "grpcio-health-checking",
    "grpc_reflection.v1alpha.reflection": "grpcio-reflection",
    "google.protobuf": "protobuf",
    "liverank.v1.admin_pb2_grpc": "liverank",
    "liverank.v1.ingest_pb2_grpc": "liverank",
    "liverank.v1.liveness_pb2_grpc": "liverank",
    "liverank.v1.ranking_pb2_grpc": "liverank",
    "prometheus_client": "prometheus-client",
    "tritonclient.grpc": "tritonclient",
    "onnxruntime": "onnxruntime",
    "faiss": "'liverank[cpu]'",
}
"""Modules that serving imports, and the distribution each comes from; in the order of dependence."""

# Each import runs on its own line of a child process, so that one that kills its process (a library built for
# another processor) becomes a finding too.
_CHILD = """
import importlib, json, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
        told = ""
    except BaseException as error:
        told = f"{type(error).__name__}: {error}"
    print("\\n" + json.dumps([name, told]), flush=True)
"""


def versions(context: Context) -> Iterator[Finding]:
    """Installed versions against those that liverank declares."""
    installed = installed_versions()
    told = []
    for name, wanted in requirements():
        version = installed.get(name)
        if version is None:
            yield fail("libraries.versions", f"{name} is not installed ({name}{wanted} is needed)", REINSTALL)
        elif not satisfies(version, wanted):
            yield fail(
                "libraries.versions",
                f"{name} {version} is installed, {name}{wanted} is needed",
                f"pip install '{name}{wanted}'",
            )
        else:
            told.append(f"{name} {version}")
    if told:
        yield ok("libraries.versions", ", ".join(told))


def known_clashes(context: Context) -> Iterator[Finding]:
    """Combinations that install side by side and do not work together."""
    found = clashes(installed_versions())
    yield from found
    if not found:
        yield ok("libraries.clashes", "none of the known ones")


def imports(context: Context) -> Iterator[Finding]:
    """Whether every module can be imported, the generated messages included. One that these settings do not
    use only warns."""
    told = try_imports(list(IMPORTS))
    for name, problem in told.items():
        if not problem or (name == "faiss" and "No module" in problem and not is_needed(name, context.settings)):
            continue  # an extra that nobody asked for
        mend = f"pip install --force-reinstall {IMPORTS[name]}"
        if name.startswith("liverank."):
            mend = "pip install --upgrade protobuf grpcio: they must not be older than what generated these files."
        check = f"libraries.{name}"
        if is_needed(name, context.settings):
            yield fail(check, f"cannot be imported: {problem}", mend)
        else:
            yield warn(check, f"cannot be imported, which these settings do not need: {problem}", mend)
    loaded = [name for name, problem in told.items() if not problem]
    if len(loaded) >= len(told) - (told["faiss"] != ""):
        yield ok("libraries.imports", f"{len(loaded)} modules load, generated messages included")


def is_needed(module: str, settings: Settings) -> bool:
    """Whether a server with these settings imports ``module``."""
    if module == "onnxruntime":
        return settings.scoring.mode == "local"
    if module == "faiss":
        return settings.retrieval.engine == "faiss_cpu"
    return True


def try_imports(names: list[str]) -> dict[str, str]:
    """Imports each module, in other processes. Returns the problem by name, "" where there is none."""
    told: dict[str, str] = {}
    while left := [name for name in names if name not in told]:
        try:
            done = subprocess.run(
                [sys.executable, "-c", _CHILD, *left], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
            )
            output, end = done.stdout, _ending(done.returncode)
        except subprocess.TimeoutExpired as error:
            output = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else ""
            end = f"not done after {TIMEOUT_S:.0f} s"
        # Libraries print, too.
        told |= dict(json.loads(line) for line in output.splitlines() if line.startswith('["'))
        if silent := [name for name in left if name not in told]:
            told[silent[0]] = end
    return told


def _ending(code: int) -> str:
    return f"its import kills the process ({signal.Signals(-code).name})" if code < 0 else f"the process exited {code}"


def installed_versions() -> dict[str, str]:
    """Version by distribution name in lower case with dashes; of two copies the one that is imported."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"] if distribution.metadata else None
        if name:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version)
    return found


def requirements() -> list[tuple[str, str]]:
    """(name, version range) of what liverank needs to serve, as declared by the package itself."""
    try:
        lines = metadata.requires("liverank") or []
    except metadata.PackageNotFoundError:
        return []
    plain = [line for line in lines if ";" not in line]
    parts = (re.match(r"([A-Za-z0-9._-]+)\s*(.*)", line) for line in plain)
    return sorted((part[1].lower(), part[2].replace(" ", "")) for part in parts if part)


def satisfies(version: str, wanted: str) -> bool:
    """Whether a version lies in a range such as ">=2.0,<3"."""
    have = parse(version)
    tests: dict[str, Callable[[Version, Version], bool]] = {
        ">=": lambda a, b: a >= b,
        "<=": lambda a, b: a <= b,
        "<": lambda a, b: a < b,
        ">": lambda a, b: a > b,
        "==": lambda a, b: a == b,
    }
    for bound in filter(None, wanted.split(",")):
        operator, limit = re.match(r"([<>=!~]+)(.*)", bound).groups()  # type: ignore[union-attr]
        if operator in tests and not tests[operator](have, parse(limit)):
            return False
    return True


def parse(version: str) -> Version:
    """The leading numbers of a version, without trailing zeros: 2.10.0rc1 → (2, 10)."""
    numbers = [int(part) for part in re.findall(r"\d+", re.split(r"[^0-9.]", version)[0])]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def clashes(installed: dict[str, str]) -> list[Finding]:
    """The known clashes among these distributions (version by name)."""
    found = []
    have = {name: parse(version) for name, version in installed.items()}
    cudf = next((name for name in installed if re.fullmatch(r"cudf-cu\d+|cudf", name)), "")
    if cudf and have.get("numpy", ()) >= (2, 5):
        found.append(
            fail(
                "libraries.clashes",
                f"numpy {installed['numpy']} with {cudf} {installed[cudf]}: cuDF does not work with NumPy 2.5",
                "pip install 'numpy<2.5'",
            )
        )
    if cudf and have[cudf] >= (26, 10) and have.get("faiss-gpu-cuvs") == (1, 15, 1):
        found.append(
            fail(
                "libraries.clashes",
                f"{cudf} {installed[cudf]} with faiss-gpu-cuvs 1.15.1: they need different versions of RAPIDS",
                f"pip install '{cudf}==26.6.*'",
            )
        )
    if cudf and have[cudf] < (26, 10) and have.get("pandas", ()) >= (2, 4):
        found.append(
            fail(
                "libraries.clashes",
                f"pandas {installed['pandas']} with {cudf} {installed[cudf]}: cuDF 26.6 refuses pandas 2.4 and newer",
                "pip install 'pandas==2.3.*'",
            )
        )
    cupy = [name for name in installed if re.fullmatch(r"cupy(-cuda\d+x|-rocm.*)?", name)]
    if len(cupy) > 1 or (cudf.endswith("-cu13") and cupy and cupy != ["cupy-cuda13x"]):
        found.append(
            fail(
                "libraries.clashes",
                f"{' and '.join(sorted(cupy))}{f' beside {cudf}' if cudf else ''}: builds of CuPy overwrite each "
                "other, and CUDA 13 needs its own",
                f"pip uninstall {' '.join(sorted(cupy))}, then pip install cupy-cuda13x.",
            )
        )
    if "faiss-gpu-cuvs" in installed and not {"libcuvs-cu13", "libraft-cu13"} <= set(installed):
        found.append(
            fail(
                "libraries.clashes",
                f"faiss-gpu-cuvs {installed['faiss-gpu-cuvs']} without libcuvs-cu13 and libraft-cu13",
                "deploy/faiss-gpu.sh installs them together.",
            )
        )
    if "faiss-gpu-cu12" in installed:
        found.append(
            warn(
                "libraries.clashes",
                f"faiss-gpu-cu12 {installed['faiss-gpu-cu12']} has no code for Hopper GPUs",
                "deploy/faiss-gpu.sh replaces it by faiss-gpu-cuvs.",
            )
        )
    faiss = [name for name in ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12", "faiss-gpu-cuvs") if name in installed]
    if len(faiss) > 1:
        found.append(
            fail(
                "libraries.clashes",
                f"{' and '.join(faiss)} are both installed: they overwrite each other's files",
                f"pip uninstall {' '.join(faiss)}, then install one of them.",
            )
        )
    if "faiss-gpu" in installed:
        found.append(
            warn(
                "libraries.clashes",
                f"faiss-gpu {installed['faiss-gpu']} ignores filters on flat indexes without an error",
                "pip uninstall faiss-gpu, then pip install faiss-cpu; on CUDA 13 run deploy/faiss-gpu.sh.",
            )
        )
    return found
