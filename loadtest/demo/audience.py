"""The viewers' side of the demo: asks for slates all the time and checks every one of them."""

from __future__ import annotations

import threading
import time

import grpc
import numpy as np
from liverank.v1 import ranking_pb2 as pb
from liverank.v1 import ranking_pb2_grpc as pb_grpc

from loadtest.demo.platform import Platform
from loadtest.world import NEVER

ASK_EVERY_S = 0.1


class Audience:
    """Threads of viewers at a constant rate.

    Attributes:
        latencies_ms: per Rank call, measured from the moment it was due (a stall counts).
        shown_after_end: streams in a reply whose end was acknowledged before the request was sent.
        shown_silent_ms: how long the silently dead streams that were still shown had been dead; their
            lease allows that, up to its length.
    """

    def __init__(self, platform: Platform, channel: grpc.Channel, threads: int, seed: int) -> None:
        self._platform = platform
        self._rank = pb_grpc.RankingStub(channel)
        self.latencies_ms: list[float] = []
        self.shown_after_end: list[str] = []
        self.shown_silent_ms: list[int] = []
        self.degraded = 0
        self.models: set[str] = set()
        self.failures: list[str] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(np.random.default_rng((seed, i)), i), name=f"viewer-{i}")
            for i in range(threads)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(10)

    def _run(self, rng: np.random.Generator, number: int) -> None:
        with self._platform.lock:
            people = [self._platform.world.viewer(int(v)) for v in self._platform.world.sample_viewers(50, rng)]
        due_s, calls = time.monotonic(), 0
        while not self._stop.is_set():
            person = people[calls % len(people)]
            request = pb.RankRequest(
                request_id=f"{number}-{calls}",
                viewer_id=person.viewer_id,
                viewer_embedding=person.embedding,
                region=person.region,
                languages=person.languages if calls % 3 else [],
                followed_creator_ids=person.followed,
            )
            sent_s = time.monotonic()
            try:
                reply = self._rank.Rank(request, timeout=5.0)
            except grpc.RpcError as error:
                self.failures.append(f"{error.code().name}: {error.details()}")
            else:
                self._check(reply, sent_s, due_s)
                self._platform.seen(person, reply, rng)
            calls += 1
            due_s += ASK_EVERY_S
            self._stop.wait(max(0.0, due_s - time.monotonic()))

    def _check(self, reply: pb.RankResponse, sent_s: float, due_s: float) -> None:
        answered_s = time.monotonic()
        platform = self._platform
        dead = [
            s.stream_id for s in reply.streams if platform.ended_at.get((s.stream_id, s.epoch), answered_s) < sent_s
        ]
        with platform.lock:
            ids = [s.stream_id for s in reply.streams]
            silent_ms = platform.world.truth.dead_for_ms(ids, platform.world.now_ms) if ids else []
        with self._lock:
            self.latencies_ms.append((answered_s - due_s) * 1000)
            self.shown_after_end += dead
            self.shown_silent_ms += [int(ms) for ms in silent_ms if 0 < ms < NEVER]
            self.degraded += reply.degradation.level != pb.Degradation.NONE
            self.models.add(reply.model_version)
