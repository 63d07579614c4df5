"""Training the growth recipe, its versions, and `liverank model evaluate` on a small made-up history."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from models.export import ExportMismatch  # noqa: E402
from models.growth import export  # noqa: E402
from models.growth.features import NAMES, OWN  # noqa: E402
from models.growth.fit import RECIPES, Recipe  # noqa: E402
from models.growth.net import Ensemble, GrowthNet, predict  # noqa: E402
from models.growth.outlook_net import Outlooks, outlook_net  # noqa: E402
from models.growth.score import OUTLOOK, PLACES  # noqa: E402
from server.__main__ import main  # noqa: E402
from tests.histories import Row, broadcast, in_time, write_csv  # noqa: E402

FORMULAS = {"viewers_now", "viewers_change_15m", "likes_per_viewer", "mastodon", "hacker_news", "reddit_hot",
            "ewma_growth"}  # fmt: skip


def waves(streams: int = 36, minutes: int = 300) -> list[Row]:
    """Crowds that swell and ebb in an hour, each at its own time: what rose most is at its crest, and falls next."""
    rng = np.random.default_rng(2)
    rows: list[Row] = []
    for i in range(streams):
        size, phase = 60 + 12 * i, rng.uniform(0, 2 * math.pi)
        wave = 1 + 0.4 * np.sin(2 * math.pi * np.arange(minutes) / 60 + phase)
        viewers = np.maximum(size * wave + rng.normal(0, 2, minutes), 1).astype(int).tolist()
        rows += broadcast(f"s{i:02d}", 60 * (i % 5), viewers, likes_delta=int(rng.integers(0, 3)))
    return in_time(rows)


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("growth") / "waves.csv", waves())


@pytest.fixture(params=[PLACES, OUTLOOK])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "small", Recipe(request.param, nets=2, every=3, epochs=5))


def test_published_recipes_are_what_they_were() -> None:
    assert {
        "growth-1": Recipe(PLACES, 6, 3, 12, 512, 5e-3, 1e-2, 7),
        "growth-2": Recipe(OUTLOOK, 6, 3, 24, 512, 3e-3, 1e-2, 7),
    } == RECIPES


def evaluate(events: Path, version: str, capsys: pytest.CaptureFixture[str]) -> dict:
    assert main(["model", "evaluate", "--events", str(events), "--model", version]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.usefixtures("small")
def test_a_planted_signal_that_no_formula_sees_is_learned(events: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate(events, "small", capsys)
    for target in ("absolute_growth", "relative_growth"):
        assert found[target]["model"]["overlap10"] > found[target]["best_formula"]["overlap10"] + 0.2
        assert found[target]["difference_ci95"][0] > 0 and found[target]["difference_ndcg10_ci95"][0] > 0
        assert found[target]["holds"] is True
    assert found["viewers"]["holds"] is True


@pytest.mark.usefixtures("small")
def test_the_last_line_is_json_of_the_promised_shape_and_the_same_each_time(
    events: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluate(events, "small", capsys)
    for target in ("viewers", "absolute_growth", "relative_growth"):
        of = found[target]
        assert set(of) == {"model", "best_formula", "difference_ci95", "best_formula_ndcg10", "difference_ndcg10_ci95",
                           "holds"}  # fmt: skip
        assert set(of["model"]) == {"overlap10", "ndcg10"}
        assert set(of["best_formula"]) == {"name", "overlap10", "ndcg10"} and of["best_formula"]["name"] in FORMULAS
        low, high = of["difference_ci95"]
        assert low <= of["model"]["overlap10"] - of["best_formula"]["overlap10"] <= high
    last_s = 60 * (300 - 1 + 4)
    assert found["cut_s"] == int(0.7 * last_s)
    # The last moment with 30 streams is 15 minutes before the first of them end.
    assert 60 <= found["test"]["moments"] <= (last_s - 900 - found["cut_s"]) // 60 + 1
    again = evaluate(events, "small", capsys)
    assert {**found, "seconds": 0} == {**again, "seconds": 0}


@pytest.mark.usefixtures("small")
def test_a_written_version_scores_as_the_recipe_that_was_trained_on_the_spot(
    events: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "1"
    command = ["model", "train-growth", "--events", str(events), "--recipe", "small", "--out", str(folder)]
    assert main(command) == 0
    capsys.readouterr()
    assert {p.name for p in folder.iterdir()} == {"model.onnx", "metrics.json"}
    written, trained = evaluate(events, str(folder), capsys), evaluate(events, "small", capsys)
    for target in ("viewers", "absolute_growth", "relative_growth"):
        assert written[target]["model"]["overlap10"] == pytest.approx(trained[target]["model"]["overlap10"], abs=0.002)

    assert main([*command, "--whole-file"]) == 0
    assert main(["model", "evaluate", "--events", str(events), "--model", str(folder)]) == 2
    assert "knows this file up to second" in capsys.readouterr().err


def test_unknown_versions_and_files_without_enough_streams_are_refused(
    events: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["model", "evaluate", "--events", str(events), "--model", "growth-99"]) == 2
    assert "growth-99" in capsys.readouterr().err
    assert main(["model", "evaluate", "--events", str(events), "--model", str(tmp_path)]) == 2
    assert "is no version of the growth model" in capsys.readouterr().err
    lonely = write_csv(tmp_path / "lonely.csv", broadcast("a", 0, [50] * 90))
    assert main(["model", "evaluate", "--events", str(lonely), "--model", "growth-1"]) == 2
    assert "no minute with 15 candidates" in capsys.readouterr().err
    assert main(["model", "evaluate", "--events", str(lonely), "--model", "growth-2"]) == 2
    assert "no minute with 30 candidates" in capsys.readouterr().err
    empty = write_csv(tmp_path / "small.csv", broadcast("a", 0, [5] * 90))
    assert main(["model", "evaluate", "--events", str(empty), "--model", "growth-1"]) == 2
    capsys.readouterr()
    assert main(["model", "evaluate", "--events", str(empty), "--model", "growth-2"]) == 2
    assert "no stream that can be ranked 15 minutes later" in capsys.readouterr().err


def random_model(learns: str = PLACES) -> Ensemble | Outlooks:
    torch.manual_seed(1)
    rng = np.random.default_rng(1)
    width = len(NAMES) if learns == PLACES else len(OWN)
    mean, scale = rng.normal(size=width).astype(np.float32), rng.uniform(0.5, 2.0, width).astype(np.float32)
    if learns == PLACES:
        return Ensemble([GrowthNet(mean + i, scale) for i in range(3)]).eval()
    swings = rng.normal(size=99).astype(np.float32)
    return Outlooks([outlook_net(mean + i, scale, swings) for i in range(3)]).eval()


@pytest.mark.parametrize("learns", [PLACES, OUTLOOK])
def test_the_graph_computes_what_torch_computes(learns: str, tmp_path: Path) -> None:
    model = random_model(learns)
    width = len(NAMES) if learns == PLACES else len(OWN)
    sample = np.random.default_rng(2).normal(0, 5, (200, width)).astype(np.float32)
    version = export.load(export.publish(tmp_path / "1", model, sample, {"known_until_s": 9}))
    assert version.learns == learns and version.facts["known_until_s"] == 9
    np.testing.assert_allclose(version.predict(sample), predict(model, sample), atol=1e-5)


def test_a_version_of_other_features_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = np.zeros((2, len(OWN)), np.float32)
    folder = export.publish(tmp_path / "1", random_model(OUTLOOK), sample, {})
    monkeypatch.setattr(export, "_FEATURES", {PLACES: NAMES, OUTLOOK: OWN[1:]})
    with pytest.raises(export.ConfigError, match="was built for feature schema"):
        export.load(folder)


def test_a_graph_that_differs_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "predict", lambda model, rows: predict(model, rows) + 0.1)
    with pytest.raises(ExportMismatch, match=r"differ by 0\.1"):
        export.publish(tmp_path / "1", random_model(), np.zeros((2, len(NAMES)), np.float32), {})
    assert not (tmp_path / "1").exists()


def test_a_folder_that_is_no_version_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(export.ConfigError, match="is no model version"):
        export.publish(tmp_path / "mine", random_model(), np.zeros((2, len(NAMES)), np.float32), {})
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "dear"
