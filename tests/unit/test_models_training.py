"""Fitting, calibration, metrics, export, and the model that is shipped."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from loadtest.world import WorldSettings  # noqa: E402
from models.calibration import fit_platt  # noqa: E402
from models.dataset import simulate  # noqa: E402
from models.evaluation import auc, calibration_error, log_loss, mean_overlaps, overlap, report  # noqa: E402
from models.export import TOLERANCE, ExportMismatch, build_graph, check_parity, publish  # noqa: E402
from models.fit import FitSettings  # noqa: E402
from models.telling import everything, only  # noqa: E402
from models.train import Trained, TrainSettings, headline, main, train  # noqa: E402
from models.trendiness import Trendiness, predict, scaling  # noqa: E402
from server.__main__ import main as liverank  # noqa: E402
from server.config import ScoringSettings, TableSettings  # noqa: E402
from server.live.features import FeatureSet  # noqa: E402
from server.scoring.local import LocalScorer  # noqa: E402
from server.scoring.model_config import SCHEMA_PARAMETER, parse_config  # noqa: E402

FEATURES = FeatureSet.load(TableSettings().features_file)
SHIPPED = ScoringSettings().model_repository
TINY = TrainSettings(minutes=45, streams=30, seed=3, platforms=1, fit=FitSettings(max_epochs=3))
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny() -> Trained:
    return train(TINY, FEATURES, lambda _: None)


def random_model(seed: int = 0) -> Trendiness:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    return Trendiness(*scaling(rng.lognormal(1.0, 2.0, (500, len(FEATURES))).astype(np.float32)))


def strange_rows() -> np.ndarray:
    """float32[n, F] of every size and sign, with infinities and NaN among them."""
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((300, len(FEATURES))) * 10.0 ** rng.uniform(-8, 12, (300, len(FEATURES)))
    for value in (np.nan, np.inf, -np.inf, 0.0, 3e38):
        rows[rng.random(rows.shape) < 0.03] = value
    rows[:3] = [[np.nan], [np.inf], [-np.inf]]
    return rows.astype(np.float32)


def test_training_twice_gives_the_same_numbers(tiny: Trained) -> None:
    again = train(TINY, FEATURES, lambda _: None)
    assert json.dumps(again.facts, sort_keys=True) == json.dumps(tiny.facts, sort_keys=True)
    for name, value in tiny.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_the_trained_model_is_published_and_served(tiny: Trained, tmp_path: Path) -> None:
    facts = {**tiny.facts, "unmeasured": float("nan")}
    for _ in range(2):  # a version may be replaced
        folder = publish(tmp_path, 4, tiny.model, FEATURES.schema, tiny.sample, facts, headline(tiny.facts))
    assert sorted(p.name for p in folder.iterdir()) == ["metrics.json", "model.onnx", "weights.npz"]
    assert sorted(p.name for p in folder.parent.iterdir()) == ["4", "config.pbtxt"]
    written = json.loads((folder / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert written["feature_schema"] == FEATURES.schema and written["unmeasured"] is None
    scorer = LocalScorer(tmp_path, "trendiness", FEATURES.schema, len(FEATURES))
    scores = scorer.score(tiny.sample, deadline_s=10.0)
    assert scores.model_version == "trendiness/4"
    np.testing.assert_allclose(scores.values, predict(tiny.model, tiny.sample), atol=TOLERANCE)


def test_weights_are_exported_again_as_the_same_graph(
    tiny: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = publish(tmp_path, 1, tiny.model, FEATURES.schema, tiny.sample, tiny.facts, headline(tiny.facts))
    command = ["model", "export", str(made / "weights.npz"), "--version", "2", "--out", str(tmp_path)]
    assert liverank(command) == 0
    again = tmp_path / "trendiness" / "2"
    assert (again / "model.onnx").read_bytes() == (made / "model.onnx").read_bytes()
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (made, again))
    on_sample = {"onnx_difference", "onnx_checked_rows"}
    assert {k: first[k] for k in first.keys() - on_sample} == {k: second[k] for k in second.keys() - on_sample}
    assert second["commit"] and second["onnx_checked_rows"] > 512
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 <= told["onnx_difference"] <= TOLERANCE and told["headline"]["auc"] == headline(tiny.facts)["auc"]
    known = onnxruntime.InferenceSession(again / "model.onnx").get_modelmeta().custom_metadata_map
    assert known["feature_schema"] == FEATURES.schema and float(known["metric.auc"]) == pytest.approx(
        told["headline"]["auc"], abs=1e-5
    )
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04")
    for path in (tmp_path / "broken.npz", tmp_path / "absent.npz", again / "metrics.json"):
        assert liverank(["model", "export", str(path), "--version", "3", "--out", str(tmp_path)]) == 2
        assert "not a file of trained weights" in capsys.readouterr().err
    assert not (tmp_path / "trendiness" / "3").exists()


def test_the_command_line_writes_a_repository(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--minutes", "40", "--streams", "25", "--platforms", "1", "--seed", "3"]
    assert main(["--out", str(tmp_path), "--version", "2", *small]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0.0 <= last["calibration_error"] <= 1.0
    assert (tmp_path / "trendiness" / "2" / "model.onnx").stat().st_size < 100_000


def test_graph_and_model_agree_on_any_input() -> None:
    model = random_model()
    model.slope.fill_(1.7)
    model.offset.fill_(-0.4)
    graph = build_graph(model, "abc").SerializeToString()
    assert check_parity(graph, model, strange_rows()) <= TOLERANCE
    scores = predict(model, strange_rows())
    assert np.isfinite(scores).all() and (scores >= 0).all() and (scores <= 1).all()
    assert predict(model, strange_rows()[:0]).shape == (0,)


def test_a_graph_that_computes_something_else_is_not_published(tmp_path: Path) -> None:
    model, other = random_model(0), random_model(5)
    with pytest.raises(ExportMismatch, match="differ"):
        check_parity(build_graph(other, "abc").SerializeToString(), model, strange_rows())
    with torch.no_grad():
        model.last.bias.fill_(float("nan"))
    with pytest.raises(ExportMismatch):
        publish(tmp_path, 1, model, "abc", strange_rows(), {}, {})
    assert not list(tmp_path.rglob("*.onnx"))


def test_platt_finds_the_distortion_it_undoes() -> None:
    rng = np.random.default_rng(2)
    true = rng.normal(-1.5, 1.5, 200_000)
    labels = rng.random(len(true)) < 1 / (1 + np.exp(-true))
    logits = ((true - 0.7) / 0.4).astype(np.float32)
    platt = fit_platt(logits, labels)
    assert platt.slope == pytest.approx(0.4, abs=0.02) and platt.offset == pytest.approx(0.7, abs=0.05)
    assert calibration_error(platt.apply(logits), labels) < 0.005
    assert calibration_error(1 / (1 + np.exp(-logits)), labels) > 0.05
    assert fit_platt(-logits, labels).slope > 0  # the order is never turned around
    with pytest.raises(ValueError, match="some positive"):
        fit_platt(logits, np.zeros(len(logits), bool))


def test_metrics_on_examples_computed_by_hand() -> None:
    labels = np.array([True, False, True, False])
    assert auc(np.array([0.9, 0.1, 0.5, 0.5]), labels) == pytest.approx((1 + 1 + 1 + 0.5) / 4)
    assert np.isnan(auc(np.zeros(2), np.ones(2, bool)))
    assert log_loss(np.array([0.5, 0.5, 0.5, 0.5]), labels) == pytest.approx(np.log(2))
    assert calibration_error(np.array([0.9, 0.1, 0.9, 0.1]), labels) == pytest.approx(0.1)
    assert calibration_error(np.array([1.0, 0.0, 1.0, 0.0]), labels) == 0.0
    assert overlap(np.array([4.0, 3, 2, 1]), np.array([1.0, 4, 2, 3]), k=2) == 0.5


def shipped() -> LocalScorer:
    return LocalScorer(SHIPPED, "trendiness", FEATURES.schema, len(FEATURES))


def test_the_shipped_model_is_built_for_the_current_features() -> None:
    config = parse_config((SHIPPED / "trendiness" / "config.pbtxt").read_text())
    assert config.parameters[SCHEMA_PARAMETER].string_value == FEATURES.schema
    facts = json.loads((SHIPPED / "trendiness" / "1" / "metrics.json").read_text())
    assert facts["feature_schema"] == FEATURES.schema and tuple(facts["features"]) == FEATURES.names
    assert (SHIPPED / "trendiness" / "1" / "model.onnx").stat().st_size < 100_000


def test_the_shipped_model_beats_the_baselines_on_a_fresh_platform() -> None:
    world = WorldSettings(seed=98_765, target_live=120, step_ms=5_000, heartbeat_ms=10_000, embedding_dim=4)
    full, sparse = simulate(world, 35, FEATURES, [everything, only("likes", gauge_every=6)])
    scorer = shipped()
    found = report(full, scorer.score(full.features, 10.0).values, FEATURES.names)
    assert found["auc"]["model"] > 0.05 + max(v for k, v in found["auc"].items() if k != "model")
    assert found["calibration_error"] < 0.05
    for rows, margin in ((full, 0.1), (sparse, 0.02)):
        scores = {"model": scorer.score(rows.features, 10.0).values, "viewers": rows.features[:, 2]}
        overlaps = mean_overlaps(rows, scores)
        for kind in ("target", "absolute", "relative"):
            assert overlaps["model"][kind] > overlaps["viewers"][kind] + margin, (kind, overlaps)


def test_the_shipped_model_is_calm_where_it_knows_nothing() -> None:
    rows = strange_rows()
    rows[0] = 0.0
    rows[1] = [1.0 if "velocity" in n or "acceleration" in n else 0.0 for n in FEATURES.names]  # just begun
    scores = shipped().score(rows, 10.0).values
    assert np.isfinite(scores).all()
    assert scores[0] < 0.3 and 0.02 < scores[1] < 0.3


def test_serving_imports_neither_torch_nor_this_package() -> None:
    for path in [*(ROOT / "server").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names.append(node.module or "")
            for name in names:
                assert name.split(".")[0] not in ("models", "onnx"), f"{path} imports {name}"


def test_a_report_of_few_streams_says_so_instead_of_failing() -> None:
    world = WorldSettings(seed=1, target_live=5, n_creators=100, step_ms=5_000, heartbeat_ms=10_000, embedding_dim=4)
    rows = simulate(replace(world, mean_session_ms=300_000), 8, FEATURES, [everything])[0]
    found = report(rows, np.full(len(rows), 0.1, np.float32), FEATURES.names)
    assert np.isnan(found["overlap_at_10"]["model"]["target"])
