"""The models in the repository: their records are of these weights, and they keep what they promise."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

import onnxruntime  # noqa: E402

from models.experiment import metrics_hash  # noqa: E402
from models.export import GRAPH_HASH, graph_hash  # noqa: E402
from models.processes import each_in, processes  # noqa: E402
from models.ranking_data import SimulationSettings, play  # noqa: E402
from server.config import ScoringSettings, TableSettings  # noqa: E402
from server.live.features import FeatureSet  # noqa: E402
from server.scoring.model_config import check_config, parse_config  # noqa: E402
from server.scoring.ranker_config import check_ranker_config  # noqa: E402
from server.scoring.ranker_local import LocalRanker  # noqa: E402
from server.scoring.ranker_schema import HEADS, empty_inputs  # noqa: E402

FEATURES = FeatureSet.load(TableSettings().features_file)
DIM = TableSettings().embedding_dim
SHIPPED = ScoringSettings().model_repository
RECORDS = {"trendiness": "metrics.json", **dict.fromkeys(("ranker", "stream_tower", "viewer_tower"), "experiment.json")}


def record_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((SHIPPED / name / "1" / RECORDS[name]).read_text(), parse_constant=pytest.fail)
    return found


@pytest.mark.parametrize("name", RECORDS)
def test_the_record_is_of_the_weights_beside_it(name: str) -> None:
    record = record_of(name)
    assert record[GRAPH_HASH] == graph_hash((SHIPPED / name / "1" / "model.onnx").read_bytes())
    assert record["feature_schema"] == FEATURES.schema
    assert record.get("metrics_hash", metrics_hash(record["metrics"])) == metrics_hash(record["metrics"])


def test_what_is_shipped_is_small() -> None:
    assert set(RECORDS) == {path.name for path in SHIPPED.iterdir() if path.is_dir()}
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) < 3_000_000


def test_a_server_with_its_default_settings_can_use_each() -> None:
    def config(name: str) -> Any:
        return parse_config((SHIPPED / name / "config.pbtxt").read_text())

    check_config(config("trendiness"), "trendiness/1", FEATURES.schema, len(FEATURES))
    check_ranker_config(config("ranker"), "ranker/1", FEATURES.schema, len(FEATURES), DIM)
    found = LocalRanker(SHIPPED, "ranker", FEATURES.schema, len(FEATURES), DIM).heads(
        empty_inputs(3, len(FEATURES), DIM), 20.0
    )
    assert found.model_version == "ranker/1" and found.values.shape == (3, len(HEADS))
    stream = onnxruntime.InferenceSession(SHIPPED / "stream_tower" / "1" / "model.onnx")
    given = {"stream_embedding": np.eye(2, DIM, dtype=np.float32), "codes": np.zeros((2, 3), np.int64)}
    assert stream.run(["embedding"], given)[0].shape == (2, DIM)


def test_the_ranker_earns_more_than_trendiness_and_knows_the_planted_places() -> None:
    metrics = record_of("ranker")["metrics"]
    assert metrics["orders"]["ranker_purchase"]["value_minus_trendiness"]["low"] > 0.0
    assert metrics["places"]["largest_relative_error"] < 0.1


def test_platforms_played_in_other_processes_are_the_same() -> None:
    size = SimulationSettings(platforms=2, minutes=3, streams=20, embedding_dim=4, askings_per_minute=4)
    with processes(2) as pool:
        elsewhere = [rows.digest() for rows in each_in(pool)(partial(play, size, FEATURES), range(2))]
    here = [play(size, FEATURES, number).digest() for number in range(2)]
    assert elsewhere == here and here[0] != here[1]
