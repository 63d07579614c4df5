"""The training loop: stopped and gone on with, refused on other data, and shared by several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from models.training import FitSettings, Objective, OtherTraining, descend, one_thread  # noqa: E402

ROOT = Path(__file__).parents[2]
SETTINGS = FitSettings(max_epochs=6, patience_epochs=3, batch_rows=64)


class Line(Objective):
    """A small net with dropout that is fitted to a noisy curve; it can be told to die after some epochs."""

    def __init__(self, seed: int = 0, dies_after: int = 99) -> None:
        torch.manual_seed(seed)
        layers = (torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
        super().__init__(torch.nn.Sequential(*layers), 300)
        rng = np.random.default_rng(seed)
        self._x = torch.from_numpy(rng.standard_normal((400, 1)).astype(np.float32))
        self._y = torch.sin(self._x) + 0.1 * torch.from_numpy(rng.standard_normal((400, 1)).astype(np.float32))
        self._left, self._seed = dies_after, seed

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return ((self.model(self._x[rows]) - self._y[rows]) ** 2).mean()

    def held_out(self) -> float:
        if self._left == 0:
            raise KeyboardInterrupt
        self._left -= 1
        return float(((self.model(self._x[300:]) - self._y[300:]) ** 2).mean())

    def digest(self) -> str:
        return f"line {self._seed}"


def weights(objective: Objective) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in objective.model.parameters()])


def test_a_training_that_was_stopped_and_gone_on_with_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole, stopped, again = Line(), Line(dies_after=3), Line()
    with one_thread():
        course = descend(whole, SETTINGS, 1)
        with pytest.raises(KeyboardInterrupt):
            descend(stopped, SETTINGS, 1, checkpoint=tmp_path / "line.ckpt")
        assert not torch.equal(weights(stopped), weights(whole))
        said: list[str] = []
        resumed = descend(again, SETTINGS, 1, said.append, checkpoint=tmp_path / "line.ckpt")
    assert "going on after epoch 3" in said[0] and resumed == course
    assert torch.equal(weights(again), weights(whole))
    assert [p.name for p in tmp_path.iterdir()] == ["line.ckpt"]  # nothing half written is left


def test_a_finished_training_is_not_trained_again(tmp_path: Path) -> None:
    first, second = Line(), Line(dies_after=0)
    descend(first, SETTINGS, 1, checkpoint=tmp_path / "c")
    descend(second, SETTINGS, 1, checkpoint=tmp_path / "c")
    assert torch.equal(weights(first), weights(second))


@pytest.mark.parametrize(
    ("objective", "settings", "seed", "named"),
    [
        (Line(seed=5), SETTINGS, 1, "data"),
        (Line(), SETTINGS, 2, "seed"),
        (Line(), replace(SETTINGS, learning_rate=0.1), 1, "learning_rate"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(
    tmp_path: Path, objective: Line, settings: FitSettings, seed: int, named: str
) -> None:
    descend(Line(), replace(SETTINGS, max_epochs=1), 1, checkpoint=tmp_path / "other")
    descend(Line(), SETTINGS, 1, checkpoint=tmp_path / "c")
    before = (tmp_path / "c").read_bytes()
    with pytest.raises(OtherTraining, match=named):
        descend(objective, settings, seed, checkpoint=tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == before


def test_training_stops_when_nothing_is_gained_and_keeps_the_best_epoch() -> None:
    objective = Line()
    losses = iter([0.5, 0.3, 0.4, 0.35, 0.31, 0.2])
    seen: list[torch.Tensor] = []

    def held_out() -> float:
        seen.append(weights(objective).clone())
        return next(losses)

    objective.held_out = held_out  # type: ignore[method-assign]
    course = descend(objective, SETTINGS, 1)
    assert course.best == 2 and len(course.epochs) == 5 and course.held_out_loss == 0.3
    assert torch.equal(weights(objective), seen[1])


TOGETHER = """
import sys, torch
sys.path.insert(0, "tests/unit")
from test_models_loop import SETTINGS, Line, weights
from models.training import descend, one_thread
from models.workers import workers
with workers() as team, one_thread():
    objective = Line()
    objective.model[2].p = 0.0  # chance differs by worker; without it the sums are the same
    descend(objective, SETTINGS, 1, workers=team)
    torch.save(weights(objective), f"{sys.argv[1]}/{team.rank}-of-{team.size}.pt")
"""


def test_two_processes_train_the_model_that_one_trains(tmp_path: Path) -> None:
    program = tmp_path / "together.py"
    program.write_text(TOGETHER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, str(program), str(tmp_path)]
    done = subprocess.run(command, timeout=120, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2_000:]
    alone = Line()
    alone.model[2].p = 0.0
    with one_thread():
        descend(alone, SETTINGS, 1)
    one, two = (torch.load(tmp_path / name) for name in ("0-of-2.pt", "1-of-2.pt"))
    assert torch.equal(one, two)
    torch.testing.assert_close(one, weights(alone), rtol=1e-3, atol=1e-4)
    assert (weights(alone) - weights(Line())).abs().max() > 0.01


def test_the_loop_does_not_need_the_triton_language(tmp_path: Path) -> None:
    """Where it is not installed, our folder ``triton/`` is found in its place, and torch's compiler fails on it."""
    program = (
        "import sys, types, json\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.startswith('triton.'): raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "sys.modules['triton'] = types.ModuleType('triton')\n"
        "sys.path.insert(0, 'tests/unit')\n"
        "from test_models_loop import SETTINGS, Line\n"
        "from models.training import descend\n"
        "print(json.dumps(descend(Line(), SETTINGS, 1).best))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-800:]
    assert json.loads(done.stdout.splitlines()[-1]) >= 1
