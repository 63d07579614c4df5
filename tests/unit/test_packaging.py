"""What is said about installing agrees: pyproject, the Dockerfile, compose file, FAISS list and docs/gpu.md."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.config import parse_settings
from server.doctor import health
from server.errors import ConfigError
from tests.app import running_app

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile.gpu").read_text()
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
PROJECT_BUILD = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
FAISS = [line for line in (ROOT / "deploy/faiss-gpu.txt").read_text().splitlines() if line and not line.startswith("#")]
DOCS = (ROOT / "docs/gpu.md").read_text()
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


def tool(name: str) -> str:
    """A program of the development environment."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not installed here")
    return found


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, rest) of a Dockerfile, continued lines joined, comments left out."""
    joined = re.sub(r"\\\n", " ", "\n".join(line for line in text.splitlines() if not line.startswith("#")))
    parts = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(part[0].upper(), part[1]) for part in parts]


def last_stage() -> dict[str, list[str]]:
    """Instructions of the stage that is shipped."""
    stage: dict[str, list[str]] = {}
    for name, rest in instructions(DOCKERFILE):
        if name == "FROM":
            stage = {}
        stage.setdefault(name, []).append(rest)
    return stage


def names_of(requirements: list[str]) -> set[str]:
    return {re.match(NAME, line).group(0).lower() for line in requirements}  # type: ignore[union-attr]


# --- versions -------------------------------------------------------------------------------------


def test_docs_name_exactly_the_versions_of_the_gpu_extra_and_the_faiss_list() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", DOCS, flags=re.MULTILINE)
    assert sorted(rows) == sorted([*EXTRAS["gpu"], *FAISS])


def test_the_image_installs_the_gpu_extra_and_the_faiss_list_and_names_no_version_of_its_own() -> None:
    used = set(re.findall(r"\)?\[([a-z,]+)\]\"", DOCKERFILE))
    assert used == {"gpu"} and used <= set(EXTRAS)
    assert "/deploy/faiss-gpu.sh python" in DOCKERFILE and "COPY deploy/faiss-gpu.txt deploy/faiss-gpu.sh" in DOCKERFILE
    assert not re.findall(rf"{NAME}==[0-9]", DOCKERFILE.replace("\n#", "\n")), "versions belong into pyproject.toml"


def test_docs_and_image_name_the_same_base_images_and_cuda_13() -> None:
    images = re.findall(r"^ARG \w+_IMAGE=(\S+)$", DOCKERFILE, flags=re.MULTILINE)
    compose = yaml.safe_load((ROOT / "deploy/compose.gpu.yaml").read_text())
    for image in [*images, compose["services"]["triton"]["image"]]:
        assert re.search(r":[^:]*\d+\.\d+", image), f"{image} is not pinned"
        assert f"`{image}`" in DOCS, image
    assert any(image.startswith("nvidia/cuda:13.") for image in images)


def test_one_faiss_at_most_comes_with_any_extra_and_none_with_the_base() -> None:
    builds = {"faiss-cpu", "faiss-gpu", "faiss-gpu-cu12", "faiss-gpu-cuvs"}
    assert not builds & names_of(PROJECT["dependencies"])
    for name, requirements in EXTRAS.items():
        assert len(builds & names_of(requirements)) == (name in ("cpu", "gpu")), name
    assert names_of(FAISS) & builds == {"faiss-gpu-cuvs"}


def test_the_faiss_script_removes_every_other_build_first() -> None:
    script = (ROOT / "deploy/faiss-gpu.sh").read_text()
    assert script.index('" uninstall ') < script.index('" install ')
    for build in ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12"):
        assert build in script.split('" uninstall')[1].splitlines()[0].split()
    subprocess.run(["bash", "-n", ROOT / "deploy/faiss-gpu.sh"], check=True)


# --- Dockerfile -----------------------------------------------------------------------------------


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    done = subprocess.run([tool("hadolint"), ROOT / "Dockerfile.gpu"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_image_runs_as_nobody_answers_health_and_gets_sigterm() -> None:
    stage = last_stage()
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", stage["USER"][-1])
    assert json.loads(stage["ENTRYPOINT"][-1]) == ["liverank"] and json.loads(stage["CMD"][-1]) == ["serve"]
    assert stage["STOPSIGNAL"] == ["SIGTERM"]
    (check,) = stage["HEALTHCHECK"]
    command = json.loads(check[check.index("CMD ") + 4 :])
    assert command == ["python", "-m", "server.doctor.health", "127.0.0.1:7710"]
    assert "liverank" in PROJECT["scripts"]


def test_every_file_the_image_copies_exists_and_is_let_through() -> None:
    ignored = (ROOT / "Dockerfile.gpu.dockerignore").read_text().splitlines()
    for name, rest in instructions(DOCKERFILE):
        if name == "COPY" and not rest.startswith("--from="):
            *sources, _ = rest.split()
            for source in sources:
                assert (ROOT / source).exists(), source
                assert f"!{source}" in ignored, source
    built = PROJECT_BUILD["hooks"]["custom"]["path"], *PROJECT_BUILD["packages"]
    for path in built:
        assert f"!{path.split('/')[0]}" in ignored, path


def test_nothing_in_the_image_looks_like_a_secret() -> None:
    for text in (DOCKERFILE, (ROOT / "deploy/compose.gpu.yaml").read_text()):
        assert not re.search(r"(?i)(password|secret|token|api_key|private_key)\s*[=:]", text)


def settings_from(environment: dict[str, str]) -> Any:
    """What a server makes of LIVERANK_ variables."""
    sections: dict[str, dict[str, str]] = {}
    for name, value in environment.items():
        if name.startswith("LIVERANK_"):
            section, _, key = name.removeprefix("LIVERANK_").lower().partition("__")
            sections.setdefault(section, {})[key] = value
    return parse_settings(sections)  # type: ignore[arg-type]


def test_the_settings_of_image_and_compose_file_are_known_ones() -> None:
    variables = dict(re.findall(r"(LIVERANK_\w+)=(\S+)", " ".join(last_stage()["ENV"])))
    with pytest.raises(ConfigError, match=r"is not loopback, and security\.cert_file and security\.access_file"):
        settings_from(variables)  # the image alone lets nobody in
    image = settings_from({**variables, "LIVERANK_SECURITY__ALLOW_INSECURE_PUBLIC": "true"})
    assert image.device.kind == "cuda" and image.serve.host == "0.0.0.0"
    assert f"{image.log.path.parent}" in last_stage()["VOLUME"][0]
    compose = yaml.safe_load((ROOT / "deploy/compose.gpu.yaml").read_text())
    both = settings_from({**variables, **compose["services"]["liverank"]["environment"]})
    assert both.security.allow_insecure_public and both.metrics_host == "0.0.0.0"
    assert both.scoring.mode == "triton" and both.scoring.transport == "system_shm"


# --- compose --------------------------------------------------------------------------------------


def test_the_compose_file_is_valid() -> None:
    command = [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", ROOT / "deploy/compose.gpu.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_compose_publishes_on_loopback_shares_memory_and_gives_no_rights() -> None:
    compose = yaml.safe_load((ROOT / "deploy/compose.gpu.yaml").read_text())
    services = compose["services"]
    for name, service in services.items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and "privileged" not in service, name
        assert service["user"] == services["liverank"]["user"] != "0:0", "regions can be opened by their owner only"
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert "shm:/dev/shm" in service["volumes"], name
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"], name
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (ROOT / "deploy" / source).exists(), volume
    assert services["liverank"]["depends_on"]["triton"]["condition"] == "service_healthy"
    stop_s = int(services["liverank"]["stop_grace_period"].removesuffix("s"))
    assert stop_s * 1000 > parse_settings({}).serve.drain_grace_ms, "a drain must not be cut off"


# --- health ---------------------------------------------------------------------------------------


def test_the_health_command_says_serving_or_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running_app(tmp_path) as client:
        address = f"127.0.0.1:{client.app.port}"
        assert health.main([address]) == 0 and capsys.readouterr().out == "SERVING\n"
    assert health.main([address]) == 1 and "no liverank answers" in capsys.readouterr().out
    assert health.main([]) == health.main(["7710"]) == 2
