"""The ranker: net and graph agree, what is unknown is neutral, places are told from liking, heads are calibrated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from models.calibration import fit_platt  # noqa: E402
from models.evaluation import auc, calibration_error, log_loss  # noqa: E402
from models.export import ExportMismatch  # noqa: E402
from models.fit_ranker import FittedRanker, RankerSettings, answers, fit_ranker, position_effect  # noqa: E402
from models.graph_config import config_text  # noqa: E402
from models.impressions import ImpressionSplit, split_impressions  # noqa: E402
from models.places import examined  # noqa: E402
from models.ranker import TASKS, WATCH_CAP_S, Ranker, RankerShape, heads, tensors  # noqa: E402
from models.ranker_graph import ranker_graph  # noqa: E402
from models.repository import check_graph  # noqa: E402
from models.training import FitSettings  # noqa: E402
from server.scoring.model_config import parse_config  # noqa: E402
from server.scoring.ranker_schema import (  # noqa: E402
    CODE_BUCKETS,
    HEADS,
    INPUTS,
    RANKER_PARAMETER,
    RANKER_SCHEMA,
    SEQUENCE,
    RankerInputs,
)
from tests.made_impressions import EXPONENT, PLACES, make_impressions  # noqa: E402

F, D = 6, 8
QUICK = RankerSettings(FitSettings(max_epochs=5, patience_epochs=2, batch_rows=512, learning_rate=4e-3))


def random_ranker(seed: int = 0) -> Ranker:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = Ranker(RankerShape(F, D), floats(rng, F), np.abs(floats(rng, F)) + 0.1).eval()
    with torch.no_grad():
        for table in model.codes:
            table.weight.normal_()
        model.unseen.normal_(std=0.1)
        model.slope.uniform_(0.5, 2.0)
        model.offset.uniform_(-1.0, 1.0)
    return model


def floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def random_inputs(rows: int, viewers: int, seed: int = 0) -> RankerInputs:
    """Of every size and sign; some viewers without history, some streams without embedding or codes."""
    rng = np.random.default_rng(seed)
    meta = rng.random((viewers, SEQUENCE, 4)).astype(np.float32) * 5
    meta[..., 3] = np.arange(SEQUENCE) < rng.integers(0, SEQUENCE + 1, (viewers, 1))
    meta[0, :, 3] = 0.0
    features = floats(rng, rows, F) * 10.0 ** rng.uniform(-6, 10, (rows, F)).astype(np.float32)
    stream = floats(rng, rows, D) * (rng.random((rows, 1)) < 0.8).astype(np.float32)
    codes = np.stack([rng.integers(0, buckets, rows) for buckets in CODE_BUCKETS], axis=1)
    return RankerInputs(
        stream_features=features, stream_missing=(rng.random((rows, F)) < 0.2).astype(np.float32),
        stream_embedding=stream, codes=codes * (rng.random((rows, 3)) < 0.8),
        position=rng.choice([-1.0, 1.0, 2.0, 17.0, 400.0], (rows, 1)).astype(np.float32),
        viewer_of=rng.integers(0, viewers, rows), viewer_embedding=floats(rng, viewers, D),
        sequence_embedding=floats(rng, viewers, SEQUENCE, D) * meta[..., 3:], sequence_meta=meta * meta[..., 3:],
    )  # fmt: skip


def wanted(model: Ranker, inputs: RankerInputs) -> dict[str, np.ndarray]:
    with torch.inference_mode():
        found = model(**tensors(inputs)).numpy()
    return {"heads": found[:, :4], "watch_seconds": found[:, 4] * np.float32(WATCH_CAP_S)}


@pytest.mark.parametrize(("rows", "viewers"), [(1, 1), (3, 7), (300, 5)])
def test_graph_and_net_agree(rows: int, viewers: int) -> None:
    model = random_ranker()
    graph = ranker_graph(model, "abc").SerializeToString()
    inputs = random_inputs(rows, viewers)
    assert check_graph(graph, inputs.tensors(), wanted(model, inputs), {"watch_seconds": WATCH_CAP_S}) < 1e-5


def test_a_graph_that_computes_something_else_is_noticed() -> None:
    graph = ranker_graph(random_ranker(1), "abc").SerializeToString()
    inputs = random_inputs(50, 5)
    with pytest.raises(ExportMismatch, match="differ"):
        check_graph(graph, inputs.tensors(), wanted(random_ranker(0), inputs))


def test_the_graph_keeps_the_contract_of_the_server() -> None:
    graph = ranker_graph(random_ranker(), "abc")
    sizes = {"F": F, "D": D}
    for value in graph.graph.input:
        kind, shape = INPUTS[value.name]
        tensor = value.type.tensor_type
        assert onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type) == kind
        dims = [d.dim_value or d.dim_param for d in tensor.shape.dim]
        assert dims == [sizes.get(s, s) if isinstance(s, str) else s for s in shape]
    assert {value.name for value in graph.graph.input} == set(INPUTS)
    config = parse_config(config_text("ranker", graph, {"auc": 0.5}))
    assert config.parameters[RANKER_PARAMETER].string_value == RANKER_SCHEMA
    assert {i.name: list(i.dims) for i in config.input}["sequence_embedding"] == [-1, SEQUENCE, D]
    assert [o.name for o in config.output] == ["heads", "watch_seconds"] and config.max_batch_size == 0


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_answers_are_probabilities_whatever_comes_in(seed: int) -> None:
    inputs = random_inputs(20, 3, seed)
    for value, row in ((np.nan, 0), (np.inf, 1), (-np.inf, 2), (3e38, 3)):
        inputs.stream_features[row] = value
    found = heads(random_ranker(seed % 3), inputs)
    assert found.shape == (20, 4) and np.isfinite(found).all() and (found >= 0).all() and (found <= 1).all()


def test_no_place_is_the_first_place_and_lower_places_scale_all_heads_alike() -> None:
    model, inputs = random_ranker(), random_inputs(40, 4)
    at = {p: heads(model, replace(inputs, position=np.full_like(inputs.position, p))) for p in (-1.0, 1.0, 3.0)}
    np.testing.assert_array_equal(at[-1.0], at[1.0])
    effect = position_effect(model)
    assert effect[0] == 1.0 and effect[2] < 1.0
    np.testing.assert_allclose(at[3.0], at[1.0] * effect[2], rtol=1e-5)


def test_a_creator_never_seen_is_scored_as_one_that_is_unknown() -> None:
    model, inputs = random_ranker(), random_inputs(40, 4)
    with torch.no_grad():
        model.codes[2].weight[100:200] = 0.0  # as training leaves what it has not seen
    codes = inputs.codes.copy()
    codes[:, 2] = np.arange(100, 140)
    unseen = heads(model, replace(inputs, codes=codes))
    codes[:, 2] = 0
    np.testing.assert_array_equal(unseen, heads(model, replace(inputs, codes=codes)))


def test_padding_of_a_history_changes_nothing_and_its_order_neither() -> None:
    model, inputs = random_ranker(), random_inputs(40, 4)
    before = heads(model, inputs)
    rng = np.random.default_rng(1)
    padding = inputs.sequence_meta[..., 3:] == 0
    noisy = np.where(padding, floats(rng, 4, SEQUENCE, D), inputs.sequence_embedding)
    np.testing.assert_allclose(heads(model, replace(inputs, sequence_embedding=noisy)), before, rtol=1e-5)
    order = rng.permutation(SEQUENCE)
    mixed = replace(
        inputs,
        sequence_embedding=inputs.sequence_embedding[:, order],
        sequence_meta=inputs.sequence_meta[:, order],
    )
    np.testing.assert_allclose(heads(model, mixed), before, rtol=1e-4, atol=1e-6)


def test_a_value_that_is_marked_missing_is_not_looked_at() -> None:
    model, inputs = random_ranker(), random_inputs(40, 4)
    inputs.stream_missing[:, 2] = 1.0
    other = inputs.stream_features.copy()
    other[:, 2] = 1e6
    np.testing.assert_array_equal(heads(model, inputs), heads(model, replace(inputs, stream_features=other)))


# --- fitted -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def split() -> ImpressionSplit:
    return split_impressions(make_impressions(60_000, 3), gap_ms=1_000)


@pytest.fixture(scope="module")
def fitted(split: ImpressionSplit) -> FittedRanker:
    return fit_ranker(split, QUICK, 1)


def test_heads_are_better_than_their_base_rates_and_calibrated(split: ImpressionSplit, fitted: FittedRanker) -> None:
    test = split.test
    found = answers(fitted.model, test, neutral=False)
    for head, name, least in (("click", "clicked", 0.75), ("watch", "watched", 0.7), ("purchase", "purchased", 0.75)):
        p, y = found[:, HEADS.index(head)], getattr(test, name)
        assert auc(p, y) > least, head
        assert log_loss(p, y) < 0.95 * log_loss(np.full(len(y), y.mean()), y), head
        assert calibration_error(p, y) < 0.02, head
    seconds = found[:, TASKS.index("watch_time")].mean() * WATCH_CAP_S
    assert seconds == pytest.approx(np.minimum(test.watch_s, WATCH_CAP_S).mean(), rel=0.15)


def test_the_effect_of_places_is_found_without_slates_by_chance_if_less_well(fitted: FittedRanker) -> None:
    planted = np.arange(1, PLACES + 1) ** -EXPONENT
    np.testing.assert_allclose(position_effect(fitted.model)[:PLACES], planted, rtol=0.15)


def test_equal_seeds_give_equal_weights(split: ImpressionSplit) -> None:
    small = ImpressionSplit(*(getattr(split, p).take(np.arange(2_000)) for p in ("fit", "stop", "calibrate", "test")))
    settings = replace(QUICK, fit=replace(QUICK.fit, max_epochs=1))
    one, two = (fit_ranker(small, settings, 5).model for _ in range(2))
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name


def test_slates_in_an_order_of_chance_keep_the_unknown_from_being_taken_for_places() -> None:
    """Nobody knows the viewers here, but who made the slates did: places then tell what the net cannot see."""
    settings = replace(QUICK, fit=replace(QUICK.fit, max_epochs=2))
    planted = np.arange(1, PLACES + 1) ** -EXPONENT
    misled = split_impressions(make_impressions(30_000, 5, noise=1.0, told=False), gap_ms=1_000)
    found = position_effect(fit_ranker(misled, settings, 1).model)[:PLACES]
    assert np.abs(found / planted - 1.0).max() > 0.25
    told = split_impressions(make_impressions(60_000, 5, noise=1.0, told=False, shuffled=0.4), gap_ms=1_000)
    found = position_effect(fit_ranker(told, settings, 1).model)[:PLACES]
    np.testing.assert_allclose(found, planted, rtol=0.1)


def test_platt_below_a_ceiling_finds_the_distortion_that_it_undoes() -> None:
    rng = np.random.default_rng(2)
    z, ceiling = rng.standard_normal(200_000).astype(np.float32), rng.choice([1.0, 0.5, 0.2], 200_000)
    y = rng.random(len(z)) < ceiling / (1.0 + np.exp(-(0.7 * z - 2.0)))
    platt = fit_platt(z, y, ceiling)
    assert platt.slope == pytest.approx(0.7, abs=0.03) and platt.offset == pytest.approx(-2.0, abs=0.05)
    assert abs(fit_platt(z, y).offset + 2.0) > 0.3  # without it the effect of places goes into the offset


def test_places_are_refused_without_a_first_one_and_copied_where_none_was_seen() -> None:
    rng = np.random.default_rng(0)
    places = rng.integers(0, 4, 20_000)
    clicked = rng.random(20_000) < 0.3 * (1.0 + places) ** -1.0
    found = np.exp(examined(np.zeros(20_000), places, clicked, 6))
    np.testing.assert_allclose(found[:4], [1, 1 / 2, 1 / 3, 1 / 4], rtol=0.1)
    assert found[4] == found[5] == found[3]
    with pytest.raises(ValueError, match="first place"):
        examined(np.zeros(20_000), places + 1, clicked, 6)


@pytest.mark.parametrize("fold", [False, True])
def test_the_effect_of_places_is_smooth_unless_clicks_say_otherwise(fold: bool) -> None:
    """Below a fold after the fifth place only half as many look."""
    rng = np.random.default_rng(4)
    places = np.tile(np.arange(20), 10_000)
    planted = (1.0 + np.arange(20)) ** -0.7 * np.where(fold & (np.arange(20) >= 5), 0.5, 1.0)
    clicked = rng.random(len(places)) < 0.2 * planted[places]
    found = np.exp(examined(np.zeros(len(places)), places, clicked, 20))
    np.testing.assert_allclose(found, planted, rtol=0.25 if fold else 0.1)
