"""The two towers: graphs, the correction for how negatives are drawn, and vectors of streams nobody has seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from models.fit_two_tower import (  # noqa: E402
    FittedTowers,
    TwoTowerSettings,
    fit_two_tower,
    recall_of_watched,
    vectors,
)
from models.impressions import ImpressionSplit, split_impressions  # noqa: E402
from models.ranker import tensors  # noqa: E402
from models.repository import check_graph  # noqa: E402
from models.training import FitSettings  # noqa: E402
from models.two_tower import TowerShape, TwoTower, sampled_softmax  # noqa: E402
from models.two_tower_graph import stream_tower_graph, viewer_tower_graph  # noqa: E402
from tests.made_impressions import make_impressions  # noqa: E402

QUICK = TwoTowerSettings(
    FitSettings(max_epochs=4, patience_epochs=2, batch_rows=128, learning_rate=2e-3), random_negatives=64
)


@pytest.fixture(scope="module")
def split() -> ImpressionSplit:
    return split_impressions(make_impressions(30_000, 3), gap_ms=1_000)


@pytest.fixture(scope="module")
def fitted(split: ImpressionSplit) -> FittedTowers:
    """Fitted to viewers and streams whose embeddings are of two spaces: one is the other, turned."""
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.standard_normal((8, 8)))[0].astype(np.float32)
    turned = [
        replace(part, stream_embedding=part.stream_embedding @ turn)
        for part in (split.fit, split.stop, split.calibrate, split.test)
    ]
    long = FitSettings(max_epochs=12, patience_epochs=3, batch_rows=128, learning_rate=1e-2, weight_decay=1e-3)
    return fit_two_tower(ImpressionSplit(*turned), replace(QUICK, fit=long), 1)


def test_graphs_and_towers_agree() -> None:
    torch.manual_seed(0)
    model = TwoTower(TowerShape(8)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    rows = make_impressions(300, 1)
    inputs = rows.inputs(slice(None))
    inputs.sequence_meta[0] = 0.0
    inputs.stream_embedding[0] = 0.0
    given = tensors(inputs)
    with torch.inference_mode():
        streams = model.stream(given["stream_embedding"], given["codes"]).numpy()
        viewers = model.viewer(*(given[k] for k in ("viewer_embedding", "sequence_embedding", "sequence_meta"))).numpy()
    np.testing.assert_allclose(np.linalg.norm(viewers, axis=1), 1.0, rtol=1e-3)
    arrays = inputs.tensors()
    some = {k: arrays[k] for k in ("stream_embedding", "codes")}
    check_graph(stream_tower_graph(model.stream).SerializeToString(), some, {"embedding": streams})
    some = {k: arrays[k] for k in ("viewer_embedding", "sequence_embedding", "sequence_meta")}
    check_graph(viewer_tower_graph(model.viewer).SerializeToString(), some, {"embedding": viewers})


def test_towers_begin_with_the_embeddings_as_they_came() -> None:
    model, rows = TwoTower(TowerShape(8)).eval(), make_impressions(200, 1)
    bare = replace(rows, askings=replace(rows.askings, sequence_meta=np.zeros_like(rows.askings.sequence_meta)))
    viewers, streams = vectors(model, bare)
    np.testing.assert_allclose(viewers, bare.askings.embedding[bare.asking], atol=1e-5)
    np.testing.assert_allclose(streams, bare.stream_embedding, atol=1e-5)


def test_towers_learn_what_the_embeddings_do_not_say(split: ImpressionSplit, fitted: FittedTowers) -> None:
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.standard_normal((8, 8)))[0].astype(np.float32)
    test = replace(split.test, stream_embedding=split.test.stream_embedding @ turn)
    learned, plain = (recall_of_watched(m, test, 20).mean() for m in (fitted.model, None))
    assert learned > 1.5 * plain, (learned, plain)


def test_a_stream_that_nobody_has_seen_has_a_vector_from_its_content(
    split: ImpressionSplit, fitted: FittedTowers
) -> None:
    rows = split.test.take(np.arange(50))
    codes = rows.codes.copy()
    codes[:, 2] = 60_000 + np.arange(50)  # creators of no row: buckets that training left as they were
    buckets = fitted.model.stream.codes[2].buckets
    assert not np.isin(codes[:, 2] % buckets, split.fit.codes[:, 2] % buckets).any()
    new = vectors(fitted.model, replace(rows, codes=codes))[1]
    codes[:, 2] = 0
    np.testing.assert_array_equal(new, vectors(fitted.model, replace(rows, codes=codes))[1])
    assert len(np.unique(new.round(4), axis=0)) == len(np.unique(rows.stream_embedding.round(4), axis=0))


def test_the_correction_undoes_how_often_a_candidate_is_drawn() -> None:
    """Scores that are the true log odds are the best ones only with the correction."""
    rng = np.random.default_rng(0)
    truth = torch.tensor([2.0, 1.0, 0.0, -1.0])
    share = torch.tensor([0.7, 0.1, 0.1, 0.1])  # of negatives: the first is drawn by far the most
    scores = {with_correction: torch.zeros(4, requires_grad=True) for with_correction in (True, False)}
    b, drawn_per_batch = 64, 64
    for corrected, s in scores.items():
        for _ in range(250):
            own = torch.from_numpy(rng.choice(4, b, p=torch.softmax(truth, 0).numpy()))
            drawn = torch.from_numpy(rng.choice(4, drawn_per_batch, p=share.numpy()))
            candidate = torch.cat([own, drawn])
            rate = torch.log(b * torch.softmax(truth, 0) + drawn_per_batch * share)[candidate]
            given = rate if corrected else torch.zeros(len(candidate))
            loss = sampled_softmax(s[candidate].expand(b, -1), torch.arange(b), given, candidate, own)
            (slope,) = torch.autograd.grad(loss, s)
            with torch.no_grad():
                s -= 0.5 * slope
    found = {k: (s - s.mean()).detach() for k, s in scores.items()}
    wanted = truth - truth.mean()
    assert (found[True] - wanted).abs().max() < 0.4
    assert (found[False] - wanted).abs().max() > 0.8


def test_the_same_stream_elsewhere_in_the_batch_is_no_negative() -> None:
    scores = torch.tensor([[1.0, 1.0, 0.0]])
    rate, own = torch.zeros(3), torch.tensor([0])
    alone = sampled_softmax(scores, own, rate, torch.tensor([7, 7, 9]), torch.tensor([7]))
    assert float(alone) == pytest.approx(float(torch.log(1 + torch.exp(torch.tensor(-1.0)))), abs=1e-6)
    assert float(sampled_softmax(scores, own, rate, torch.tensor([7, 8, 9]), torch.tensor([7]))) > float(alone)
