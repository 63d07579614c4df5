"""Group commit keeps the order and the time of the log; the feed of ends is bounded and honest."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

import pytest

from server.clock import ManualClock
from server.errors import Draining, LogError, Overloaded, ReaderTooSlow, ResumeGone
from server.live.ends import EndFeed
from server.live.events import decode_batch
from server.live.table import End
from server.log import commit as commit_module
from server.log.base import Record
from server.log.commit import Committed, GroupCommit, Submission
from tests.events import T0, batch, small_settings, started


class HeldLog:
    """An event log in memory whose writes wait to be let through, and may fail."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.gate, self.writing = threading.Semaphore(0), threading.Event()
        self.broken = False

    last = None
    first_offset = 1

    def append(self, records: Sequence[Record]) -> None:
        self.writing.set()
        self.gate.acquire()
        if self.broken:
            raise LogError("disk full")
        self.records += records

    def read(self, after_offset: int) -> Iterator[Record]:
        return iter(self.records[after_offset:])

    def continue_after(self, offset: int, stamp_ms: int) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def parts() -> Iterator[tuple[HeldLog, ManualClock, GroupCommit, list[list[Committed]]]]:
    log, clock, handed = HeldLog(), ManualClock(T0), []
    commit = GroupCommit(log, clock, 100, handed.append)
    commit.start(0, 0)
    yield log, clock, commit, handed
    for _ in range(10):
        log.gate.release()
    commit.stop()


def submission(number: int) -> Submission:
    payload = batch(started(f"s{number}", number + 1))
    return Submission(payload, decode_batch(payload, small_settings()), T0, Future())


def test_what_waits_is_written_as_one_group_in_order_with_one_stamp(
    parts: tuple[HeldLog, ManualClock, GroupCommit, list[list[Committed]]],
) -> None:
    log, clock, commit, handed = parts
    submissions = [submission(i) for i in range(6)]
    commit.submit(submissions[0])
    assert log.writing.wait(10)
    clock.advance(50)
    for one in submissions[1:]:
        commit.submit(one)
    log.gate.release()
    log.gate.release()
    commit.stop()
    assert [len(group) for group in handed] == [1, 5]
    assert [c.submission for group in handed for c in group] == submissions
    assert [(r.offset, r.applied_ms) for r in log.records] == [(1, T0)] + [(n, T0 + 50) for n in range(2, 7)]


def test_table_time_never_overtakes_a_batch_that_is_stamped_but_not_applied(
    parts: tuple[HeldLog, ManualClock, GroupCommit, list[list[Committed]]],
) -> None:
    log, clock, commit, handed = parts
    assert commit.settled_ms() == T0
    commit.submit(submission(0))
    assert log.writing.wait(10)
    clock.advance(5_000)
    assert commit.settled_ms() == T0, "its stamp: a tick beyond it could expire what it renews"
    log.gate.release()
    commit.stop()
    assert len(handed) == 1 and commit.settled_ms() == T0, "durable, but the engine has not applied it"
    commit.applied(1)
    assert commit.settled_ms() == T0 + 5_000


def test_a_write_that_fails_refuses_its_batches_and_leaves_no_gap(
    parts: tuple[HeldLog, ManualClock, GroupCommit, list[list[Committed]]],
) -> None:
    log, _, commit, handed = parts
    failed, good = submission(0), submission(1)
    log.broken = True
    commit.submit(failed)
    log.gate.release()
    with pytest.raises(LogError, match="disk full"):
        failed.done.result(10)
    log.broken = False
    commit.submit(good)
    log.gate.release()
    commit.stop()
    assert [r.offset for r in log.records] == [1] and handed[0][0].submission is good
    with pytest.raises(Draining):
        commit.submit(submission(2))


def test_a_fault_of_our_own_in_the_writer_is_told_to_everybody_and_leaves_nobody_waiting() -> None:
    log, faults = HeldLog(), threading.Event()

    def broken(group: list[Committed]) -> None:
        raise RuntimeError("a bug")

    commit = GroupCommit(log, ManualClock(T0), 100, broken, faults.set)
    commit.start(0, 0)
    first, second = submission(0), submission(1)
    commit.submit(first)
    assert log.writing.wait(10)
    commit.submit(second)
    log.gate.release()
    assert faults.wait(10)
    for one in (first, second):
        with pytest.raises(Draining):
            one.done.result(10)
    with pytest.raises(Draining):
        commit.submit(submission(2))


def test_waiting_batches_are_bounded(
    parts: tuple[HeldLog, ManualClock, GroupCommit, list[list[Committed]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    log, _, commit, _ = parts
    monkeypatch.setattr(commit_module, "MAX_WAITING", 2)
    commit.submit(submission(0))
    assert log.writing.wait(10)
    commit.submit(submission(1))
    commit.submit(submission(2))
    with pytest.raises(Overloaded, match="2 batches"):
        commit.submit(submission(3))


def end(number: int) -> End:
    return End(f"s{number}", 1, T0, "x")


def test_a_reader_gets_everything_from_its_position_on_in_order() -> None:
    feed = EndFeed(10)
    feed.publish(end(i) for i in range(3))
    assert feed.start_after(0) == 3, "0 means from now on"
    assert [(n, e.stream_id) for n, e in feed.read(1, lambda: True)] == [(2, "s1"), (3, "s2")]
    assert [n for n, _ in feed.read(0, lambda: True, most=2)] == [1, 2]


def test_a_reader_that_falls_behind_the_ring_is_told_to_resync() -> None:
    feed = EndFeed(4)
    feed.publish(end(i) for i in range(10))
    with pytest.raises(ReaderTooSlow, match="2 ends were missed"):
        feed.read(4, lambda: True)
    assert [n for n, _ in feed.read(6, lambda: True)] == [7, 8, 9, 10]
    for gone in (5, 11):
        with pytest.raises(ResumeGone, match="6 to 10"):
            feed.start_after(gone)


def test_a_waiting_reader_is_woken_by_an_end_by_its_callers_death_and_by_the_drain() -> None:
    feed, alive = EndFeed(4), [True]
    heard: list[object] = []

    def listen(position: int) -> None:
        try:
            heard.append([n for n, _ in feed.read(position, lambda: alive[0])])
        except Draining as error:
            heard.append(type(error))

    for wake in (lambda: feed.publish([end(0)]), lambda: (alive.clear(), alive.append(False), feed.wake()), feed.close):
        thread = threading.Thread(target=listen, args=(feed.newest,))
        thread.start()
        wake()
        thread.join(10)
        assert not thread.is_alive()
        alive[:] = [True]
    assert heard == [[1], [], Draining]
