"""From dataset files to what a ranker takes; the split by time; trained, published and reported by commands."""

from __future__ import annotations

import itertools
import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

import onnxruntime  # noqa: E402

from loadtest.world import WorldSettings  # noqa: E402
from models import train_ranker, train_two_tower  # noqa: E402
from models.experiment import metrics_hash  # noqa: E402
from models.impressions import (  # noqa: E402
    concatenate_impressions,
    impressions_of,
    segments,
    split_impressions,
)
from models.ranking_data import RankingData, SimulationSettings, simulated  # noqa: E402
from models.schema import read_rows  # noqa: E402
from models.simulated_impressions import Policy, simulate_impressions  # noqa: E402
from models.synthetic import make_synthetic  # noqa: E402
from models.training_report import page  # noqa: E402
from server.config import ScoringSettings, TableSettings  # noqa: E402
from server.live.features import FeatureSet  # noqa: E402
from server.scoring.ranker_schema import CODE_BUCKETS, NEUTRAL_POSITION, bucket_of  # noqa: E402
from tests.made_impressions import make_impressions  # noqa: E402

FEATURES = FeatureSet.load(TableSettings().features_file)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    make_synthetic(path, "impressions", 3_000, 1)
    return path


def test_rows_of_a_file_come_out_as_they_were_written(file: Path) -> None:
    table = read_rows(file)
    rows = impressions_of(table, {"viewer-3": np.full(16, 0.25, np.float32)})
    assert len(rows) == 3_000
    np.testing.assert_array_equal(rows.position, table["position"] + 1)  # the net counts from 1
    names = [str(name) for name in table["creator"][:50]]
    np.testing.assert_array_equal(rows.codes[:50, 2], bucket_of(names, CODE_BUCKETS[2]))
    inputs = rows.inputs(np.arange(200))
    assert (inputs.position == NEUTRAL_POSITION).all()
    of_viewer = table["viewer_id"][:200] == "viewer-3"
    np.testing.assert_array_equal(inputs.viewer_embedding[inputs.viewer_of].any(1), of_viewer)
    np.testing.assert_array_equal(rows.labels(slice(None), 600.0)[:, 0], table["clicked"])


def test_rows_of_one_reply_share_its_viewer_and_other_replies_do_not() -> None:
    rows = make_impressions(100, 0)
    inputs = rows.inputs(np.arange(100))
    assert len(inputs.viewer_embedding) == 10 and inputs.viewer_of.tolist() == rows.asking.tolist()
    some = rows.inputs(np.array([95, 3, 4]))
    np.testing.assert_array_equal(some.viewer_embedding[some.viewer_of[0]], rows.askings.embedding[9])
    assert len(some.viewer_embedding) == 2


def test_no_label_of_a_part_looks_into_the_next_part() -> None:
    rows = make_impressions(5_000, 0)
    split = split_impressions(rows, gap_ms=2_000)
    parts = [split.fit, split.stop, split.calibrate, split.test]
    for before, after in itertools.pairwise(parts):
        assert before.at_ms.max() + 2_000 <= after.at_ms.min() + 100
    assert len(split.fit) > 0.5 * len(rows)
    with pytest.raises(ValueError, match="too few"):
        split_impressions(rows, gap_ms=60_000)


def test_parts_put_together_keep_their_own_viewers_and_streams() -> None:
    parts = [make_impressions(100, 0), make_impressions(60, 1)]
    both = concatenate_impressions(parts)
    assert len(both) == 160 and len(both.askings) == 16
    assert not np.isin(both.stream[100:], both.stream[:100]).any()
    assert not np.isin(both.askings.viewer[10:], both.askings.viewer[:10]).any()
    for one, other in ((both.inputs(np.arange(100, 160)), parts[1].inputs(slice(None))),):
        for f in fields(one):
            np.testing.assert_array_equal(getattr(one, f.name), getattr(other, f.name))


def test_segments_of_age_and_size_cover_all_rows_once() -> None:
    rows = make_impressions(1_000, 0)
    found = segments(rows, rows.features[:, 0] * 20, {1: "one", 2: "two", 3: "three"})
    for one, other in (("new streams", "old streams"), ("head creators", "tail creators")):
        assert (found[one] ^ found[other]).all()
    assert {"language one", "language two", "language three"} < set(found)
    head = np.unique(rows.creator[found["head creators"]])
    assert 0 < len(head) <= 25 and found["head creators"].mean() >= 0.5


def test_the_command_trains_on_a_file_and_its_models_can_be_served(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.ranking_data.split_impressions", lambda rows: split_impressions(rows, 100))
    hashes = []
    for attempt in ("a", "b"):
        out = tmp_path / attempt
        given = ["--rows", str(file), "--out", str(out), "--report", str(out / "r.html"), "--epochs", "1"]
        assert train_ranker.main(given) == 0
        hashes.append(json.loads(capsys.readouterr().out.splitlines()[-1])["metrics_hash"])
        assert sorted(p.name for p in (out / "ranker" / "1").iterdir()) == ["experiment.json", "model.onnx"]
    assert hashes[0] == hashes[1]  # the same command, the same metrics
    said = json.loads((tmp_path / "a" / "ranker" / "1" / "experiment.json").read_text(), parse_constant=pytest.fail)
    assert said["feature_schema"] == FEATURES.schema and said["metrics_hash"] == metrics_hash(said["metrics"])
    assert said["settings"]["data"]["data_hash"] == read_rows(file).metadata["data_hash"]
    session = onnxruntime.InferenceSession(tmp_path / "a" / "ranker" / "1" / "model.onnx")
    inputs = impressions_of(read_rows(file)).inputs(np.arange(30)).tensors()
    assert session.run(["heads"], inputs)[0].shape == (30, 4)
    html = (tmp_path / "a" / "r.html").read_text()
    assert html.count("<svg") >= 6 and "tail creators" in html and "http" not in html

    assert train_two_tower.main([*given[:2], "--out", str(tmp_path / "t"), "--report", str(tmp_path / "t.html")]) == 0
    assert {p.name for p in (tmp_path / "t").iterdir()} == {"stream_tower", "viewer_tower"}


def test_other_rows_are_refused_with_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_synthetic(tmp_path / "streams.parquet", "streams", 100, 1)
    assert train_ranker.main(["--rows", str(tmp_path / "streams.parquet"), "--out", str(tmp_path)]) == 2
    assert "rows of impressions wanted" in capsys.readouterr().err


def test_a_report_of_nothing_measured_says_so() -> None:
    facts = {
        "model": "<x>", "data_hash": "", "feature_schema": "", "metrics_hash": "", "parameters": 0, "best_epoch": 1,
        "commit": "", "epochs": [{"train_loss": float("nan"), "held_out_loss": float("nan")}],
        "metrics": {}, "settings": {},
    }  # fmt: skip
    assert "Nothing was measured" in page(facts) and "<x>" not in page(facts)


# --- on a simulated platform, where the truth is known ----------------------------------------


@pytest.fixture(scope="module")
def platform() -> RankingData:
    size = SimulationSettings(platforms=1, minutes=130, streams=60, embedding_dim=8, askings_per_minute=40, seed=5)
    return simulated(size, FEATURES, lambda _: None)


def test_simulated_rows_are_of_the_past_and_the_same_each_time() -> None:
    world = WorldSettings(seed=3, target_live=30, step_ms=5_000, heartbeat_ms=10_000, embedding_dim=4, n_creators=200)
    one, two = (simulate_impressions(world, 4, FEATURES, Policy(5, 10, viewers=20)) for _ in range(2))
    assert one.digest() == two.digest() and len(one) == 4 * 5 * 10
    slate = one.asking == 7
    assert sorted(one.position[slate]) == list(range(1, 11)) and len(np.unique(one.stream[slate])) == 10
    assert (one.askings.sequence_meta[:5, :, 3] == 0).all()  # nobody has a history at first
    ages = one.askings.sequence_meta[..., 0][one.askings.sequence_meta[..., 3] > 0]
    assert (ages > 0).all()  # nothing of this very minute is known


def test_the_ranker_earns_more_than_trendiness_and_finds_the_planted_effect(platform: RankingData) -> None:
    trend = train_ranker.trend_of_repository(ScoringSettings().model_repository, FEATURES)
    trained = train_ranker.train_ranker(
        platform, FEATURES, train_ranker.RankerSettings(), 7, lambda _: None, trend
    )  # fmt: skip
    metrics = trained.facts["metrics"]
    assert metrics["orders"]["ranker_purchase"]["value_minus_trendiness"]["low"] > 0.0
    assert metrics["places"]["exponent"] == pytest.approx(metrics["places"]["planted_exponent"], rel=0.1)
    assert metrics["places"]["mean_relative_error"] < 0.1
    assert metrics["heads"]["click"]["calibration_error"]["value"] < 0.01
