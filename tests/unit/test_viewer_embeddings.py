"""Looking up viewers' embeddings: deadline, cache, breaker, and that what is wrong is never taken for an embedding."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from server.clock import ManualClock
from server.config import EmbeddingSettings, parse_settings
from server.errors import ConfigError, StoreError, StoreTimeout
from server.viewers.embeddings import MOST_PER_COMMAND, Found, ViewerEmbeddings
from tests.events import T0
from tests.triton_server import eventually

FOUND = np.array([3.0, 0.0, 4.0, 0.0], np.float32)


class FakeStore:
    """Values from a dictionary, or an error; waits while ``gate`` is closed."""

    def __init__(self, **values: bytes) -> None:
        self.values: dict[str, bytes] = {f"k:{name}": value for name, value in values.items()}
        self.error: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.commands: list[list[str]] = []
        self.closed = False

    def get(self, keys: Sequence[str]) -> Sequence[bytes | None]:
        self.commands.append(list(keys))
        assert self.gate.wait(60.0)
        if self.error is not None:
            raise self.error
        return [self.values.get(key) for key in keys]

    def close(self) -> None:
        self.closed = True


class Lookup:
    def __init__(self, store: FakeStore, **settings: Any) -> None:
        chosen = {"key_prefix": "k:", "deadline_ms": 5_000, **settings}
        self.clock, self.store, self.outcomes = ManualClock(T0), store, Counter[tuple[str, bool]]()
        count = threading.Lock()

        def counted(outcome: str, cached: bool) -> None:
            with count:
                self.outcomes[outcome, cached] += 1

        self.viewers = ViewerEmbeddings(store, EmbeddingSettings(**chosen), 4, self.clock, counted)

    def find(self, *viewers: str, within_s: float = 5.0) -> list[Found]:
        return self.viewers.find(viewers, time.monotonic() + within_s)


@contextmanager
def lookup(store: FakeStore, **settings: Any) -> Iterator[Lookup]:
    made = Lookup(store, **settings)
    try:
        yield made
    finally:
        store.gate.set()
        made.viewers.close()
        assert store.closed


def test_an_embedding_comes_at_unit_length_and_then_from_the_cache() -> None:
    with lookup(FakeStore(v=FOUND.tobytes())) as it:
        for cached in (False, True):
            found, absent = it.find("v", "w")
            assert found.embedding is not None and found.problem == "" and found.embedding.dtype == np.float32
            np.testing.assert_allclose(found.embedding, [0.6, 0.0, 0.8, 0.0])
            assert absent == Found(None, "absent"), "that there is none is no failure, and is remembered too"
            assert it.outcomes["found", cached] == it.outcomes["absent", cached] == 1
        assert it.store.commands == [["k:v", "k:w"]]


@pytest.mark.parametrize(
    ("value", "outcome"),
    [
        (FOUND[:3].tobytes(), "wrong_size"),
        (b"", "wrong_size"),
        (FOUND.astype(np.float64).tobytes(), "wrong_size"),
        (np.array([1, np.nan, 0, 0], np.float32).tobytes(), "not_finite"),
        (np.array([1, -np.inf, 0, 0], np.float32).tobytes(), "not_finite"),
        (np.full(4, 1e30, np.float32).tobytes(), "bad_length"),
        (np.full(4, 1e-30, np.float32).tobytes(), "bad_length"),
    ],
)
def test_what_is_no_embedding_is_not_used_and_is_said_for_that_viewer_alone(value: bytes, outcome: str) -> None:
    with lookup(FakeStore(bad=value, good=FOUND.tobytes())) as it:
        bad, good = it.find("bad", "good")
        assert bad.embedding is None and bad.outcome == outcome and bad.problem.startswith(outcome)
        assert good.embedding is not None and not good.problem
        assert len(it.find("bad", "good")) == 2 and len(it.store.commands) == 1, "asking again would not mend it"


def test_all_zero_is_no_embedding_and_no_failure() -> None:
    with lookup(FakeStore(v=bytes(16))) as it:
        assert it.find("v") == [Found(None, "absent")]


def test_a_request_waits_until_its_deadline_and_no_longer_and_the_late_answer_serves_the_next() -> None:
    with lookup(FakeStore(v=FOUND.tobytes()), deadline_ms=20) as it:
        it.store.gate.clear()
        began_s = time.monotonic()
        (late,) = it.find("v", within_s=60.0)
        assert late.outcome == "timeout" and "20 ms" in late.problem
        assert time.monotonic() - began_s < 30.0, "waited for the caller's deadline or the answer"
        (sooner,) = it.find("v", within_s=-1.0)
        assert sooner.outcome == "timeout", "the caller's own deadline counts too"
        it.store.gate.set()
        found = eventually(lambda: [f for f in it.find("v") if f.embedding is not None])
        assert found and len(it.store.commands) == 1, "asked once, however many waited"


def test_what_waits_goes_into_one_command_of_bounded_size() -> None:
    many = [f"v{i}" for i in range(MOST_PER_COMMAND + 10)]
    with lookup(FakeStore(**{name: FOUND.tobytes() for name in many})) as it:
        it.store.gate.clear()
        first = threading.Thread(target=it.find, args=("v0",))
        first.start()
        eventually(lambda: it.store.commands)
        others = [threading.Thread(target=it.find, args=(name,)) for name in ("v1", "v2", "v1")]
        for other in others:
            other.start()
        eventually(lambda: len(it.viewers._waiting) == 2)
        it.store.gate.set()
        for thread in (first, *others):
            thread.join(5.0)
        assert it.store.commands == [["k:v0"], ["k:v1", "k:v2"]] or it.store.commands == [["k:v0"], ["k:v2", "k:v1"]]
        assert {found.outcome for found in it.find(*many)} == {"found"}
        assert [len(keys) for keys in it.store.commands[2:]] == [MOST_PER_COMMAND, 7]


def test_beyond_what_may_wait_requests_go_on_without() -> None:
    with lookup(FakeStore(), max_waiting=2, deadline_ms=10) as it:
        it.store.gate.clear()
        it.find("a")
        eventually(lambda: it.store.commands)
        it.find("b")
        (refused, *_) = it.find("c", "d")
        assert refused.outcome == "too_many" and "at most 2" in refused.problem


def test_a_breaker_spares_a_store_that_fails_and_one_trial_brings_it_back() -> None:
    store = FakeStore(v=FOUND.tobytes())
    store.error = StoreError("gone")
    with lookup(store, breaker_failures=2, breaker_open_ms=1_000) as it:
        assert [it.find("v")[0].outcome for _ in range(4)] == [
            "unavailable",
            "unavailable",
            "breaker_open",
            "breaker_open",
        ]
        assert it.find("v")[0].problem == "breaker_open: unavailable: gone" and len(store.commands) == 2
        it.clock.advance(1_001)
        store.error = StoreTimeout("slow")
        assert [it.find("v")[0].outcome for _ in range(2)] == ["timeout", "breaker_open"]
        it.clock.advance(1_001)
        store.error = None
        assert [it.find("v")[0].outcome for _ in range(2)] == ["found", "found"] and len(store.commands) == 4


def test_an_unexpected_fault_is_a_failure_like_another_and_the_thread_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    store = FakeStore(v=FOUND.tobytes())
    store.error = RuntimeError("a bug")
    with lookup(store) as it:
        assert it.find("v")[0].problem == "unavailable: RuntimeError" and "a bug" in caplog.text
        store.error = None
        assert it.find("v")[0].outcome == "found"


def test_the_cache_forgets_what_is_too_old_and_the_least_recently_used() -> None:
    store = FakeStore(**{name: FOUND.tobytes() for name in "abc"})
    with lookup(store, cache_viewers=2, cache_ms=1) as it:
        it.find("a")
        eventually(lambda: not it.viewers._cached("a"))
        it.find("a")
        assert len(store.commands) == 2
    store = FakeStore(**{name: FOUND.tobytes() for name in "abc"})
    with lookup(store, cache_viewers=2) as it:
        for name in ("a", "b", "a", "c", "a", "b"):
            it.find(name)
        assert store.commands == [["k:a"], ["k:b"], ["k:c"], ["k:b"]]


def test_after_close_nobody_waits() -> None:
    made = Lookup(FakeStore())
    made.viewers.close()
    assert made.find("v")[0].outcome == "unavailable"


def test_the_url_is_checked_and_never_repeated() -> None:
    settings = parse_settings({"viewers": {"embeddings": {"url": "redis://:MARKED@127.0.0.1:1/0"}}})
    assert "MARKED" not in repr(settings) and "MARKED" not in str(settings.viewers.embeddings)
    with pytest.raises(
        ConfigError, match=r"viewers\.embeddings\.url: .*redis://, rediss:// or unix:// wanted"
    ) as found:
        parse_settings({"viewers": {"embeddings": {"url": "http://MARKED@x"}}})
    assert "MARKED" not in str(found.value)
