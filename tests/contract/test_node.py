"""The contract holds for a client in another language, built from the .proto files alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.clock import SystemClock
from tests.app import Client, running_app
from tests.events import started
from tests.triton_server import eventually

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent / "node"


def node_version() -> int:
    if shutil.which("node") is None or shutil.which("npm") is None:
        return 0
    told = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout
    return int(told.removeprefix("v").split(".")[0])


@pytest.fixture(scope="module")
def node() -> Path:
    """A folder with the scripts and Node's gRPC client; where Node is absent the skip says so."""
    if node_version() < 18:
        pytest.skip("NOT RUN: the Node contract test needs Node 18 or newer and npm on this machine")
    folder = ROOT / "build" / "node"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", ".npmrc", "rank.js", "everything.js"):
        shutil.copy(HERE / name, folder / name)
    if not (folder / "node_modules" / "@grpc" / "grpc-js").exists():
        subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--silent"], cwd=folder, check=True, timeout=180)
    return folder


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with running_app(tmp_path, SystemClock(), table={"lease_ms": 600_000}) as client:
        yield client


def run(folder: Path, script: str, client: Client, *arguments: str) -> list[Any]:
    done = subprocess.run(
        ["node", script, str(ROOT / "proto"), f"127.0.0.1:{client.app.port}", *arguments],
        cwd=folder, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_snippet_of_the_readme_prints_a_slate(node: Path, client: Client) -> None:
    client.publish(started("a", 0, client.clock.now_ms()), started("b", 0, client.clock.now_ms()))
    client.tick()
    streams = run(node, "rank.js", client)
    assert {s["streamId"] for s in streams} == {"a", "b"}
    assert all(s["epoch"] == 1 and "trending" in s["sources"] for s in streams)


def test_every_service_answers_a_node_client_as_documented(node: Path, client: Client) -> None:
    at = client.clock.now_ms()
    (seen,) = run(node, "everything.js", client, str(at))
    assert seen["ack"]["accepted"] == 3 and seen["ack"]["rejected"][0]["code"] == "UNKNOWN_STREAM"
    assert {s["streamId"] for s in seen["ranked"]["streams"]} == {"node-a", "node-b"}
    first = next(s for s in seen["ranked"]["streams"] if s["streamId"] == "node-a")
    assert first["epoch"] == 7 and abs(first["verifyByMs"] - (at + 600_000)) < 5_000
    assert seen["ranked"]["degradation"]["level"] == "NONE" and seen["ranked"]["requestId"] == "n"
    assert (seen["heard"]["streamId"], seen["heard"]["reason"], seen["heard"]["offset"]) == ("node-b", "bye", 1)
    assert {s["streamId"] for s in seen["after"]["streams"]} == {"node-a"}
    assert [(s["state"], s["showable"]) for s in seen["checked"]["streams"]] == [("LIVE", True), ("ENDED", False)]
    assert [r["requestId"] for r in seen["batch"]["responses"]] == ["x", "y"]
    assert seen["explained"]["notShownReason"] == "ended" and seen["explained"]["features"]
    assert seen["status"]["live"] == 1 and seen["status"]["scoringBackend"] == "local"
    assert seen["refused"]["code"] == "INVALID_ARGUMENT" and seen["refused"]["details"].startswith("viewer_embedding:")


def test_a_python_feed_service_needs_only_the_generated_stubs(client: Client, tmp_path: Path) -> None:
    """Runs the README's Python snippets as they stand there."""
    client.publish(started("a", 0, client.clock.now_ms()))
    client.tick()
    readme = (ROOT / "README.md").read_text()
    snippets = [part.split("```")[0] for part in readme.split("```python\n")[1:]]
    assert len(snippets) >= 2, "one that ranks, one that publishes"
    for number, snippet in enumerate(snippets):
        script = tmp_path / f"snippet{number}.py"
        script.write_text(snippet.replace("127.0.0.1:7710", f"127.0.0.1:{client.app.port}"))
        done = subprocess.run(
            [sys.executable, str(script)],
            capture_output=True, text=True, timeout=60, check=False, cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip(), "a snippet shows something"
    shown = eventually(lambda: [s.stream_id for s in client.rank().streams if s.stream_id != "a"])
    assert shown, "what the producer snippet published is ranked"
