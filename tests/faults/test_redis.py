"""Viewers' embeddings from a real Redis, and what a server does while it is killed, stalled, or full of rubbish."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from liverank.v1 import ranking_pb2

from server.clock import SystemClock
from tests.app import Client, running_app
from tests.events import started
from tests.redis_server import RunningRedis, running_redis
from tests.triton_server import eventually

NORTH = np.array([0.0, 2.0, 0.0, 0.0], np.float32)
DEADLINE_MS = 10_000
"""Of a Redis that answers: no busy machine is that slow."""
STALLED_DEADLINE_MS = 400


@pytest.fixture
def redis_server() -> Iterator[RunningRedis]:
    with running_redis() as running:
        yield running


@pytest.fixture
def client(tmp_path: Path, redis_server: RunningRedis, request: pytest.FixtureRequest) -> Iterator[Client]:
    """A server; its parameter: the deadline of a look-up, ms."""
    deadline_ms = getattr(request, "param", DEADLINE_MS)
    embeddings = {
        "url": redis_server.url, "deadline_ms": deadline_ms, "timeout_ms": 2 * deadline_ms, "cache_ms": 1,
        "breaker_open_ms": 200, "breaker_failures": 2,
    }  # fmt: skip
    with running_app(tmp_path, SystemClock(), viewers={"embeddings": embeddings}, table={"lease_ms": 600_000}) as made:
        now_ms = made.clock.now_ms()
        rows = np.eye(4)
        made.publish(*(started(f"s{i}", 0, now_ms, embedding=rows[i % 4].tolist()) for i in range(8)))
        made.tick()
        yield made


def personal(reply: ranking_pb2.RankResponse) -> bool:
    """Whether the viewer's embedding was used."""
    bit = 1 << list(reply.source_names).index("personal")
    return any(stream.sources & bit for stream in reply.streams)


def reasons(reply: ranking_pb2.RankResponse) -> list[str]:
    return [reason for reason in reply.degradation.reasons if reason.startswith("viewer_embedding")]


def test_a_viewer_who_brings_no_embedding_gets_the_one_in_redis(client: Client, redis_server: RunningRedis) -> None:
    redis_server.put("viewer:embedding:v", NORTH)
    eventually(lambda: personal(client.rank(viewer_id="v")))
    reply = client.rank(viewer_id="v")
    assert personal(reply) and not reasons(reply) and reply.degradation.level == ranking_pb2.Degradation.NONE
    stranger = client.rank(viewer_id="stranger")
    assert not personal(stranger) and not reasons(stranger), "to be unknown is no failure"
    asked = redis_server.commands().get("mget", 0)
    own = client.rank(viewer_id="v", viewer_embedding=[1.0, 0.0, 0.0, 0.0])
    assert (
        personal(own) and personal(client.rank(viewer_embedding=[1.0, 0.0, 0.0, 0.0])) and not personal(client.rank())
    )
    assert redis_server.commands()["mget"] == asked, "who brings one, or no name, is not looked up"


def test_a_batch_of_viewers_is_one_command(client: Client, redis_server: RunningRedis) -> None:
    for i in range(30):
        redis_server.put(f"viewer:embedding:v{i}", NORTH)
    eventually(lambda: personal(client.rank(viewer_id="v0")))
    before = redis_server.commands()["mget"]
    request = ranking_pb2.RankBatchRequest(
        requests=[ranking_pb2.RankRequest(viewer_id=f"v{i % 30}") for i in range(60)]
    )
    replies = client.ranking.RankBatch(request, timeout=10.0).responses
    assert len(replies) == 60 and all(personal(reply) for reply in replies)
    assert redis_server.commands()["mget"] == before + 1


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (b"twelve bytes", r"wrong_size: 16 bytes (4 float32) wanted, got 12"),
        (np.array([1, np.nan, 0, 0], np.float32), "not_finite"),
    ],
)
def test_rubbish_in_redis_is_not_ranked_with_and_is_disclosed(
    client: Client, redis_server: RunningRedis, value: bytes | np.ndarray, told: str
) -> None:
    redis_server.put("viewer:embedding:v", value)
    reply = eventually(lambda: (r := client.rank(viewer_id="v")) and any("timeout" not in x for x in reasons(r)) and r)
    assert reply.streams and not personal(reply) and told in reasons(reply)[0]
    assert all(np.isfinite(stream.score) for stream in reply.streams)


def test_a_killed_redis_costs_the_embedding_and_nothing_else_and_a_new_one_is_found(
    client: Client, redis_server: RunningRedis
) -> None:
    redis_server.put("viewer:embedding:v", NORTH)
    eventually(lambda: personal(client.rank(viewer_id="v")))
    redis_server.kill()
    reply = eventually(lambda: (r := client.rank(viewer_id="v")) and reasons(r) and r)
    assert len(reply.streams) == 8 and "unavailable" in reasons(reply)[0] and "127.0.0.1" in reasons(reply)[0]
    eventually(lambda: "breaker_open" in (reasons(client.rank(viewer_id="v")) or [""])[0])
    with running_redis(redis_server.port) as again:
        again.put("viewer:embedding:v", NORTH)
        eventually(lambda: personal(client.rank(viewer_id="v")))


@pytest.mark.parametrize("client", [STALLED_DEADLINE_MS], indirect=True)
def test_a_stalled_redis_delays_a_request_by_its_deadline_at_most_and_never_the_engine(
    client: Client, redis_server: RunningRedis
) -> None:
    redis_server.put("viewer:embedding:v", NORTH)
    eventually(lambda: personal(client.rank(viewer_id="v")))
    redis_server.stall()
    try:
        waiting = client.ranking.Rank.future(ranking_pb2.RankRequest(viewer_id="v"), timeout=10.0)
        assert len(client.rank().streams) == 8 and client.app.engine.call(lambda: 1).result(5.0) == 1
        reply = waiting.result(10.0)
        assert len(reply.streams) == 8 and reasons(reply)[0].startswith("viewer_embedding: timeout")

        def nobody_waits() -> bool:  # now and then one call is let through to try
            began_s = time.monotonic()
            told = reasons(client.rank(viewer_id="v"))[0]
            return "breaker_open" in told and time.monotonic() - began_s < STALLED_DEADLINE_MS / 1000

        eventually(nobody_waits, what="with the breaker open nobody waits")
        failed = client.app.metrics.registry.get_sample_value(
            "liverank_viewer_embeddings_total", {"outcome": "timeout", "cached": "false"}
        )
        assert failed
    finally:
        redis_server.go_on()
    eventually(lambda: personal(client.rank(viewer_id="v")))
