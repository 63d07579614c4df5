"""Imports point one way, serving stays light, and nothing else claims our package names."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.arrow_events import payload, to_batch, to_ipc
from tests.events import T0

ROOT = Path(__file__).resolve().parents[2]

# What each part may import of ours (besides itself). Leaves: telemetry, config, errors, clock.
LEAVES = {"server.telemetry", "server.config", "server.errors", "server.clock"}
ALLOWED: dict[str, set[str]] = {
    "kernels": set(),
    "server.telemetry": set(),
    "server.errors": set(),
    "server.clock": set(),
    "server.config": {"server.errors"},
    "server.security": {*LEAVES},
    "server.live": {"kernels", *LEAVES},
    "server.log": {"server.live", *LEAVES},
    "server.scoring": {"kernels", *LEAVES},
    "server.viewers": {"kernels", "server.live", "server.scoring.ranker_schema", "server.scoring.ladder", *LEAVES},
    "server.rollout": {"server.scoring", "server.security", *LEAVES},
    "server.batching": set(),
    "server.admission": {"server.batching", *LEAVES},
    "server.rules": {"kernels", "server.live", *LEAVES},
    "server.retrieval": {"kernels", "server.live", "server.rules", "server.viewers", *LEAVES},
    "server.ranking": {
        "kernels",
        "server.live",
        "server.rules",
        "server.retrieval",
        "server.scoring",
        "server.viewers",
        *LEAVES,
    },
}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_a_part_imports_only_what_lies_below_it(part: str) -> None:
    base = ROOT / part.replace(".", "/")
    files = sorted(base.rglob("*.py")) if base.is_dir() else [base.with_suffix(".py")]
    assert files
    for path in files:
        for name in imports_of(path):
            ours = name.split(".")[0] in ("server", "kernels", "models", "loadtest")
            allowed = {part, *ALLOWED[part]}
            if ours and not any(name == a or name.startswith(f"{a}.") for a in allowed):
                pytest.fail(f"{path.relative_to(ROOT)} imports {name}; {part} may import {sorted(ALLOWED[part])}")


def test_only_the_edge_knows_grpc_and_only_the_model_transport_knows_triton() -> None:
    for path in (ROOT / "server").rglob("*.py"):
        place = path.relative_to(ROOT / "server").as_posix()
        names = {name.split(".")[0] for name in imports_of(path)}
        if "grpc" in names or "grpc_health" in names:
            assert place.startswith("rpc/") or place in (
                "app.py",
                "edge.py",
                "channel.py",
                "client.py",
                "model_client.py",
                "doctor/health.py",
                "scoring/triton.py",
            ), place
        if "tritonclient" in names:
            assert place.startswith("scoring/"), place


def test_what_runs_on_the_engine_thread_knows_no_wire_format() -> None:
    for name in ("engine", "answerer", "applier", "sweep"):
        tops = {found.split(".")[0] for found in imports_of(ROOT / "server" / f"{name}.py")}
        assert not tops & {"grpc", "liverank", "google"}, name


def run(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, cwd=ROOT)


def test_serving_and_the_demo_load_neither_torch_nor_training_code() -> None:
    run(
        "import sys, server.app, server.__main__, server.scoring.triton, server.scoring.local, loadtest.demo;"
        "bad = {'torch', 'onnx', 'pandas', 'cupy', 'cudf', 'models', 'confluent_kafka', 'redis'} & set(sys.modules);"
        "assert not bad, bad"
    )


def test_decoding_a_columnar_batch_does_not_load_pandas() -> None:
    rows = [{"sequence": 1, "stream_id": "s", "event_time_ms": T0, "kind": kind} for kind in ("liked", "ended", None)]
    sent = payload(to_ipc(to_batch(rows, sparse=False)))
    run(
        "import sys; from server.config import TableSettings; from server.live.events import decode_batch;"
        f"decode_batch(bytes.fromhex('{sent.hex()}'), TableSettings());"
        "assert 'pyarrow' in sys.modules and 'pandas' not in sys.modules"
    )


def test_no_other_distribution_claims_our_package_names() -> None:
    claimed = packages_distributions()
    for name in ("server", "kernels", "models", "loadtest"):
        assert set(claimed.get(name, ["liverank"])) == {"liverank"}, claimed[name]


def test_every_error_has_a_place_in_the_status_table() -> None:
    from server import errors
    from server.rpc.status import STATUS, status_of

    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, errors.LiverankError):
            made = error("field", "problem") if error is errors.InvalidRequest else error("problem")
            assert status_of(made) in STATUS.values()
            assert error in STATUS or error.__mro__[1] in STATUS, f"{error.__name__} falls through to LiverankError"
