"""Embeddings of viewers who bring none: from a store, by way of a cache, and never at the engine's expense.

The threads that handle calls ask and wait, no longer than their deadline; one thread talks to the store, and takes
everything that waits into one command. What comes too late for a request is in the cache for the next one. A breaker
spares a store that fails: until it is back, requests are ranked without an embedding, at once, and say so.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from server.clock import Clock
from server.config import EmbeddingSettings, Settings
from server.errors import ConfigError, StoreError, StoreTimeout
from server.live.event_checks import norm_problem
from server.live.table import unit
from server.scoring.ladder import Ladder

logger = logging.getLogger(__name__)

MOST_PER_COMMAND = 512
"""Keys of one command: 128 KiB of answer at D = 64, so that no command takes long."""


class Store(Protocol):
    """Bytes by key. Called from one thread."""

    def get(self, keys: Sequence[str]) -> Sequence[bytes | None]:
        """The values in the order of the keys; None where there is none.

        Raises:
            StoreTimeout: not in time. StoreError: an error, or no connection.
        """
        ...

    def close(self) -> None:
        """Gives up the connection; idempotent."""
        ...


@dataclass(frozen=True)
class Found:
    """What is known of one viewer. embedding: float32[D] of unit length; None: there is none, or see ``problem``.

    outcome: "found", "absent", "timeout", "unavailable", "breaker_open", "too_many", "wrong_size", "not_finite" or
    "bad_length". problem: what failed, for the reply; "" for the first two.
    """

    embedding: NDArray[np.float32] | None
    outcome: str
    problem: str = ""


class ViewerEmbeddings:
    """Looks embeddings up. Any thread may ask.

    Args:
        dim: D. clock: for the breaker; waiting and age are on the monotonic clock.
        on_lookup: told outcome and whether the cache had it, once per viewer asked for.
    """

    def __init__(
        self,
        store: Store,
        settings: EmbeddingSettings,
        dim: int,
        clock: Clock,
        on_lookup: Callable[[str, bool], None] = lambda outcome, cached: None,
    ) -> None:
        self._store, self._settings, self._dim, self._clock = store, settings, dim, clock
        self._on_lookup = on_lookup
        self._breaker = Ladder(settings.breaker_failures, settings.breaker_open_ms, 0)
        self._changed = threading.Condition()
        # Guarded by the condition:
        self._cache: OrderedDict[str, tuple[Found, float]] = OrderedDict()
        self._waiting: dict[str, Future[Found]] = {}  # for the next command
        self._asked: dict[str, Future[Found]] = {}  # in the command that is under way
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="viewer-embeddings", daemon=True)
        self._thread.start()

    def find(self, viewer_ids: Sequence[str], deadline_s: float) -> list[Found]:
        """What is known of each viewer, by ``deadline_s`` (monotonic) or the settings' deadline if that is sooner."""
        ends_s = min(deadline_s, time.monotonic() + self._settings.deadline_ms / 1000)
        with self._changed:
            known = {viewer: hit for viewer in viewer_ids if (hit := self._cached(viewer)) is not None}
            missing = [viewer for viewer in dict.fromkeys(viewer_ids) if viewer not in known]
            coming = self._ask(missing) if missing else {}
        late = Found(None, "timeout", f"timeout: no answer within {self._settings.deadline_ms} ms")
        found = dict(known)
        for viewer, answer in coming.items():
            try:
                found[viewer] = answer.result(max(0.0, ends_s - time.monotonic()))
            except (TimeoutError, CancelledError):
                found[viewer] = late
        for viewer in viewer_ids:
            self._on_lookup(found[viewer].outcome, viewer in known)
        return [found[viewer] for viewer in viewer_ids]

    def close(self) -> None:
        """Ends the thread, after the command that it may wait for."""
        with self._changed:
            self._closing = True
            for answer in self._waiting.values():
                answer.cancel()
            self._waiting.clear()
            self._changed.notify()
        self._thread.join(2 * self._settings.timeout_ms / 1000 + 1.0)
        self._store.close()

    def _cached(self, viewer: str) -> Found | None:
        entry = self._cache.get(viewer)
        if entry is None:
            return None
        if time.monotonic() - entry[1] > self._settings.cache_ms / 1000:
            del self._cache[viewer]
            return None
        self._cache.move_to_end(viewer)
        return entry[0]

    def _ask(self, viewers: list[str]) -> dict[str, Future[Found]]:
        """Puts viewers before the thread, where that may be done; what comes of each."""
        pending = {**self._waiting, **self._asked}
        new = [viewer for viewer in viewers if viewer not in pending]
        if self._closing:
            refused = Found(None, "unavailable", "unavailable: the server is draining")
        elif len(self._waiting) + len(new) > self._settings.max_waiting:
            most = self._settings.max_waiting
            refused = Found(None, "too_many", f"too_many: at most {most} viewers may wait for the store")
        elif new and not self._breaker.may_call(self._clock.now_ms()):
            (problem, *_) = self._breaker.assess(self._clock.now_ms(), None).reasons
            refused = Found(None, "breaker_open", f"breaker_open: {problem}")
        else:
            self._waiting.update({viewer: Future() for viewer in new})
            self._changed.notify()
            return {viewer: pending.get(viewer) or self._waiting[viewer] for viewer in viewers}
        no: Future[Found] = Future()
        no.set_result(refused)
        return dict.fromkeys(viewers, no)

    # --- the thread ---------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if self._closing:
                    return
                viewers = list(self._waiting)[:MOST_PER_COMMAND]
                self._asked = asked = {viewer: self._waiting.pop(viewer) for viewer in viewers}
            answers, problem = self._get(viewers)
            with self._changed:
                self._asked = {}
                found = self._take(viewers, answers, problem)
            for answer, what in zip(asked.values(), found, strict=True):
                answer.set_result(what)

    def _get(self, viewers: list[str]) -> tuple[Sequence[bytes | None], Found | None]:
        try:
            return self._store.get([self._settings.key_prefix + viewer for viewer in viewers]), None
        except StoreTimeout as error:
            return (), Found(None, "timeout", f"timeout: {error}")
        except StoreError as error:
            return (), Found(None, "unavailable", f"unavailable: {error}")
        except Exception as error:  # foreign code; without this thread every lookup would time out for good
            logger.exception("unexpected fault in the store of viewers' embeddings")
            return (), Found(None, "unavailable", f"unavailable: {type(error).__name__}")

    def _take(self, viewers: list[str], answers: Sequence[bytes | None], problem: Found | None) -> list[Found]:
        """Into the cache. A failure is not: it is for those who wait now, and the next request asks again."""
        now_ms, now_s = self._clock.now_ms(), time.monotonic()
        if problem is not None:
            self._breaker.failed(now_ms, problem.problem)
            return [problem] * len(viewers)
        self._breaker.succeeded(now_ms, "")
        found = [self._checked(value) for value in answers]
        for viewer, what in zip(viewers, found, strict=True):
            self._cache[viewer] = (what, now_s)
            self._cache.move_to_end(viewer)
        while len(self._cache) > self._settings.cache_viewers:
            self._cache.popitem(last=False)
        return found

    def _checked(self, value: bytes | None) -> Found:
        """A value that is no embedding counts as none, until the cache forgets it: asking again would not help."""
        if value is None:
            return Found(None, "absent")
        if len(value) != 4 * self._dim:
            wanted = f"{4 * self._dim} bytes ({self._dim} float32) wanted, got {len(value)}"
            return Found(None, "wrong_size", f"wrong_size: {wanted}")
        embedding = np.frombuffer(value, "<f4").astype(np.float32)
        if not np.isfinite(embedding).all():
            return Found(None, "not_finite", "not_finite: finite floats wanted, got NaN or infinity")
        if problem := norm_problem(embedding):
            return Found(None, "bad_length", f"bad_length: {problem}")
        return Found(unit(embedding), "found") if embedding.any() else Found(None, "absent")


def open_embeddings(
    settings: Settings, clock: Clock, on_lookup: Callable[[str, bool], None]
) -> ViewerEmbeddings | None:
    """The store of viewers' embeddings, if one is configured. Raises ConfigError when it cannot be used at all."""
    chosen = settings.viewers.embeddings
    if not chosen.url.get_secret_value():
        return None
    try:
        from server.viewers.redis_store import RedisStore
    except ImportError as error:
        raise ConfigError(f"viewers.embeddings.url: needs the package redis (liverank[redis]): {error}") from error
    return ViewerEmbeddings(RedisStore(chosen), chosen, settings.table.embedding_dim, clock, on_lookup)
