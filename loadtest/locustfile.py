"""Feed services and producers for locust: people watch the charts while liverank runs.

    .venv/bin/locust -f loadtest/locustfile.py --host 127.0.0.1:7710            # then open the web page
    .venv/bin/locust -f loadtest/locustfile.py --host … --headless -u 50 -r 10 -t 60s

A server with TLS and roles: set LIVERANK_CLIENT__CA_FILE and LIVERANK_CLIENT__TOKEN_FILE, the token with the roles
reader and producer and `producer_ids = ["*"]`.
Distributed: `--master` on one machine, `--worker --master-host M` on the others. Locust is a closed loop: a
user waits for its answer before it asks again, so a stalled server is asked less often and the percentiles
look better than they are (coordinated omission). For numbers use `liverank bench`.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from typing import Any, ClassVar

import grpc
import grpc.experimental.gevent as grpc_gevent
import numpy as np
from liverank.v1 import (
    ingest_pb2,
    ingest_pb2_grpc,
    liveness_pb2,
    liveness_pb2_grpc,
    ranking_pb2,
    ranking_pb2_grpc,
)
from locust import User, between, constant_pacing, task

from loadtest.world import World, WorldSettings
from server.channel import open_channel

grpc_gevent.init_gevent()  # gRPC's own threads would block every other user

VIEWERS, LIVE = 500, 200


class GrpcUser(User):
    """A user with a channel; reports every call to locust under its method's name."""

    abstract = True

    def on_start(self) -> None:
        self.channel = open_channel(self.host)

    def on_stop(self) -> None:
        self.channel.close()

    def timed(self, name: str, call: Callable[[], Any]) -> Any:
        """Runs one call; a failed one is a failure in locust's tables, with its status, and gives None."""
        begun_s = time.perf_counter()
        answer, failure, size = None, None, 0
        try:
            answer = call()
            size = answer.ByteSize()
        except grpc.RpcError as error:
            failure = RuntimeError(f"{error.code().name}: {error.details()}")
        self.environment.events.request.fire(
            request_type="grpc",
            name=name,
            response_time=(time.perf_counter() - begun_s) * 1000,
            response_length=size,
            exception=failure,
            context={},
        )
        return answer


class Viewer(GrpcUser):
    """Asks for feeds as different people do (popular people more often) and checks what it clicks on."""

    weight = 20
    wait_time = between(0.05, 0.5)
    people: ClassVar[list[Any]] = []

    def on_start(self) -> None:
        super().on_start()
        self.ranking = ranking_pb2_grpc.RankingStub(self.channel)
        self.liveness = liveness_pb2_grpc.LivenessStub(self.channel)
        self.rng = np.random.default_rng()
        self.seen: list[str] = []
        if not Viewer.people:  # drawing people costs; all users share them, Zipf-distributed
            world = World(WorldSettings(target_live=LIVE, warm_start=False))
            numbers = world.sample_viewers(VIEWERS, np.random.default_rng(1))
            Viewer.people = [world.viewer(int(number)) for number in numbers]

    @task(10)
    def feed(self) -> None:
        person = Viewer.people[int(self.rng.integers(len(Viewer.people)))]
        request = ranking_pb2.RankRequest(
            viewer_id=person.viewer_id,
            viewer_embedding=person.embedding,
            region=person.region,
            followed_creator_ids=person.followed,
            exclude_stream_ids=self.seen[-20:],
        )
        reply = self.timed("Rank", lambda: self.ranking.Rank(request, timeout=2.0))
        if reply is not None and reply.streams:
            self.seen.append(reply.streams[0].stream_id)

    @task(2)
    def click(self) -> None:
        if self.seen:
            refs = [liveness_pb2.StreamRef(stream_id=stream_id) for stream_id in self.seen[-3:]]
            request = liveness_pb2.CheckLiveRequest(streams=refs)
            self.timed("CheckLive", lambda: self.liveness.CheckLive(request, timeout=2.0))


class Platform(GrpcUser):
    """One simulated platform in real time, whatever the number of viewers."""

    fixed_count = 1
    wait_time = constant_pacing(1.0)

    def on_start(self) -> None:
        super().on_start()
        start_ms = int(time.time() * 1000)
        # A new seed per run: stream ids must not meet those of an earlier run in the same server.
        settings = WorldSettings(seed=start_ms % 2**31, start_ms=start_ms, target_live=LIVE, mean_session_ms=120_000)
        self.world = World(settings)
        self.producer = f"locust-{start_ms}"
        self.outbox: queue.SimpleQueue[ingest_pb2.EventBatch | None] = queue.SimpleQueue()
        self.acks = ingest_pb2_grpc.IngestStub(self.channel).Publish(iter(self.outbox.get, None))

    def on_stop(self) -> None:
        self.outbox.put(None)
        super().on_stop()

    @task
    def second(self) -> None:
        for batch in self.world.step().to_batches():
            batch.producer_id = f"{self.producer}-{batch.producer_id}"
            for event in batch.events:
                event.stream_id = f"{self.producer}-{event.stream_id}"
            self.outbox.put(batch)
            self.timed("Publish", lambda: next(self.acks))
