"""Those who ask and those who listen: rankers with slates and click-time checks, watchers of ends."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable

import grpc
from liverank.v1 import liveness_pb2, liveness_pb2_grpc, ranking_pb2, ranking_pb2_grpc

from loadtest.liveness.history import Heard, History, Moment, Reply
from loadtest.liveness.producer import CHANNEL_OPTIONS, RETRY_S

LIMIT = 100
CHECKED = 1_000
CALL_WITHIN_S = 5.0


class Ranker:
    """Asks as fast as it is answered (or every ``pause_s``): Rank, and every tenth time CheckLive."""

    def __init__(self, name: str, address: str, history: History, stream_ids: list[str], pause_s: float) -> None:
        self._name, self._history, self._pause_s = name, history, pause_s
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._rank = ranking_pb2_grpc.RankingStub(self._channel).Rank
        self._check = liveness_pb2_grpc.LivenessStub(self._channel).CheckLive
        refs = [liveness_pb2.StreamRef(stream_id=stream_id) for stream_id in stream_ids[:CHECKED]]
        self._refs = liveness_pb2.CheckLiveRequest(streams=refs)
        self.stop = threading.Event()

    def run(self) -> None:
        for number in itertools.count():
            if self.stop.is_set():
                break
            try:
                self._history.replies.append(self._ask(number))
            except grpc.RpcError:
                self._history.failed_calls += 1
                self.stop.wait(RETRY_S)
            self.stop.wait(self._pause_s)
        self._channel.close()

    def _ask(self, number: int) -> Reply:
        sent = Moment.now()
        if number % 10 == 9:
            statuses = self._check(self._refs, timeout=CALL_WITHIN_S)
            received = Moment.now()
            shown = tuple((s.stream_id, s.epoch) for s in statuses.streams if s.showable)
            return Reply(sent, received, statuses.as_of_ms, shown)
        request = ranking_pb2.RankRequest(request_id=f"{self._name}-{number}", limit=LIMIT)
        slate = self._rank(request, timeout=CALL_WITHIN_S)
        received = Moment.now()
        return Reply(sent, received, slate.as_of_ms, tuple((s.stream_id, s.epoch) for s in slate.streams))


class Watcher:
    """Listens to WatchEnded; hangs up now and then, and resumes where it was, after its own doing or ours.

    Attributes:
        told: why the server ended a subscription (status code names), other than by going away.
    """

    def __init__(self, name: str, address: str, history: History, seed: int, hang_up_after: int = 40) -> None:
        self._name, self._history, self._random = name, history, random.Random(seed)
        self._hang_up_after = hang_up_after
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._watch = liveness_pb2_grpc.LivenessStub(self._channel).WatchEnded
        self._call: grpc.Future | None = None
        self.after = 0
        self.told: list[str] = []
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.is_set():
            call = self._watch(liveness_pb2.WatchEndedRequest(after_offset=self.after))
            self._call = call
            try:
                call.initial_metadata()
                self._history.watching.setdefault(self._name, Moment.now())
                left = self._random.randrange(1, 2 * self._hang_up_after)
                for end in call:
                    self._history.heard.append(Heard(self._name, end.offset, end.stream_id, end.epoch, end.reason))
                    self.after = end.offset
                    left -= 1
                    if left == 0:
                        break
                call.cancel()
            except grpc.RpcError as error:
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                    self.told.append(error.code().name)
                self.stop.wait(RETRY_S)
        self._channel.close()

    def hang_up(self) -> None:
        """Ends `run`."""
        self.stop.set()
        if self._call is not None:
            self._call.cancel()


def in_thread(name: str, run: Callable[[], None]) -> threading.Thread:
    """A started daemon thread."""
    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread
