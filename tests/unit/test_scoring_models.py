"""Model configuration, the in-process scorer, and what each gRPC status means. No Triton needed."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc

from server.errors import (
    BadScores,
    ConfigError,
    SchemaMismatch,
    ScorerTimeout,
    ScorerUnavailable,
    ScoringError,
)
from server.scoring.local import LocalScorer
from server.scoring.model_config import check_config, parse_config, render_config
from server.scoring.triton import STATUS_TO_ERROR, TritonScorer
from tests import triton_server as ts

F = ts.N_FEATURES


def features(rows: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).uniform(0, 1, (rows, F)).astype(np.float32)


def test_a_rendered_config_says_what_was_asked_and_is_accepted() -> None:
    config = parse_config(render_config("abc123", 34, {"ndcg_at_10": 0.51234567}))
    assert (config.name, config.platform, config.max_batch_size) == ("trendiness", "onnxruntime_onnx", 0)
    assert list(config.input[0].dims) == [-1, 34]
    assert list(config.output[0].dims) == [-1]
    assert config.version_policy.latest.num_versions > 1
    assert not config.HasField("dynamic_batching"), "stalls when max_batch_size is 0"
    assert config.parameters["metric.ndcg_at_10"].string_value == "0.512346"
    check_config(config, "trendiness", "abc123", 34)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (('x" }', 3), "schema_hash"),
        (("", 3), "schema_hash"),
        (("x", 0), "n_features"),
        (("x", 3, {"a b": 1.0}), "a b"),
    ],
)
def test_what_cannot_be_written_is_refused(arguments: tuple[Any, ...], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        render_config(*arguments)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (("abc", "xyz"), SchemaMismatch, "'xyz'.*'abc'"),
        (("feature_schema", "other_key"), SchemaMismatch, r"\(none\)"),
        (("-1, 4", "-1, 5"), SchemaMismatch, "5 features per row.*has 4"),
        (('"trend"', '"score"'), BadScores, "score.*trend"),
        (('"features"', '"x"'), BadScores, "'x'"),
        (("TYPE_FP32 dims: [ -1 ]", "TYPE_FP64 dims: [ -1 ]"), BadScores, "TYPE_FP32"),
        (("max_batch_size", "{"), SchemaMismatch, "not a model configuration"),
    ],
)
def test_each_way_a_config_can_be_unfit_is_refused(
    change: tuple[str, str], error: type[ScoringError], told: str
) -> None:
    text = render_config("abc", 4)
    assert change[0] in text
    with pytest.raises(error, match=told):
        check_config(parse_config(text.replace(*change)), "trendiness", "abc", 4)


def local(path: Path) -> LocalScorer:
    return LocalScorer(path, "m", ts.SCHEMA, F)


def test_local_without_a_model_is_unavailable_until_one_appears(tmp_path: Path) -> None:
    scorer = local(tmp_path)
    with pytest.raises(ScorerUnavailable, match="holds no"):
        scorer.score(features(2), 1.0)
    ts.put_model(tmp_path, "m", ts.small_net())
    assert scorer.score(features(2), 5.0).model_version == "m/1"


def test_local_takes_the_highest_version_by_number_and_follows_a_newer_one(tmp_path: Path) -> None:
    for version in (2, 10):
        ts.put_model(tmp_path, "m", ts.small_net(seed=version), version)
    scorer = local(tmp_path)
    assert scorer.score(features(2), 5.0).model_version == "m/10"
    ts.put_model(tmp_path, "m", ts.small_net(seed=11), 11)
    assert scorer.score(features(2), 5.0).model_version == "m/11"


def test_local_keeps_the_old_version_when_the_new_one_is_unfit(tmp_path: Path) -> None:
    ts.put_model(tmp_path, "m", ts.small_net())
    scorer = local(tmp_path)
    scorer.score(features(2), 5.0)
    ts.put_model(tmp_path, "m", ts.small_net(schema="another"), version=2)
    assert scorer.score(features(2), 5.0).model_version == "m/1"
    fresh = local(tmp_path)
    with pytest.raises(SchemaMismatch, match=r"m/2.*'another'"):
        fresh.score(features(2), 5.0)


def test_local_stops_a_slow_model_at_the_deadline(tmp_path: Path) -> None:
    ts.put_model(tmp_path, "m", ts.endless())
    started = time.monotonic()
    with pytest.raises(ScorerTimeout):
        local(tmp_path).score(features(2), 0.3)
    assert time.monotonic() - started < 30.0, "it would go on for minutes"


@pytest.mark.parametrize(("model", "error"), [(b"not a model", ScorerUnavailable), (ts.two_columns_out(), BadScores)])
def test_local_refuses_what_triton_refuses(tmp_path: Path, model: Any, error: type[ScoringError]) -> None:
    ts.put_model(tmp_path, "m", ts.small_net() if isinstance(model, bytes) else model)
    if isinstance(model, bytes):
        (tmp_path / "m" / "1" / "model.onnx").write_bytes(model)
    with pytest.raises(error):
        local(tmp_path).score(features(2), 5.0)


def test_local_without_a_config_is_unavailable(tmp_path: Path) -> None:
    ts.put_model(tmp_path, "m", ts.small_net())
    (tmp_path / "m" / "config.pbtxt").unlink()
    with pytest.raises(ScorerUnavailable, match=r"config\.pbtxt"):
        local(tmp_path).score(features(2), 5.0)


def test_features_of_another_width_are_a_schema_mismatch(tmp_path: Path) -> None:
    ts.put_model(tmp_path, "m", ts.small_net())
    shutil.rmtree(tmp_path / "m" / "1")
    for scorer in (local(tmp_path), TritonScorer("127.0.0.1:1", "m", ts.SCHEMA, F)):
        with pytest.raises(SchemaMismatch, match=r"\(2, 5\)"):
            scorer.score(np.zeros((2, 5), np.float32), 1.0)


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Says over real gRPC whatever the test wants: Triton cannot be made to give every status."""

    def __init__(self) -> None:
        self.status: grpc.StatusCode | None = None
        self.datatype, self.shape, self.content = "FP32", [2], np.array([0.25, 0.75], np.float32).tobytes()
        self.reloads: list[str] = []

    def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        config = parse_config(render_config(ts.SCHEMA, F, model_name="m"))
        return service_pb2.ModelConfigResponse(config=config)

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        if self.status is not None:
            context.abort(self.status, "as the test wants")
        tensor = service_pb2.ModelInferResponse.InferOutputTensor(
            name="trend", datatype=self.datatype, shape=self.shape
        )
        return service_pb2.ModelInferResponse(
            model_name="m", model_version="4", outputs=[tensor], raw_output_contents=[self.content]
        )

    def RepositoryModelUnload(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.reloads.append("unload")
        return service_pb2.RepositoryModelUnloadResponse()

    def RepositoryModelLoad(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.reloads.append("load")
        return service_pb2.RepositoryModelLoadResponse()


@pytest.fixture
def fake() -> Iterator[tuple[FakeTriton, TritonScorer]]:
    servicer = FakeTriton()
    server = grpc.server(ThreadPoolExecutor(2))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    scorer = TritonScorer(f"127.0.0.1:{port}", "m", ts.SCHEMA, F)
    yield servicer, scorer
    scorer.close()
    server.stop(None)


def test_the_table_knows_every_status_grpc_has() -> None:
    assert set(STATUS_TO_ERROR) == {code.name for code in grpc.StatusCode} - {"OK"}


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_each_status_becomes_its_error_and_the_scorer_goes_on(
    code: grpc.StatusCode, fake: tuple[FakeTriton, TritonScorer]
) -> None:
    servicer, scorer = fake
    servicer.status = code
    with pytest.raises(ScoringError, match=f"{code.name}: as the test wants") as caught:
        scorer.score(features(2), 5.0)
    assert type(caught.value) is STATUS_TO_ERROR[code.name]
    servicer.status = None
    answer = scorer.score(features(2), 5.0)
    assert (answer.values.tolist(), answer.model_version) == ([0.25, 0.75], "m/4")


@pytest.mark.parametrize(
    ("field", "value"),
    [("datatype", "FP64"), ("shape", [2, 1]), ("shape", [3]), ("content", b"\0" * 7), ("datatype", "NONE")],
)
def test_a_malformed_tensor_is_bad_scores(field: str, value: Any, fake: tuple[FakeTriton, TritonScorer]) -> None:
    servicer, scorer = fake
    setattr(servicer, field, value)
    with pytest.raises(BadScores, match="m/4 answered"):
        scorer.score(features(2), 5.0)


def test_reloads_happen_after_three_internal_errors_then_ever_more_rarely(
    fake: tuple[FakeTriton, TritonScorer],
) -> None:
    servicer, scorer = fake
    servicer.status = grpc.StatusCode.INTERNAL
    reloads_after = []
    for failures in range(1, 15):
        with pytest.raises(ScorerUnavailable):
            scorer.score(features(2), 5.0)
        ts.eventually(lambda: not scorer._is_healing())
        if scorer.heals > len(reloads_after):
            reloads_after.append(failures)
    assert reloads_after == [3, 6, 12]
    assert servicer.reloads == ["unload", "load"] * 3


def test_nobody_listening_is_unavailable_at_once_and_a_closed_scorer_stays_closed() -> None:
    scorer = TritonScorer(f"127.0.0.1:{_unused_port()}", "m", ts.SCHEMA, F)
    started = time.monotonic()
    with pytest.raises(ScorerUnavailable):
        scorer.score(features(2), 60.0)
    assert time.monotonic() - started < 30.0, "waited for its deadline"
    scorer.close()
    scorer.close()
    with pytest.raises(ScorerUnavailable, match="closed"):
        scorer.score(features(2), 5.0)


def _unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
