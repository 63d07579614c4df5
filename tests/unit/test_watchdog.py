"""The thread that stops what takes too long."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from server.scoring.watchdog import Watchdog
from tests.triton_server import eventually


def dogs() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "watchdog"]


def test_a_run_is_stopped_when_its_time_is_over_and_not_before() -> None:
    dog, stopped = Watchdog(), threading.Event()
    due_s = time.monotonic() + 0.05
    with dog.watching(due_s, stopped.set) as watch:
        assert not watch.expired
        assert stopped.wait(10.0) and watch.expired and time.monotonic() >= due_s


def test_a_run_that_is_over_is_never_stopped() -> None:
    dog, stopped, later = Watchdog(), threading.Event(), threading.Event()
    with dog.watching(time.monotonic() + 0.02, stopped.set):
        pass
    with dog.watching(time.monotonic() + 0.05, later.set):
        assert later.wait(10.0)
    assert not stopped.is_set()


def test_the_run_that_is_due_first_is_stopped_first_whenever_it_began() -> None:
    dog, order, over = Watchdog(), list[int](), threading.Event()

    def run(number: int, seconds: float) -> None:
        stopped = threading.Event()
        with dog.watching(time.monotonic() + seconds, lambda: (order.append(number), stopped.set())):  # type: ignore[arg-type, func-returns-value]
            assert stopped.wait(20.0) or over.is_set()

    with ThreadPoolExecutor(3) as pool:
        late = pool.submit(run, 1, 0.6)
        eventually(lambda: math.isfinite(dog._looks_s), what="it watches the first")
        early = [pool.submit(run, 2, 0.3), pool.submit(run, 3, 0.05)]
        for done in (late, *early):
            done.result(20.0)
    assert order == [3, 2, 1]


def test_many_runs_need_one_thread_and_without_runs_it_sleeps() -> None:
    before, dog = set(dogs()), Watchdog()
    for _ in range(200):
        with dog.watching(time.monotonic() + 0.02, lambda: None):
            pass
    assert len(set(dogs()) - before) == 1
    eventually(lambda: dog._looks_s == math.inf, what="it does not look any more")
    stopped = threading.Event()
    with dog.watching(time.monotonic() + 0.02, stopped.set):
        assert stopped.wait(10.0), "woken again"
