"""Which code is being measured."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from loadtest import revision


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit, in the place of ours."""
    for name in ("code.py", "model_repository/model.onnx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    who = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.com")
    for command in (("init", "-q"), ("add", "."), (*who, "commit", "-q", "-m", "first")):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(revision, "ROOT", tmp_path)
    return tmp_path


def test_a_changed_file_makes_it_dirty(checkout: Path) -> None:
    clean = revision.commit()
    assert clean and revision.code_commit() == clean
    (checkout / "code.py").write_text("2")
    assert revision.commit() == revision.code_commit() == f"{clean}-dirty"


def test_models_that_were_just_trained_do_not_make_the_code_dirty_that_trains_them(checkout: Path) -> None:
    clean = revision.commit()
    (checkout / "model_repository" / "model.onnx").write_text("2")
    assert revision.code_commit() == clean and revision.commit() == f"{clean}-dirty"


def test_without_a_checkout_there_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revision, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert revision.commit() == revision.code_commit() == ""
    monkeypatch.setenv("PATH", "")
    assert revision.commit() == ""


def test_the_machine_is_told_with_its_cores_and_python() -> None:
    assert "cores, Python 3." in revision.machine()
