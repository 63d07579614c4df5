"""A ranker, asked once per batch in a thread of its own, within a deadline, behind a breaker."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from server.clock import Clock
from server.config import RankerSettings
from server.errors import ScorerTimeout, ScoringError
from server.scoring.base import Scores
from server.scoring.ladder import Ladder
from server.scoring.pace import Pace
from server.scoring.ranker_schema import RankerInputs
from server.scoring.refresh import OUTCOMES

log = logging.getLogger(__name__)

_SHARE_OF_DEADLINE = 0.5
"""Calls are meant to take so much of it: one takes twice as long as the mean now and then."""


class Ranker(Protocol):
    """A model `viewer × stream → heads` behind some transport. Called from one thread."""

    name: str

    def heads(self, inputs: RankerInputs, deadline_s: float) -> Scores:
        """``values`` float32[R, 4] in [0, 1], all finite, columns as `ranker_schema.HEADS`; within ``deadline_s``.

        Raises:
            ScorerUnavailable, ScorerTimeout, BadScores, SchemaMismatch.
        """
        ...

    def close(self) -> None:
        """Releases connections; idempotent."""
        ...


@dataclass(frozen=True)
class RankerCall:
    """One call. due_s: when its time is over, on the monotonic clock. refused: why it was not made; "" if it was."""

    answer: Future[Scores]
    due_s: float
    refused: str = ""

    def wait_s(self) -> float:
        """Seconds until `RankerCaller.finish` need not wait: 0 when the answer is there, or its time is over."""
        if self.refused or self.answer.done():
            return 0.0
        return max(0.0, self.due_s - time.monotonic())


class RankerCaller:
    """Calls a ranker for one thread, the engine's, which goes on meanwhile.

    A call that is overdue is given up, and no other is made until the model has let go of it. After
    ``breaker_failures`` failures in a row none is made for ``breaker_open_ms``, then one on trial. How long calls take
    per row is remembered, so that whoever makes them can make them small enough (`rows_in_time`).

    Args:
        on_call: told the outcome of every call ("ok", a value of `refresh.OUTCOMES`, "internal", "busy" or
            "breaker_open") and its seconds, in the thread that calls `finish`.
        on_answer: told when an answer came, in a thread of this object.
    """

    def __init__(
        self,
        ranker: Ranker,
        settings: RankerSettings,
        clock: Clock,
        on_call: Callable[[str, float], None] = lambda outcome, seconds: None,
        on_answer: Callable[[], None] = lambda: None,
    ) -> None:
        self._ranker, self._clock, self._on_call, self._on_answer = ranker, clock, on_call, on_answer
        self._deadline_s = settings.deadline_ms / 1000
        self._breaker = Ladder(settings.breaker_failures, settings.breaker_open_ms, 0)
        self._last: Future[Scores] | None = None
        self._pace = Pace()
        self._jobs: queue.SimpleQueue[tuple[RankerInputs, RankerCall] | None] = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._work, name="ranker", daemon=True)
        self._worker.start()

    def start(self, inputs: RankerInputs) -> RankerCall:
        """Makes a call, unless it is better not made; the caller must not change the arrays before it `finish`es."""
        due_s = time.monotonic() + self._deadline_s
        if self._last is not None and not self._last.done():
            return RankerCall(Future(), due_s, "busy: the model works on a call that was given up")
        if not self._breaker.may_call(self._clock.now_ms()):
            (problem, *_) = self._breaker.assess(self._clock.now_ms(), None).reasons
            return RankerCall(Future(), due_s, f"breaker_open: {problem}")
        return self._put(inputs, due_s)

    def rows_in_time(self) -> int:
        """Rows that a call may have to be likely answered in time; very many while that is not known. Any thread."""
        return self._pace.rows_in(_SHARE_OF_DEADLINE * self._deadline_s)

    def finish(self, call: RankerCall) -> tuple[Scores | None, str]:
        """(heads, "") or (None, why not). Waits until the call's time is over at most."""
        heads, problem = None, call.refused
        if not problem:
            heads, problem = self._result(call)
        outcome = problem.partition(":")[0] or "ok"
        if heads is not None:
            self._breaker.succeeded(self._clock.now_ms(), heads.model_version)
        elif not call.refused:
            self._breaker.failed(self._clock.now_ms(), problem)
        self._on_call(outcome, time.monotonic() - (call.due_s - self._deadline_s))
        return heads, problem

    def _result(self, call: RankerCall) -> tuple[Scores | None, str]:
        try:
            error = call.answer.exception(call.wait_s())
        except TimeoutError:
            return None, f"timeout: no answer within {self._deadline_s * 1e3:.0f} ms"
        if error is None:
            return call.answer.result(), ""
        if isinstance(error, ScoringError):
            return None, f"{OUTCOMES.get(type(error), 'internal')}: {error}"
        return None, f"internal: {type(error).__name__}"  # foreign code of the model's library; logged in the thread

    def warm(self, inputs: RankerInputs, within_s: float) -> str:
        """Loads the model and runs it, before anybody waits for it; "" or what went wrong. Not the engine's."""
        due_s = time.monotonic() + within_s
        try:
            self._put(inputs, due_s).answer.result(within_s)
            self._pace.forget()  # it was loaded
            self._put(inputs, due_s).answer.result(max(0.0, due_s - time.monotonic()))
        except (ScoringError, TimeoutError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def close(self) -> None:
        """Ends the thread after the call in progress, and closes the ranker."""
        self._jobs.put(None)
        self._worker.join(2 * self._deadline_s + 1.0)
        self._ranker.close()

    def _put(self, inputs: RankerInputs, due_s: float) -> RankerCall:
        call = RankerCall(Future(), due_s)
        self._last = call.answer
        self._jobs.put((inputs, call))
        return call

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._answer(*job)
            self._on_answer()

    def _answer(self, inputs: RankerInputs, call: RankerCall) -> None:
        began_s = time.monotonic()
        if (left_s := call.due_s - began_s) <= 0:
            call.answer.set_exception(ScorerTimeout("no time left before the deadline"))
            return
        try:
            heads = self._ranker.heads(inputs, left_s)
            self._pace.took(len(inputs), time.monotonic() - began_s)
            call.answer.set_result(heads)
        except ScoringError as error:
            if isinstance(error, ScorerTimeout):
                self._pace.stopped(len(inputs), time.monotonic() - began_s)
            call.answer.set_exception(error)
        except Exception as error:
            log.exception("unexpected fault in the ranker")
            call.answer.set_exception(error)
