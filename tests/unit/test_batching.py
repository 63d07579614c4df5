"""The queue in front of the engine: nothing lost, nothing twice, fair, in order, in bounds, in time."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.batching.base import Priority, Turn, Waiting, hand_out
from server.batching.queue import BATCH_PATIENCE_TURNS, BUSY_FOR_S, ROUND_ROWS, RankQueue

MAX_ROWS = 8
WINDOW_S = 0.0002


class Bench:
    """A queue on a clock of the test, and what came out of it."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self.now_s = 100.0
        self.queue: RankQueue[int] = RankQueue(MAX_ROWS, window_s, lambda: self.now_s)
        self.put_in: list[Waiting[int]] = []

    def put(
        self,
        client: str = "a",
        rows: int = 1,
        left_s: float = 1_000.0,
        priority: Priority = Priority.INTERACTIVE,
        min_offset: int = 0,
    ) -> Waiting[int]:
        item: Waiting[int] = Waiting(
            list(range(rows)), client, priority, self.now_s, self.now_s + left_s, min_offset, Future()
        )
        self.queue.put([item], applied_offset=0)
        self.put_in.append(item)
        return item

    def take(
        self, offset: int = 0, budget_s: float = 0.002, closing: bool = False, most_rows: int | None = None
    ) -> Turn[int]:
        return self.queue.take(offset, budget_s, closing, most_rows)


def rows(items: list[Waiting[int]]) -> int:
    return sum(map(len, items))


CALLS = st.tuples(
    st.sampled_from("abcd"),
    st.integers(1, MAX_ROWS),
    st.sampled_from([0.0, 0.001, 0.5, 1_000.0]),  # time left
    st.sampled_from(list(Priority)),
    st.sampled_from([0, 0, 0, 3]),  # min_offset
)
STEPS = st.lists(
    st.one_of(
        CALLS,
        st.just("take"),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("pass"), st.sampled_from([0.001, 0.6])),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_nothing_is_lost_nothing_comes_out_twice_and_bounds_hold(steps: list[Any]) -> None:
    bench, out, offset, abandoned_rows = Bench(), [], 0, 0

    def check(turn: Turn[int]) -> None:
        nonlocal abandoned_rows
        assert rows(turn.rank) <= MAX_ROWS and rows(turn.late) <= MAX_ROWS
        assert all(item.done.running() for item in turn.taken())
        assert all(item.min_offset <= offset for item in turn.rank + turn.late)
        hurried = [item for item in turn.rank if item.deadline_s - bench.now_s < 0.002]
        assert all(item.deadline_s > bench.now_s for item in hurried)
        assert not hurried or turn.late, "ranked only when no more could be late"
        assert all(0 < item.deadline_s - bench.now_s < 0.002 for item in turn.late)
        out.extend(turn.taken())
        abandoned_rows += turn.abandoned_rows

    for step in steps:
        if step == "take":
            check(bench.take(offset))
        elif step[0] == "cancel":
            if step[1] < len(bench.put_in):
                bench.put_in[step[1]].done.cancel()
        elif step[0] == "pass":
            bench.now_s += step[1]
            offset += 1
        else:
            bench.put(*step)
        waiting = bench.queue.waiting()
        assert rows(waiting) == bench.queue.rows
        assert len({id(item) for item in waiting + out}) == len(waiting + out)
    for _ in range(len(bench.put_in) + 1):
        check(bench.take(offset, closing=True))
    assert bench.queue.rows == 0 and not bench.queue.waiting()
    assert bench.queue.due_in_s() is None
    assert len({id(item) for item in out}) == len(out), "twice"
    dropped = [item for item in bench.put_in if item.done.cancelled()]
    assert {id(i) for i in out} | {id(i) for i in dropped} == {id(i) for i in bench.put_in}, "lost"
    assert not {id(i) for i in out} & {id(i) for i in dropped}
    assert rows(dropped) == abandoned_rows


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, MAX_ROWS)), max_size=40), st.integers(1, MAX_ROWS + 1))
def test_a_turn_has_no_more_rows_than_it_should_unless_one_call_alone_has(
    calls: list[tuple[str, int]], most_rows: int
) -> None:
    bench, turns = Bench(), []
    for client, n in calls:
        bench.put(client, n)
    while bench.queue.rows:
        turns.append(bench.take(most_rows=most_rows).rank)
        assert turns[-1], "it gets on"
        assert rows(turns[-1]) <= min(most_rows, MAX_ROWS) or len(turns[-1]) == 1
    assert sorted(id(item) for turn in turns for item in turn) == sorted(map(id, bench.put_in))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, MAX_ROWS), st.floats(1.0, 100.0)), max_size=40))
def test_a_clients_calls_are_ranked_in_the_order_they_came(calls: list[tuple[str, int, float]]) -> None:
    bench = Bench()
    for client, n, left_s in calls:
        bench.put(client, n, left_s)
    ranked: list[Waiting[int]] = []
    while bench.queue.rows:
        ranked += bench.take().rank
    for client in "abc":
        assert [i for i in ranked if i.client == client] == [i for i in bench.put_in if i.client == client]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.lists(st.integers(1, MAX_ROWS), min_size=1, max_size=5))
def test_a_call_waits_for_a_bounded_number_of_rows_whatever_the_others_send(floods: int, sizes: list[int]) -> None:
    bench = Bench()

    def flood() -> None:  # each flooder always has plenty waiting, with nearer deadlines
        for k in range(floods):
            while sum(i.client == f"flood{k}" for i in bench.queue.waiting()) < 5:
                bench.put(f"flood{k}", sizes[k % len(sizes)], left_s=10.0)

    flood()
    for _ in range(20):
        bench.take()
        flood()
    mine, before = bench.put("victim", 1, left_s=1_000.0), 0
    for _ in range(50):
        if mine.done.running():
            break
        before += rows(bench.take().rank)
        flood()
    assert mine.done.running() and before <= (floods + 1) * (ROUND_ROWS + 2 * MAX_ROWS), before


def test_a_client_that_floods_gets_no_more_than_its_share() -> None:
    bench = Bench()
    for _ in range(400):
        bench.put("flood", 1, left_s=1.0)
    for _ in range(100):
        bench.put("quiet", 1, left_s=1_000.0)
    first = [item.client for _ in range(20) for item in bench.take().rank]
    assert Counter(first) == {"flood": 80, "quiet": 80}


def test_rows_count_not_calls() -> None:
    bench = Bench()
    for _ in range(50):
        bench.put("large", MAX_ROWS)
        for _ in range(MAX_ROWS):
            bench.put("small", 1)
    ranked = [item for _ in range(20) for item in bench.take().rank]
    of = Counter[str]()
    for item in ranked:
        of[item.client] += len(item)
    assert abs(of["large"] - of["small"]) <= ROUND_ROWS + MAX_ROWS


def test_who_was_idle_has_saved_nothing_up_and_owes_nothing() -> None:
    bench = Bench()
    for _ in range(200):
        bench.put("busy")
    for _ in range(10):
        bench.take()
    for _ in range(50):
        bench.put("new")
    first = Counter(item.client for _ in range(6) for item in bench.take().rank)
    assert abs(first["busy"] - first["new"]) <= 2 * ROUND_ROWS


def test_within_a_round_the_earliest_deadline_goes_first() -> None:
    bench = Bench()
    for i in range(12):
        bench.put(f"c{i}", 1, left_s=100.0 - i)
    assert [item.client for item in bench.take().rank] == [f"c{i}" for i in range(11, 3, -1)]


def test_clients_that_come_and_go_are_forgotten() -> None:
    bench = Bench()
    bench.put("stays", MAX_ROWS)
    for i in range(2_000):
        bench.put("stays", MAX_ROWS)
        bench.put(f"guest{i}")
        bench.take()
        bench.take()
    fair = bench.queue._fair[Priority.INTERACTIVE]
    assert len(fair._clients) < 200 and len(bench.queue._deadlines) < 200


def test_interactive_calls_go_before_batch_ones_which_still_get_their_turn() -> None:
    bench = Bench()
    batch = bench.put("jobs", MAX_ROWS, priority=Priority.BATCH)
    turns = 0
    while not batch.done.running() and turns < 50:
        for _ in range(MAX_ROWS):
            bench.put("feed")
        taken = bench.take().rank
        turns += 1
        assert batch.done.running() or {item.client for item in taken} == {"feed"}
    assert turns == BATCH_PATIENCE_TURNS + 1


def test_room_that_interactive_calls_leave_is_used_for_batch_ones() -> None:
    bench = Bench()
    bench.put("jobs", 3, priority=Priority.BATCH)
    bench.put("feed", 5)
    assert [item.client for item in bench.take().rank] == ["feed", "jobs"]


def test_a_lone_request_is_never_delayed() -> None:
    bench = Bench()
    for _ in range(3):
        bench.put()
        assert bench.queue.due_in_s() == 0.0
        assert len(bench.take().rank) == 1
        bench.now_s += 0.001
    bench.put()
    bench.put()
    bench.take()
    bench.now_s += BUSY_FOR_S  # the load is over
    bench.put()
    assert bench.queue.due_in_s() == 0.0


def test_under_load_a_batch_may_fill_for_the_window_and_no_longer() -> None:
    bench = Bench()
    bench.put()
    bench.put()
    bench.take()
    bench.put()
    assert bench.queue.due_in_s() == pytest.approx(WINDOW_S)
    bench.now_s += WINDOW_S / 2
    bench.put()
    assert bench.queue.due_in_s() == pytest.approx(WINDOW_S / 2), "from the first that came, not the last"
    bench.now_s += WINDOW_S / 2
    assert bench.queue.due_in_s() == 0.0
    for _ in range(MAX_ROWS):
        bench.put()
    assert bench.queue.due_in_s() == 0.0, "full"


def test_what_a_full_batch_left_behind_does_not_wait_again() -> None:
    bench = Bench()
    for _ in range(MAX_ROWS + 1):
        bench.put()
    bench.take()
    assert bench.queue.due_in_s() == 0.0


def test_a_call_whose_time_is_too_short_leaves_at_once_from_any_place() -> None:
    bench = Bench()
    for _ in range(5 * MAX_ROWS):
        bench.put("a")
    hurried = bench.put("a", 1, left_s=0.001)
    turn = bench.take(budget_s=0.002)
    assert turn.late == [hurried] and rows(turn.rank) == MAX_ROWS


def test_a_call_that_was_ranked_is_not_late_afterwards() -> None:
    bench = Bench()
    ranked = bench.put(left_s=0.5)
    assert bench.take().rank == [ranked]
    other = bench.put()
    bench.now_s += 0.6
    turn = bench.take()
    assert turn.rank == [other] and not turn.late and not turn.abandoned_rows


def test_what_nobody_waits_for_costs_no_room_and_expired_calls_are_cancelled() -> None:
    bench = Bench()
    cancelled = [bench.put("a", MAX_ROWS) for _ in range(3)]
    expired = bench.put("a", 2, left_s=0.5)
    kept = bench.put("b", MAX_ROWS)
    for item in cancelled:
        item.done.cancel()
    bench.now_s += 0.6
    turn = bench.take()
    assert turn.rank == [kept] and not turn.late and expired.done.cancelled()
    assert turn.abandoned_rows + bench.take().abandoned_rows == 3 * MAX_ROWS + 2
    assert bench.queue.rows == 0


def test_a_call_with_an_offset_still_to_come_is_parked_and_holds_nobody_up() -> None:
    bench = Bench()
    parked = bench.put("a", 1, left_s=1.0, min_offset=5)
    other = bench.put("a", 1)
    assert bench.take(offset=4).rank == [other]
    assert bench.queue.due_in_s() is None and bench.queue.rows == 1
    bench.now_s += 0.5
    assert bench.take(offset=5).rank == [parked]
    assert parked.arrived_s == bench.now_s, "waiting for a write is no sign of load"


def test_an_offset_that_does_not_come_is_told_at_the_deadline_or_when_closing() -> None:
    bench = Bench()
    at_deadline, at_close = bench.put(left_s=1.0, min_offset=5), bench.put(min_offset=5)
    assert not bench.take().taken()
    bench.now_s += 1.0
    assert bench.take().unreached == [at_deadline]
    assert bench.take(closing=True).unreached == [at_close]


@pytest.mark.parametrize("n", [0, MAX_ROWS + 1])
def test_a_call_that_fits_no_batch_is_refused_and_nothing_is_queued(n: int) -> None:
    bench = Bench()
    with pytest.raises(ValueError, match=f"1 to {MAX_ROWS} rows"):
        bench.put(rows=n)
    assert bench.queue.rows == 0


def test_replies_are_handed_out_in_order() -> None:
    bench = Bench()
    items = [bench.put(rows=2), bench.put(rows=1)]
    for item in items:
        item.done.set_running_or_notify_cancel()
    hand_out(items, [b"0", b"1", b"2"])
    assert [item.done.result() for item in items] == [[b"0", b"1"], [b"2"]]
