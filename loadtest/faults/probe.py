"""Asks all the time and keeps what it was told: when answers stopped being as usual, and when they were again."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import grpc
from liverank.v1 import ranking_pb2, ranking_pb2_grpc

from loadtest.liveness.producer import CHANNEL_OPTIONS
from loadtest.processes import wait_for

PAUSE_S = 0.01
CALL_WITHIN_S = 10.0
"""A server that hangs fails here; one that is slow because its machine is busy does not."""
USUAL = "NONE"


@dataclass(frozen=True)
class Answer:
    """level: of the degradation, or the status code of a failed call with ``failed``."""

    at_s: float
    level: str
    failed: bool
    reasons: tuple[str, ...]
    model_version: str
    score_age_ms: int


class Probe:
    """One caller of Rank, from construction to `close`."""

    def __init__(self, address: str) -> None:
        self.answers: list[Answer] = []
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._rank = ranking_pb2_grpc.RankingStub(self._channel).Rank
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="probe", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                reply = self._rank(ranking_pb2.RankRequest(limit=1), timeout=CALL_WITHIN_S)
            except grpc.RpcError as error:
                answer = Answer(time.monotonic(), error.code().name, True, (), "", 0)
            else:
                level = ranking_pb2.Degradation.Level.Name(reply.degradation.level)
                reasons = tuple(reply.degradation.reasons)
                answer = Answer(time.monotonic(), level, False, reasons, reply.model_version, reply.score_age_ms)
            self.answers.append(answer)
            self._stop.wait(PAUSE_S)

    def since(self, at_s: float) -> list[Answer]:
        """Answers received after ``at_s`` (monotonic)."""
        return [a for a in list(self.answers) if a.at_s > at_s]

    def wait_unusual(self, since_s: float, within_s: float, reason: str = "") -> Answer:
        """The first answer after ``since_s`` that was degraded or failed (and gives such a reason, if asked for one).

        Raises:
            TimeoutError: there was none.
        """

        def unusual() -> Answer | None:
            answers = (a for a in self.since(since_s) if a.level != USUAL)
            return next((a for a in answers if not reason or any(r.startswith(reason) for r in a.reasons)), None)

        found: Answer = wait_for(unusual, within_s, f"an unusual answer {reason}")
        return found

    def wait_usual(self, since_s: float, within_s: float, model_version: str = "") -> Answer:
        """The first usual answer after ``since_s`` (by that model version). Raises TimeoutError."""

        def usual() -> Answer | None:
            answers = self.since(since_s)
            return next((a for a in answers if a.level == USUAL and a.model_version.startswith(model_version)), None)

        found: Answer = wait_for(usual, within_s, f"a usual answer {model_version}")
        return found

    def discloses(self, since_s: float) -> bool:
        """Every unusual answer since then says what it is: a failed call does, a degraded one by its reasons."""
        return all(a.failed or a.reasons for a in self.since(since_s) if a.level != USUAL)

    def close(self) -> None:
        self._stop.set()
        self._thread.join(5.0)
        self._channel.close()
