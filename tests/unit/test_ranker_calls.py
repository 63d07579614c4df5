"""The ranker: configuration, the in-process one, and how it is called. No Triton needed."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from server.clock import ManualClock
from server.config import RankerSettings
from server.errors import BadScores, ConfigError, SchemaMismatch, ScorerTimeout, ScorerUnavailable, ScoringError
from server.scoring.base import Scores
from server.scoring.model_config import parse_config
from server.scoring.ranker import RankerCaller
from server.scoring.ranker_config import check_ranker_config
from server.scoring.ranker_local import LocalRanker
from server.scoring.ranker_schema import (
    CODE_BUCKETS,
    INPUTS,
    RANKER_SCHEMA,
    SEQUENCE,
    RankerInputs,
    bucket_of,
    empty_inputs,
    missing_of,
)
from tests import rankers
from tests.events import T0
from tests.triton_server import eventually

F, D = 5, 4
SCHEMA = "schema-of-the-tests"


def random_inputs(rows: int = 7, viewers: int = 3, seed: int = 1) -> RankerInputs:
    """Inputs of which no two rows or viewers are alike."""
    random = np.random.default_rng(seed)

    def unit(*shape: int) -> np.ndarray[Any, Any]:
        made = random.normal(size=shape).astype(np.float32)
        return made / np.linalg.norm(made, axis=-1, keepdims=True)

    return RankerInputs(
        stream_features=random.normal(size=(rows, F)).astype(np.float32),
        stream_missing=random.integers(0, 2, (rows, F)).astype(np.float32),
        stream_embedding=unit(rows, D),
        codes=np.stack([random.integers(0, buckets, rows) for buckets in CODE_BUCKETS], axis=1),
        position=np.full((rows, 1), -1.0, np.float32),
        viewer_of=random.integers(0, viewers, rows),
        viewer_embedding=unit(viewers, D),
        sequence_embedding=unit(viewers, SEQUENCE, D),
        sequence_meta=random.uniform(0, 0.1, (viewers, SEQUENCE, 4)).astype(np.float32),
    )


def test_inputs_have_the_names_types_and_shapes_of_the_contract() -> None:
    for inputs, rows, viewers in ((random_inputs(), 7, 3), (empty_inputs(2, F, D), 2, 1)):
        sizes = {"R": rows, "V": viewers, "F": F, "D": D}
        for (name, tensor), (wanted, (kind, shape)) in zip(inputs.tensors().items(), INPUTS.items(), strict=True):
            assert name == wanted and tensor.dtype == kind
            assert tensor.shape == tuple(sizes[s] if isinstance(s, str) else s for s in shape)


def test_buckets_keep_zero_for_the_unknown_and_do_not_depend_on_the_machine() -> None:
    names = ["", *(f"name-{i}" for i in range(2_000))]
    buckets = bucket_of(names, 256)
    assert buckets[0] == 0 and buckets[1:].min() >= 1 and buckets.max() <= 255
    assert len(set(buckets.tolist())) > 250, "spread"
    assert bucket_of(["en", "id", "tokopedia"], 65_536).tolist() == [52293, 19794, 35326]


def test_a_stale_feature_counts_as_missing() -> None:
    assert missing_of(np.array([[0, 1, 2]], np.uint8)).tolist() == [[0.0, 1.0, 1.0]]


def test_a_rendered_config_is_accepted() -> None:
    config = parse_config(rankers.config_of(SCHEMA, F, D))
    check_ranker_config(config, "ranker", SCHEMA, F, D)
    assert config.parameters["ranker_schema"].string_value == RANKER_SCHEMA and config.max_batch_size == 0
    config.output.add(name="watch_seconds", data_type="TYPE_FP32", dims=[-1])
    check_ranker_config(config, "ranker", SCHEMA, F, D)  # it may answer more than is asked for


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ((SCHEMA, "xyz"), SchemaMismatch, "feature_schema 'xyz'.*'schema-of-the-tests'"),
        ((RANKER_SCHEMA, "0123"), SchemaMismatch, "ranker_schema '0123'"),
        (('"ranker_schema"', '"other"'), SchemaMismatch, r"ranker_schema '\(none\)'"),
        (("dims: [ -1, 5 ]", "dims: [ -1, 6 ]"), SchemaMismatch, r"stream_features as TYPE_FP32\[-1, 6\].*\[-1, 5\]"),
        (("[ -1, 20, 4 ]", "[ -1, 10, 4 ]"), SchemaMismatch, "sequence_embedding"),
        (("TYPE_INT64", "TYPE_INT32"), SchemaMismatch, "codes as TYPE_INT32"),
        (("TYPE_INT64", "99"), SchemaMismatch, "codes as 99"),
        (('"viewer_of"', '"x"'), BadScores, "takes .*'x'"),
        (('"heads"', '"trend"'), BadScores, "output heads"),
        (
            ('"heads" data_type: TYPE_FP32 dims: [ -1, 4 ]', '"heads" data_type: TYPE_FP32 dims: [ -1, 3 ]'),
            BadScores,
            "output heads",
        ),
    ],
)
def test_each_way_a_config_can_be_unfit_is_refused(
    change: tuple[str, str], error: type[ScoringError], told: str
) -> None:
    text = rankers.config_of(SCHEMA, F, D)
    assert change[0] in text
    with pytest.raises(error, match=told):
        check_ranker_config(parse_config(text.replace(*change)), "ranker", SCHEMA, F, D)


@pytest.mark.parametrize(("schema", "name"), [('x" }', "ranker"), (SCHEMA, 'r" }')])
def test_a_config_that_would_have_to_be_escaped_is_not_written(schema: str, name: str) -> None:
    with pytest.raises(ConfigError, match="letters, digits"):
        rankers.config_of(schema, F, D, name)


def local(path: Path, model: onnx.ModelProto | None = None, **options: Any) -> LocalRanker:
    if model is not None:
        rankers.put_ranker(path, model, SCHEMA, F, D, **options)
    return LocalRanker(path, "ranker", SCHEMA, F, D)


def test_the_local_ranker_gives_every_input_to_the_model_and_its_heads_back(tmp_path: Path) -> None:
    ranker = local(tmp_path, rankers.telling(F, D))
    for rows, viewers in ((7, 3), (1, 1), (3, 3)):
        inputs = random_inputs(rows, viewers)
        found = ranker.heads(inputs, 5.0)
        assert found.model_version == "ranker/1" and found.values.shape == (rows, 4)
        np.testing.assert_allclose(found.values, rankers.told_by(inputs), atol=1e-5)


@pytest.mark.parametrize(
    ("heads", "told"),
    [
        ([0.1, 0.2, 0.3], r"float32\[7, 3\], wanted is float32\[7, 4\]"),
        ([0.1, float("nan"), 0.3, 0.4], "no probabilities for 7 of 7 rows"),
        ([0.1, 0.2, 0.3, float("inf")], "no probabilities"),
        ([0.1, 0.2, 0.3, 1.1], "no probabilities"),
        ([-0.1, 0.2, 0.3, 1.0], "no probabilities"),
    ],
)
def test_what_is_no_four_probabilities_a_row_is_refused(tmp_path: Path, heads: list[float], told: str) -> None:
    with pytest.raises(BadScores, match=told):
        local(tmp_path, rankers.constant(F, D, heads)).heads(random_inputs(), 5.0)


def test_rounding_beyond_the_range_is_clipped(tmp_path: Path) -> None:
    found = local(tmp_path, rankers.constant(F, D, [-0.0005, 1.0005, 0.0, 1.0])).heads(random_inputs(), 5.0)
    assert found.values[0].tolist() == [0.0, 1.0, 0.0, 1.0]


def test_the_local_ranker_stops_a_slow_model_and_says_when_there_is_none(tmp_path: Path) -> None:
    began_s = time.monotonic()
    with pytest.raises(ScorerTimeout):
        local(tmp_path / "slow", rankers.endless(F, D)).heads(random_inputs(), 0.2)
    assert time.monotonic() - began_s < 30.0, "it would go on for minutes"
    with pytest.raises(ScorerUnavailable, match="holds no"):
        local(tmp_path).heads(random_inputs(), 1.0)
    other = rankers.config_of("another", F, D)
    with pytest.raises(SchemaMismatch, match="'another'"):
        local(tmp_path / "other", rankers.telling(F, D), config=other).heads(random_inputs(), 1.0)


class FakeRanker:
    """Answers 0.5 everywhere, or fails; waits while ``gate`` is closed."""

    name = "fake"

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.calls = 0
        self.closed = False

    def heads(self, inputs: RankerInputs, deadline_s: float) -> Scores:
        self.calls += 1
        assert self.gate.wait(10.0)
        if self.error is not None:
            raise self.error
        return Scores(np.full((len(inputs), 4), 0.5, np.float32), "fake/1")

    def close(self) -> None:
        self.closed = True


class Calls:
    """A caller of a fake ranker, and what it was told."""

    def __init__(self, **settings: Any) -> None:
        self.ranker, self.clock, self.outcomes = FakeRanker(), ManualClock(T0), Counter[str]()
        self.answers = threading.Semaphore(0)
        chosen = RankerSettings(model="fake", **{"deadline_ms": 5_000, **settings})
        self.caller = RankerCaller(
            self.ranker, chosen, self.clock, lambda outcome, seconds: self.outcomes.update([outcome]),
            self.answers.release,
        )  # fmt: skip

    def ask(self) -> tuple[Scores | None, str]:
        return self.caller.finish(self.caller.start(random_inputs()))


@contextmanager
def calls(**settings: Any) -> Iterator[Calls]:
    made = Calls(**settings)
    try:
        yield made
    finally:
        made.ranker.gate.set()
        made.caller.close()
        assert made.ranker.closed


def test_the_caller_goes_on_while_the_model_works_and_is_told_when_it_answered() -> None:
    with calls() as it:
        it.ranker.gate.clear()
        call = it.caller.start(random_inputs())
        assert 0 < call.wait_s() <= 5.0
        it.ranker.gate.set()
        assert it.answers.acquire(timeout=5.0) and call.wait_s() == 0.0
        heads, problem = it.caller.finish(call)
        assert heads is not None and heads.model_version == "fake/1" and not problem and it.outcomes["ok"] == 1


def test_an_overdue_call_is_given_up_and_no_other_is_made_until_the_model_let_go() -> None:
    with calls(deadline_ms=20, breaker_failures=10) as it:
        it.ranker.gate.clear()
        heads, problem = it.ask()
        assert heads is None and problem == "timeout: no answer within 20 ms"
        assert it.ask()[1].startswith("busy") and it.ranker.calls == 1
        it.ranker.gate.set()
        assert it.answers.acquire(timeout=5.0)
        assert it.outcomes == {"timeout": 1, "busy": 1}
        assert eventually(lambda: it.ask()[0]), "it answers again"


def test_the_breaker_opens_after_failures_in_a_row_and_closes_with_a_trial() -> None:
    with calls(breaker_failures=2, breaker_open_ms=1_000) as it:
        it.ranker.error = BadScores("no good")
        assert [it.ask()[1] for _ in range(3)] == ["bad_scores: no good"] * 2 + ["breaker_open: bad_scores: no good"]
        assert it.ranker.calls == 2
        it.clock.advance(1_001)
        it.ranker.error = RuntimeError("a bug")
        assert [it.ask()[1] for _ in range(2)] == ["internal: RuntimeError", "breaker_open: internal: RuntimeError"]
        it.clock.advance(1_001)
        it.ranker.error = None
        assert all(it.ask()[0] for _ in range(3))
        assert it.outcomes == {"bad_scores": 2, "breaker_open": 2, "internal": 1, "ok": 3}


def test_calls_are_to_be_as_small_as_the_model_is_slow_and_loading_it_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s, seconds = [100.0], iter([30.0, 0.2, 0.8])
    with calls(deadline_ms=1_000) as it:
        assert it.caller.rows_in_time() > 10**6, "nothing is known"
        answer = it.ranker.heads

        def heads(inputs: RankerInputs, deadline_s: float) -> Scores:
            now_s[0] += next(seconds)
            return answer(inputs, deadline_s)

        monkeypatch.setattr(it.ranker, "heads", heads)
        monkeypatch.setattr("server.scoring.ranker.time", SimpleNamespace(monotonic=lambda: now_s[0]))
        assert it.caller.warm(empty_inputs(100, F, D), 60.0) == ""
        assert it.caller.rows_in_time() == 250, "2 ms per row, half of a second"
        it.caller.start(empty_inputs(100, F, D)).answer.result(5.0)
        assert 100 < it.caller.rows_in_time() < 200, "slower than before, and only once"


def test_warming_up_tells_what_went_wrong() -> None:
    with calls() as it:
        assert it.caller.warm(empty_inputs(3, F, D), 5.0) == ""
        it.ranker.error = ScorerUnavailable("nobody there")
        assert it.caller.warm(empty_inputs(3, F, D), 5.0) == "ScorerUnavailable: nobody there"
