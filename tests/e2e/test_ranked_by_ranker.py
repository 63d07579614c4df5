"""A server with a ranker: what it is asked, what its answer changes, and what happens without one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from liverank.v1 import ranking_pb2

from kernels.backend import CPU
from server.clock import ManualClock
from server.config import parse_settings
from server.errors import ConfigError, ScorerUnavailable
from server.live.features import FeatureSet
from server.retrieval.query import build_batch
from server.rpc.decode import decode_rank
from server.rules.rulebook import RuleBook
from server.scoring.base import Scores
from server.scoring.ranker_schema import CODE_BUCKETS, RankerInputs, bucket_of
from server.world import build_world
from tests import rankers
from tests.app import FEATURES, SMALL, Client, put_current_model, running_app
from tests.events import T0, event, started
from tests.triton_server import eventually

F, D = len(FEATURES), SMALL["embedding_dim"]
STREAMS = 12
RULES = """
[surface.default]
trend_weight = 1.0
similarity_weight = 0.5
exploration_share = 0.0
diversity = 0.0
creator_cap = 0
category_share = 1.0
[surface.plain]
click_weight = 0.0
watch_weight = 0.0
purchase_weight = 0.0
report_weight = 0.0
[surface.money]
click_weight = 0.0
watch_weight = 0.0
purchase_weight = 50.0
report_weight = 0.0
"""


def north(i: int) -> list[float]:
    """A unit vector that turns with i."""
    return [float(np.cos(i / 4)), float(np.sin(i / 4)), 0.0, 0.0]


@contextmanager
def server(folder: Path, model: Any = None, **ranker: Any) -> Iterator[Client]:
    """A dozen streams, assessed and scored, and a ranker of ``model``, if any."""
    repository = folder / "models"
    put_current_model(repository)
    if model is not None:
        rankers.put_ranker(repository, model, FEATURES.schema, F, D)
    rules = folder / "rules.toml"
    rules.write_text(RULES)
    settings = {"model": "ranker", "deadline_ms": 5_000, **ranker}
    calm = {"target_ms": 60_000, "target_wait_ms": 60_000}  # slow models are no overload here
    with running_app(
        folder, ManualClock(T0), ranker=settings, rank={"rules_file": str(rules)}, admission=calm
    ) as client:
        client.publish(
            *(started(f"s{i:02}", 0, language="en", category=f"g{i % 3}", embedding=north(i)) for i in range(STREAMS)),
            *(event(f"s{i:02}", 0, viewer_count={"count": 3 * i}) for i in range(0, STREAMS, 2)),
        )
        client.tick()
        yield client


def metric(client: Client, name: str, **labels: str) -> float:
    return client.app.metrics.registry.get_sample_value(name, labels) or 0.0


def scores_of(reply: ranking_pb2.RankResponse) -> dict[str, float]:
    return {stream.stream_id: stream.score for stream in reply.streams}


def explained(client: Client, stream_id: str, **fields: Any) -> dict[str, float]:
    request = ranking_pb2.ExplainRequest(request=ranking_pb2.RankRequest(**fields), stream_id=stream_id)
    return {score.name: score.value for score in client.ranking.Explain(request, timeout=10.0).scores}


def test_heads_are_added_with_the_weights_of_the_surface_and_the_reply_names_who_scored(tmp_path: Path) -> None:
    with server(tmp_path, rankers.telling(F, D)) as client:
        asked = {"viewer_embedding": north(3), "limit": STREAMS}
        reply, plain = client.rank(**asked), client.rank(surface="plain", **asked)
        assert reply.model_version == "trendiness/1+ranker/1" and plain.model_version == "trendiness/1"
        assert reply.degradation.level == ranking_pb2.Degradation.NONE and not reply.degradation.reasons
        found, without = scores_of(reply), scores_of(plain)
        assert len(found) == len(without) == STREAMS and list(found) == sorted(found, key=lambda s: -found[s])
        for i, name in enumerate(sorted(found)):
            heads = explained(client, name, **asked)
            assert heads["ranker.click"] == pytest.approx((1 + np.cos((i - 3) / 4)) / 2, abs=1e-5)
            assert heads["ranker.watch"] == pytest.approx(0.5), "a viewer without a name has no history"
            wanted = int(bucket_of([f"creator-{name}"], CODE_BUCKETS[2])[0]) / CODE_BUCKETS[2]
            assert heads["ranker.purchase"] == pytest.approx(wanted, abs=1e-6)
            added = 0.5 * heads["ranker.click"] + heads["ranker.watch"] + 2 * heads["ranker.purchase"]
            assert found[name] == pytest.approx(without[name] + added - 5 * heads["ranker.report"], abs=1e-4)
        assert metric(client, "liverank_ranker_calls_total", outcome="ok") == 1 + STREAMS, "plain asks nobody"
        by_creator = sorted(found, key=lambda s: -bucket_of([f"creator-{s}"], CODE_BUCKETS[2])[0])
        assert list(scores_of(client.rank(surface="money", limit=STREAMS))) == by_creator


def test_the_model_learns_what_is_missing_and_a_neutral_position(tmp_path: Path) -> None:
    with server(tmp_path, rankers.telling(F, D)) as client:
        engine = client.app.engine
        slots = np.arange(STREAMS, dtype=np.int32)
        states = engine.call(
            lambda: FEATURES.compute(engine.table.columns, slots, T0, engine.table.landmark_ms).states
        ).result(10.0)
        for i in (0, 1):  # one with viewers reported, one without
            report = explained(client, f"s{i:02}", limit=STREAMS)["ranker.report"]
            assert report == pytest.approx(0.5 * np.mean(states[i] != 0), abs=1e-6)


def test_a_batch_of_viewers_is_one_call_and_each_gets_heads_of_its_own_history(tmp_path: Path) -> None:
    with server(tmp_path, rankers.telling(F, D)) as client:
        client.publish(event("s05", 0, viewer="buyer", purchased={"amount_minor": 5, "currency": "USD"}))
        before = metric(client, "liverank_ranker_calls_total", outcome="ok")
        names = ["buyer", "stranger", ""]
        requests = [ranking_pb2.RankRequest(viewer_id=v, viewer_embedding=north(7), limit=STREAMS) for v in names]
        replies = client.ranking.RankBatch(ranking_pb2.RankBatchRequest(requests=requests), timeout=10.0).responses
        assert metric(client, "liverank_ranker_calls_total", outcome="ok") == before + 1
        buyer, stranger, nobody = (scores_of(reply) for reply in replies)
        outcomes = 0.1 + 0.5 + 1.0  # clicked, engaged, purchased
        watch = 1 / (1 + np.exp(-(outcomes + np.float16(north(5)[0]))))
        for name in buyer:
            assert buyer[name] - stranger[name] == pytest.approx(watch - 0.5, abs=1e-3)
        assert stranger == nobody


def test_only_the_best_by_stream_level_scores_are_asked_about(tmp_path: Path) -> None:
    with server(tmp_path, rankers.constant(F, D, [1.0, 1.0, 0.0, 0.0]), candidates=4) as client:
        reply, plain = client.rank(limit=STREAMS), client.rank(surface="plain", limit=STREAMS)
        found, without = scores_of(reply), scores_of(plain)
        added = {name: round(found[name] - without[name], 4) for name in found}
        best = list(without)[:4]
        assert {name for name, value in added.items() if value == 1.5} == set(best)
        assert all(value == 0.0 for name, value in added.items() if name not in best)


def test_a_model_too_slow_for_a_whole_batch_is_asked_about_parts_that_it_answers_in_time(tmp_path: Path) -> None:
    # 64 viewers x 12 streams x 1.5 ms would take longer than the deadline.
    slow = rankers.slow(F, D, 2_000, [0.5, 0.5, 0.5, 0.0])
    with server(tmp_path, slow, deadline_ms=1_000) as client:
        requests = [ranking_pb2.RankRequest(viewer_id=f"v{i}", limit=STREAMS) for i in range(64)]
        replies = client.ranking.RankBatch(ranking_pb2.RankBatchRequest(requests=requests), timeout=60.0).responses
        ranked = [reply.model_version == "trendiness/1+ranker/1" for reply in replies]
        assert len(ranked) == 64 and sum(ranked) >= 48, "a machine that stalls may cost a part"
        assert metric(client, "liverank_ranker_calls_total", outcome="ok") > 1


@pytest.mark.parametrize(
    ("quality", "limit", "asked"), [(1.0, 2, 8), (0.5, 2, 4), (0.1, 2, 2), (0.1, 6, 6), (0.1, STREAMS, 8)]
)
def test_under_pressure_it_is_asked_about_fewer_candidates_but_enough_for_a_slate(
    tmp_path: Path, quality: float, limit: int, asked: int
) -> None:
    with server(tmp_path, rankers.constant(F, D, [1.0, 1.0, 0.0, 0.0]), candidates=8) as client:
        engine = client.app.engine
        request = ranking_pb2.RankRequest(viewer_id="v", limit=limit)
        query = decode_rank(request, engine.settings, engine.surfaces, float("inf"))
        batch = build_batch([query], engine.table, engine.streams.book)
        slates = engine.call(lambda: engine.pipeline.rank(batch, quality)).result(10.0)
        assert slates.candidates is not None and slates.candidates.heads is not None
        assert len(slates.candidates.heads.values) == asked


@pytest.mark.parametrize(
    ("model", "outcome"),
    [
        (rankers.constant(F, D, [0.5, float("nan"), 0.5, 0.5]), "bad_scores"),
        (rankers.constant(F, D, [0.5, 0.5, 0.5]), "bad_scores"),
        (rankers.endless(F, D), "timeout"),
        (None, "unavailable"),
    ],
    ids=["nan", "wrong shape", "endless", "no model"],
)
def test_a_ranker_that_fails_costs_its_part_of_the_score_and_the_reply_says_so(
    tmp_path: Path, model: Any, outcome: str
) -> None:
    slow = outcome == "timeout"
    with server(tmp_path, model, deadline_ms=100 if slow else 5_000, warm_ms=100, breaker_failures=2) as client:
        eventually(lambda: "busy" not in "".join(client.rank(limit=3).degradation.reasons))
        plain = client.rank(surface="plain", limit=STREAMS)
        replies = [client.rank(limit=STREAMS) for _ in range(6)]
        for reply in replies:
            assert scores_of(reply) == scores_of(plain), "exactly the stream-level order"
            assert reply.degradation.level == ranking_pb2.Degradation.LAST_GOOD
            assert reply.model_version == "trendiness/1" and reply.degradation.reasons[-1].startswith("ranker: ")
        assert metric(client, "liverank_ranker_calls_total", outcome=outcome) >= 1
        assert f"breaker_open: {outcome}" in replies[-1].degradation.reasons[-1], "nobody waits for it any more"


class Gated:
    """Takes the place of the ranker; answers when the test lets it."""

    name = "gated"

    def __init__(self) -> None:
        self.asked, self.gate = threading.Event(), threading.Event()
        self.rows = 0

    def heads(self, inputs: RankerInputs, deadline_s: float) -> Scores:
        self.rows = len(inputs)
        self.asked.set()
        if not self.gate.wait(20.0):
            raise ScorerUnavailable("the test forgot its gate")
        return Scores(np.full((len(inputs), 4), 0.5, np.float32), "gated/1")

    def close(self) -> None:
        self.gate.set()


@pytest.fixture
def gated(tmp_path: Path) -> Iterator[tuple[Client, Gated]]:
    with server(tmp_path, rankers.telling(F, D), deadline_ms=20_000) as client:
        ranker = Gated()
        assert client.app._ranker is not None
        client.app._ranker._ranker = ranker
        yield client, ranker
        ranker.gate.set()


def test_while_the_model_works_events_are_applied_and_what_ended_meanwhile_is_not_in_the_reply(
    gated: tuple[Client, Gated],
) -> None:
    client, ranker = gated
    waiting = client.ranking.Rank.future(ranking_pb2.RankRequest(limit=STREAMS), timeout=20.0)
    assert ranker.asked.wait(10.0) and ranker.rows == STREAMS
    ack = client.publish(event("s03", 0, epoch=1, ended={}), started("new", 0))
    assert ack.accepted == 2, "acknowledged, so applied, with a batch on its way"
    assert client.app.engine.call(lambda: 7).result(5.0) == 7
    assert not waiting.done()
    second = client.ranking.Rank.future(ranking_pb2.RankRequest(limit=STREAMS), timeout=20.0)
    ranker.gate.set()
    shown = scores_of(waiting.result(20.0))
    assert set(shown) == {f"s{i:02}" for i in range(STREAMS)} - {"s03"}
    assert waiting.result().model_version == "trendiness/1+gated/1" and waiting.result().applied_offset == ack.offset
    assert "s03" not in scores_of(second.result(20.0))


def test_a_row_that_holds_another_session_when_the_answer_comes_is_no_candidate_any_more(
    gated: tuple[Client, Gated],
) -> None:
    client, ranker = gated
    waiting = client.ranking.Rank.future(ranking_pb2.RankRequest(limit=STREAMS), timeout=20.0)
    assert ranker.asked.wait(10.0)
    client.publish(started("s04", 0, epoch=2, embedding=north(9)))
    engine = client.app.engine
    engine.call(engine._tick).result(10.0)  # assessed by now: only the session tells
    ranker.gate.set()
    assert set(scores_of(waiting.result(20.0))) == {f"s{i:02}" for i in range(STREAMS)} - {"s04"}
    assert metric(client, "liverank_slate_drops_total", stage="score", reason="session_changed") == 1
    assert "s04" in scores_of(client.rank(limit=STREAMS))


def test_names_that_change_within_a_session_reach_the_model(tmp_path: Path) -> None:
    with server(tmp_path, rankers.telling(F, D)) as client:
        explained(client, "s01", limit=STREAMS)
        client.publish(event("s01", 0, epoch=1, started={"creator_id": "somebody-else"}))
        client.tick()
        wanted = int(bucket_of(["somebody-else"], CODE_BUCKETS[2])[0]) / CODE_BUCKETS[2]
        assert explained(client, "s01", limit=STREAMS)["ranker.purchase"] == pytest.approx(wanted, abs=1e-6)


def test_ranking_on_the_gpu_refuses_a_ranker_at_the_start_and_says_what_to_do() -> None:
    settings = parse_settings({"ranker": {"model": "ranker"}})
    features = FeatureSet.load(settings.table.features_file)
    book = RuleBook.load(settings.rank.rules_file, features.names)

    class OnDevice:
        name = "exact_gpu"

    with pytest.raises(ConfigError, match=r"ranker\.model: ranking on the GPU.*device\.kind = 'cpu'"):
        build_world(settings, ManualClock(T0), features, book, CPU, OnDevice())  # type: ignore[arg-type]
