"""Rank, RankBatch and Explain over real gRPC."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from liverank.v1 import admin_pb2, ranking_pb2

from kernels import fence
from server.clock import ManualClock
from tests.app import Client, queued_rows, running_app, status_of
from tests.events import T0, event, started
from tests.triton_server import eventually

LANGUAGES, CATEGORIES = ("en", "de"), ("fashion", "wine", "music")


def embedding(number: int) -> list[float]:
    vector = np.random.default_rng(number).normal(size=4)
    return [float(x) for x in vector / np.linalg.norm(vector)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Sixty live streams of twenty creators, in two languages and three categories."""
    # Room for all of them in every source, so that exposures cannot change who is a candidate.
    folder = tmp_path_factory.mktemp("ranking")
    with running_app(folder, ManualClock(T0), retrieval={"fresh": 100}) as client:
        client.publish(
            *(
                event(
                    f"s{i:02}", 0, epoch=1,
                    started={
                        "creator_id": f"creator-{i % 20}", "title": f"Stream {i}", "language": LANGUAGES[i % 2],
                        "category": CATEGORIES[i % 3], "region": "JP" if i == 5 else "",
                        "age_rating": 18 if i == 6 else 0, "embedding": embedding(i),
                    },
                )
                for i in range(60)
            )
        )  # fmt: skip
        client.publish(*(event(f"s{i:02}", 0, viewer_count={"count": 10 * i}) for i in range(60)))
        client.tick()
        yield client


def test_a_reply_discloses_model_time_offset_sources_and_degradation(world: Client) -> None:
    reply = world.rank(request_id="r1", viewer_embedding=embedding(3))
    assert reply.request_id == "r1" and len(reply.streams) == 20
    assert reply.model_version == "trendiness/1" and reply.degradation.level == ranking_pb2.Degradation.NONE
    assert reply.as_of_ms == T0 and reply.applied_offset == 2 and not reply.notices
    assert "personal" in reply.source_names and "trending" in reply.source_names
    for stream in reply.streams:
        assert stream.epoch == 1 and stream.verify_by_ms == T0 + 10_000 and stream.sources
    greedy = [s.score for s in reply.streams if not s.exploration]
    assert all(math.isfinite(score) for score in greedy)


def test_equal_requests_against_equal_state_give_equal_slates(world: Client) -> None:
    def slate(request_id: str) -> list[tuple[str, float]]:
        reply = world.rank(request_id=request_id, viewer_embedding=embedding(9), limit=30)
        return [(s.stream_id, s.exploration) for s in reply.streams]

    assert slate("same") == slate("same")
    assert any(slate("same") != slate(f"other-{i}") for i in range(5)), "exploration must depend on the request"


def test_without_an_embedding_there_is_no_personal_source_and_no_error(world: Client) -> None:
    reply = world.rank()
    personal = 1 << list(reply.source_names).index("personal")
    assert reply.streams and not any(s.sources & personal for s in reply.streams)


def test_a_limit_of_zero_means_the_default_and_one_above_the_maximum_is_clamped_and_said_so(
    world: Client,
) -> None:
    assert len(world.rank().streams) == 20
    clamped = world.rank(limit=5_000, surface="chart")
    assert len(clamped.streams) == 59  # all but the one that is limited to a region
    assert list(clamped.notices) == ["limit_clamped"]


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"languages": ["de"]}, lambda i: i % 2 == 1),
        ({"categories": ["wine", "music"]}, lambda i: i % 3 in (1, 2)),
        ({"languages": ["en"], "categories": ["fashion"]}, lambda i: i % 6 == 0),
        ({"languages": ["xx"]}, lambda i: False),
    ],
)
def test_filters_keep_exactly_what_matches(world: Client, fields: dict[str, Any], wanted: Any) -> None:
    shown = {s.stream_id for s in world.rank(limit=100, surface="chart", **fields).streams}
    assert shown == {f"s{i:02}" for i in range(60) if wanted(i) and i != 5}


def test_region_and_age_rating_are_kept(world: Client) -> None:
    def shown(**fields: Any) -> set[str]:
        return {s.stream_id for s in world.rank(limit=100, **fields).streams}

    assert "s05" not in shown(surface="chart") and "s05" not in shown(surface="chart", region="DE")
    assert "s05" in shown(surface="chart", region="JP")
    assert "s06" in shown(surface="chart") and "s06" not in shown(surface="kids")


def test_excluded_streams_are_not_shown_and_followed_creators_are_found(world: Client) -> None:
    excluded = [f"s{i:02}" for i in range(40)] + ["never-heard-of"]
    shown = {s.stream_id for s in world.rank(limit=100, surface="chart", exclude_stream_ids=excluded).streams}
    assert shown == {f"s{i:02}" for i in range(40, 60)}
    reply = world.rank(limit=5, followed_creator_ids=["creator-7", "nobody"])
    followed = 1 << list(reply.source_names).index("followed")
    assert {s.stream_id for s in reply.streams if s.sources & followed} <= {"s07", "s27", "s47"}
    assert any(s.sources & followed for s in reply.streams)


def test_caps_hold_for_creators_and_categories(world: Client) -> None:
    for i in range(10):
        ids = [int(s.stream_id[1:]) for s in world.rank(request_id=f"caps-{i}", viewer_embedding=embedding(i)).streams]
        assert max(np.bincount([n % 20 for n in ids])) <= 2
        assert max(np.bincount([n % 3 for n in ids])) <= 10


def test_exploration_stays_within_its_share_and_carries_its_propensity(world: Client) -> None:
    explored = 0
    for i in range(50):
        streams = world.rank(request_id=f"explore-{i}", limit=20).streams
        slots = [s for s in streams if s.exploration]
        assert len(slots) <= 2 and all(0 < s.exploration <= 1 for s in slots)
        explored += len(slots)
    assert 0.05 <= explored / (50 * 20) <= 0.10


def test_a_batch_answers_each_request_as_it_would_be_answered_alone(world: Client) -> None:
    requests = [
        ranking_pb2.RankRequest(
            request_id=f"b{i}", limit=5 + i, viewer_embedding=embedding(i) if i % 2 else [],
            languages=["en"] if i % 3 == 0 else [],
        )
        for i in range(9)
    ]  # fmt: skip
    batch = world.ranking.RankBatch(ranking_pb2.RankBatchRequest(requests=requests), timeout=10.0)
    assert [r.request_id for r in batch.responses] == [f"b{i}" for i in range(9)]
    for request, together in zip(requests, batch.responses, strict=True):
        alone = world.ranking.Rank(request, timeout=10.0)
        assert [s.stream_id for s in alone.streams] == [s.stream_id for s in together.streams]
        np.testing.assert_allclose([s.score for s in alone.streams], [s.score for s in together.streams], rtol=1e-6)
    assert not world.ranking.RankBatch(ranking_pb2.RankBatchRequest(), timeout=10.0).responses


def test_a_batch_larger_than_the_engines_own_is_answered_completely_and_in_order(world: Client) -> None:
    requests = [ranking_pb2.RankRequest(request_id=f"big-{i}", limit=1 + i % 5) for i in range(200)]
    batch = world.ranking.RankBatch(ranking_pb2.RankBatchRequest(requests=requests), timeout=10.0)
    assert [(r.request_id, len(r.streams)) for r in batch.responses] == [(f"big-{i}", 1 + i % 5) for i in range(200)]
    assert max(r.timings.batch_rows for r in batch.responses) <= world.app.settings.serve.max_batch_rows


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"request_id": "r" * 65}, "request_id"),
        ({"viewer_id": "v" * 65}, "viewer_id"),
        ({"viewer_embedding": [1.0]}, "viewer_embedding"),
        ({"viewer_embedding": [1.0, math.nan, 0.0, 0.0]}, "viewer_embedding"),
        ({"viewer_embedding": [math.inf, 0.0, 0.0, 0.0]}, "viewer_embedding"),
        ({"viewer_embedding": [1e7, 0.0, 0.0, 0.0]}, "viewer_embedding"),
        ({"viewer_embedding": [1e-7, 0.0, 0.0, 0.0]}, "viewer_embedding"),
        ({"surface": "nowhere"}, "surface"),
        ({"languages": ["x" * 65]}, "languages[0]"),
        ({"categories": ["x"] * 65}, "categories"),
        ({"region": "é" * 33}, "region"),
        ({"followed_creator_ids": ["x"] * 1_001}, "followed_creator_ids"),
        ({"exclude_stream_ids": ["ok", "x" * 65]}, "exclude_stream_ids[1]"),
    ],
)
def test_a_bad_field_is_named_alone_and_inside_a_batch(world: Client, fields: dict[str, Any], field: str) -> None:
    with pytest.raises(grpc.RpcError) as failed:
        world.rank(**fields)
    code, details = status_of(failed.value)
    assert code == "INVALID_ARGUMENT" and details.startswith(f"{field}: ")
    batch = ranking_pb2.RankBatchRequest(requests=[ranking_pb2.RankRequest(), ranking_pb2.RankRequest(**fields)])
    with pytest.raises(grpc.RpcError) as failed:
        world.ranking.RankBatch(batch, timeout=10.0)
    assert status_of(failed.value)[1].startswith(f"requests[1].{field}: ")
    with pytest.raises(grpc.RpcError) as failed:
        explain(world, "s01", **fields)
    assert status_of(failed.value)[1].startswith(f"request.{field}: ")


def test_bytes_that_are_no_message_get_a_status_and_the_server_lives_on(world: Client) -> None:
    raw = world.channel.unary_unary("/liverank.v1.Ranking/Rank")
    with pytest.raises(grpc.RpcError) as failed:
        raw(b"\xff\xff\xff", timeout=10.0)
    assert status_of(failed.value)[0] == "INVALID_ARGUMENT" and "not a valid message" in status_of(failed.value)[1]
    assert world.rank().streams


def test_a_large_or_small_embedding_is_only_a_direction(world: Client) -> None:
    one = world.rank(viewer_embedding=[5e5, 5e5, -5e5, 0.0])
    other = world.rank(viewer_embedding=[1e-6, 1e-6, -1e-6, 0.0])
    assert [s.stream_id for s in one.streams] == [s.stream_id for s in other.streams]


def explain(world: Client, stream_id: str, **fields: Any) -> ranking_pb2.ExplainResponse:
    request = ranking_pb2.RankRequest(**fields)
    return world.ranking.Explain(ranking_pb2.ExplainRequest(request=request, stream_id=stream_id), timeout=10.0)


def test_explain_follows_a_shown_stream_to_its_place(world: Client) -> None:
    reply = world.rank(request_id="why", limit=10, viewer_embedding=embedding(1))
    for place, stream in enumerate(reply.streams, 1):
        found = explain(world, stream.stream_id, request_id="why", limit=10, viewer_embedding=embedding(1))
        assert found.position_in_slate == place and not found.not_shown_reason
        names = {reply.source_names[i] for i in range(8) if stream.sources >> i & 1}
        assert set(found.sources) == names and found.position_before_slate >= 1
        scores = {s.name: s.value for s in found.scores}
        assert scores["utility"] == pytest.approx(stream.score, rel=1e-5) and 0 <= scores["trend"] <= 1
        features = {f.name: f for f in found.features}
        assert features["viewers"].value == 10 * int(stream.stream_id[1:])
        assert features["unique_viewers"].state == ranking_pb2.FeatureValue.MISSING
        assert len(found.features) == len(world.app.engine.features)


@pytest.mark.parametrize(
    ("stream_id", "fields", "reason"),
    [
        ("s05", {}, "rule:region"),
        ("s06", {"surface": "kids"}, "rule:age_rating"),
        ("s07", {"languages": ["en"]}, "rule:language"),
        ("s07", {"categories": ["fashion"]}, "rule:category"),
        ("s07", {"exclude_stream_ids": ["s07"]}, "rule:excluded"),
    ],
)
def test_explain_names_the_rule_that_kept_a_stream_out(
    world: Client, stream_id: str, fields: dict[str, Any], reason: str
) -> None:
    found = explain(world, stream_id, limit=100, **fields)
    assert found.not_shown_reason == reason and found.position_in_slate == 0
    assert {r.rule for r in found.rules if r.excluded} == {reason.removeprefix("rule:")}


def test_explain_tells_caps_and_limits_apart(world: Client) -> None:
    shown = {s.stream_id for s in world.rank(request_id="e", limit=20).streams}
    reasons = {
        explain(world, f"s{i:02}", request_id="e", limit=20).not_shown_reason
        for i in range(60)
        if f"s{i:02}" not in shown and i not in (5,)
    }
    assert reasons <= {"below_limit", "creator_cap", "category_cap"} and "below_limit" in reasons


def test_explain_of_an_unknown_stream_is_not_found(world: Client) -> None:
    with pytest.raises(grpc.RpcError) as failed:
        explain(world, "never-heard-of")
    assert status_of(failed.value)[0] == "NOT_FOUND"


def test_views_built_before_and_after_new_streams_within_one_tick_fit_together(tmp_path: Path) -> None:
    with running_app(tmp_path, rank={"tick_ms": 3_600_000}) as client:
        client.publish(*(started(f"en{i}", 0, language="en") for i in range(3)))
        client.tick()
        assert len(client.rank(languages=["en"]).streams) == 3  # this view now exists
        client.publish(*(started(f"de{i}", 0, language="de") for i in range(4)))  # the table has more rows
        requests = [ranking_pb2.RankRequest(languages=[name]) for name in ("en", "de", "fr")]
        batch = client.ranking.RankBatch(ranking_pb2.RankBatchRequest(requests=requests), timeout=10.0)
        assert [len(r.streams) for r in batch.responses] == [3, 0, 0], "new streams await their first tick"
        assert len(client.rank(exclude_stream_ids=["de1"], followed_creator_ids=["creator-de2"]).streams) == 3
        client.tick()
        assert len(client.rank(languages=["de"]).streams) == 4


def test_a_refresh_that_was_asked_for_is_not_followed_by_one_of_the_same_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_app(tmp_path) as client:
        engine, jobs = client.app.engine, []
        assert engine._refresher is not None
        monkeypatch.setattr(engine._refresher, "submit", lambda job: jobs.append(job.as_of_ms) or True)

        def refresh_when_one_is_due() -> None:
            client.clock.advance(5_000)
            engine.refresh_now()
            engine._tick()

        for _ in range(2):
            engine.call(refresh_when_one_is_due).result(10.0)
        assert jobs == [], "its scores would replace those that were asked for"
        client.clock.advance(1_000)
        eventually(lambda: jobs, what="the next one, in its time")
        assert jobs[0] == T0 + 11_000


def test_min_offset_waits_for_the_write_and_fails_precisely_when_it_does_not_come(tmp_path: Path) -> None:
    with running_app(tmp_path) as client:
        ack = client.publish(started("s", 0))
        assert client.rank(min_offset=ack.offset).applied_offset >= ack.offset
        with pytest.raises(grpc.RpcError) as failed:
            client.ranking.Rank(ranking_pb2.RankRequest(min_offset=99), timeout=0.5)
        assert status_of(failed.value)[0] in ("FAILED_PRECONDITION", "DEADLINE_EXCEEDED")
        waiting = client.ranking.Rank.future(ranking_pb2.RankRequest(min_offset=ack.offset + 1), timeout=10.0)
        client.publish(started("t", 0))
        assert waiting.result().applied_offset == ack.offset + 1


def test_overload_is_refused_early_with_a_hint_when_to_retry(tmp_path: Path) -> None:
    with running_app(tmp_path, serve={"port": 0, "metrics_port": 0, "max_queue_rows": 3}) as client:
        held, release = threading.Event(), threading.Event()
        client.app.engine.call(lambda: (held.set(), release.wait(10.0)))  # the engine is busy
        assert held.wait(10.0)
        waiting = [client.ranking.Rank.future(ranking_pb2.RankRequest(), timeout=10.0) for _ in range(3)]
        eventually(lambda: queued_rows(client.app) == 3, what="the queue is full")
        with pytest.raises(grpc.RpcError) as refused:
            client.rank()
        release.set()
        assert status_of(refused.value)[0] == "RESOURCE_EXHAUSTED"
        hints = dict(refused.value.trailing_metadata())
        assert int(hints["grpc-retry-pushback-ms"]) > 0
        assert all(call.result().applied_offset == 0 for call in waiting), "who waits is served"


def test_with_no_time_left_to_rank_the_popular_list_is_returned_verified_and_disclosed(
    tmp_path: Path,
) -> None:
    with running_app(tmp_path, rank={"min_budget_ms": 60_000}) as client:
        assert not client.rank().streams, "an empty table has an empty list"
        client.publish(*(started(f"s{i}", 0, language="en" if i % 2 else "de") for i in range(6)))
        client.publish(*(event(f"s{i}", 0, viewer_count={"count": i}) for i in range(6)))
        client.tick()
        client.publish(event("s5", 0, epoch=1, ended={}))  # after the list was made
        reply = client.rank(languages=["en"], exclude_stream_ids=["s1"])
        assert [s.stream_id for s in reply.streams] == ["s3"]
        assert reply.degradation.level == ranking_pb2.Degradation.POPULAR and reply.model_version == "popular"
        assert "deadline" in reply.degradation.reasons[0]


def test_without_a_model_the_formula_ranks_and_the_reply_says_so(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with running_app(tmp_path, model=False) as client:
        client.publish(started("small", 0), started("large", 0))
        client.publish(event("small", 0, viewer_count={"count": 3}), event("large", 0, viewer_count={"count": 3_000}))
        assert client.shown(surface="chart") == ["large", "small"]
        reply = client.rank()
        assert reply.degradation.level == ranking_pb2.Degradation.FORMULA and reply.model_version == "formula"
        assert reply.degradation.reasons


def test_an_unscored_stream_is_findable_at_once_and_a_nan_score_never_ranks_first(tmp_path: Path) -> None:
    with running_app(tmp_path) as client:
        client.publish(started("scored", 0), event("scored", 0, viewer_count={"count": 50}))
        client.tick()
        client.publish(started("newcomer", 0))
        client.app.engine.call(client.app.engine._tick).result(10.0)
        assert "newcomer" in [s.stream_id for s in client.rank().streams]

        def poison() -> None:
            slot = int(client.app.engine.table.map.lookup(*_packed("scored"))[0])
            client.app.engine.streams.trend[slot] = np.inf

        client.app.engine.call(poison).result(10.0)
        assert client.rank(surface="chart").streams[0].stream_id == "newcomer"


def _packed(stream_id: str) -> Any:
    from kernels.idmap import pack_ids

    return pack_ids([stream_id.encode()])


def test_rules_exclude_demote_and_reload_without_a_restart(tmp_path: Path) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text("[surface.default]\n")
    with running_app(tmp_path, rank={"rules_file": str(rules)}) as client:
        client.publish(started("a", 0), started("b", 0))
        client.publish(event("a", 0, viewer_count={"count": 500}), event("b", 0, viewer_count={"count": 5}))
        assert set(client.shown()) == {"a", "b"}
        rules.write_text(
            "[surface.default]\n[rule.crowded]\nexclude = true\n"
            'when = [{ feature = "viewers", above = 100, until = 50 }]\n'
        )
        client.admin.ReloadRules(admin_pb2.ReloadRulesRequest(), timeout=10.0)
        assert [s.stream_id for s in client.rank().streams] == ["b"]
        assert explain(client, "a").not_shown_reason == "rule:crowded"
        client.publish(event("a", 0, viewer_count={"count": 60}))  # back, but not past `until`
        assert client.shown() == ["b"]
        client.publish(event("a", 0, viewer_count={"count": 40}))
        assert set(client.shown()) == {"a", "b"}
        rules.write_text("[surface.default]\n[rule.x]\nexclude = 3\n")
        with pytest.raises(grpc.RpcError) as failed:
            client.admin.ReloadRules(admin_pb2.ReloadRulesRequest(), timeout=10.0)
        code, details = status_of(failed.value)
        assert code == "INVALID_ARGUMENT" and "rule.x" in details
        assert set(client.shown()) == {"a", "b"}


def test_a_stream_marked_as_spam_is_not_shown_until_cleared(tmp_path: Path) -> None:
    with running_app(tmp_path) as client:
        client.publish(started("s", 0))
        assert client.shown() == ["s"]
        client.publish(event("s", 0, moderated={"action": fence.MARK_SPAM}))
        assert [s.stream_id for s in client.rank().streams] == []
        client.publish(event("s", 0, moderated={"action": fence.CLEAR_SPAM}))
        assert client.shown() == ["s"]
