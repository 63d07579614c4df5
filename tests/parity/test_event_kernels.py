"""What a fenced batch comes to, what it adds to sessions, and when time changes a row next: fast against plain."""

from __future__ import annotations

import numpy as np
import pytest

from kernels import counters, settled
from kernels import sessions as kernel
from server.live.accumulators import FIRST_COUNTER, SECOND_COUNTER
from tests.events import T0, apply, event, new_table, small_settings, started

ROWS = 9
KINDS = np.array([10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25], np.uint8)


def sessions() -> kernel.Sessions:
    return kernel.Sessions(
        np.zeros((ROWS, counters.N_COUNTERS, 3), np.float32), np.zeros(ROWS, np.int64), np.zeros(ROWS, np.float32),
        np.zeros(ROWS, np.int64), np.zeros((ROWS, 128), np.uint8), np.zeros((ROWS, 128), np.uint8),
    )  # fmt: skip


@pytest.mark.parametrize("n", [0, 1, 7, 3_000])
def test_settling_and_counting_equal_their_references_bit_for_bit(n: int) -> None:
    rng = np.random.default_rng(n)
    codes = rng.choice(np.array([0, 0, 0, 5, 17], np.uint8), n)
    slots = np.where(codes == 0, rng.integers(0, ROWS, n), -1).astype(np.int32)
    kinds, epochs = rng.choice(KINDS, n), rng.integers(0, 3, n)
    row_epochs, mark = rng.integers(1, 3, ROWS), np.zeros(ROWS, np.bool_)
    found = settled.settle(codes, slots, kinds, epochs, row_epochs, mark)
    plain = settled.settle_reference(codes, slots, kinds, epochs, row_epochs, mark)
    assert not mark.any() and np.array_equal(np.sort(found.touched), plain.touched)
    for name in ("current", "by_kind", "current_by_kind", "by_code"):
        np.testing.assert_array_equal(getattr(found, name), getattr(plain, name), name)

    hashes = np.where(rng.random(n) < 0.5, rng.integers(1, 1 << 62, n), 0).astype(np.uint64)
    times = np.repeat(rng.integers(0, 3_600_000, n), 2)[:n]  # some come twice in a row
    events = (slots, kinds, rng.exponential(5.0, n), times, hashes, found.current)
    one, other = sessions(), sessions()
    for count, into in ((kernel.count_events, one), (kernel.count_events_reference, other)):
        count(into, *events, 0, first_counter=FIRST_COUNTER, second_counter=SECOND_COUNTER, gauge=13, chat=17)
    for name, ours, theirs in zip(one._fields, one, other):
        np.testing.assert_array_equal(ours, theirs, name)
    assert n < 100 or all(column.any() for column in one)


def test_columns_of_other_lengths_are_refused_by_name() -> None:
    four, mark = np.zeros(4, np.int64), np.zeros(ROWS, np.bool_)
    codes, slots, kinds = np.zeros(4, np.uint8), np.zeros(4, np.int32), np.zeros(4, np.uint8)
    with pytest.raises(ValueError, match="epochs: shape"):
        settled.settle(codes, slots, kinds, four[:3], np.zeros(ROWS, np.int64), mark)
    with pytest.raises(ValueError, match="mark: shape"):
        settled.settle(codes, slots, kinds, four, np.zeros(ROWS + 1, np.int64), mark)
    tables = {"first_counter": FIRST_COUNTER, "second_counter": SECOND_COUNTER, "gauge": 13, "chat": 17}
    columns = [slots, kinds, np.zeros(4), four, np.zeros(4, np.uint64), np.ones(4, np.bool_)]
    with pytest.raises(ValueError, match="slots: 0 to 8 allowed"):
        kernel.count_events(sessions(), slots + np.int32(9), *columns[1:], 0, **tables)
    with pytest.raises(ValueError, match="values: shape"):
        kernel.count_events(sessions(), *columns[:2], np.zeros(3), *columns[3:], 0, **tables)


def test_expiring_skips_nothing_whatever_came_before() -> None:
    """Against a table whose rows are looked at every time."""
    rng = np.random.default_rng(3)
    settings = small_settings(lease_ms=10_000, grace_ms=20_000, tombstone_ms=30_000, max_lateness_ms=25_000)
    quick, thorough = new_table(settings), new_table(settings)
    sequence, now_ms = 0, T0
    for _ in range(400):
        now_ms += int(rng.integers(0, 4_000))
        events = []
        for _ in range(int(rng.integers(0, 4))):
            sequence += 1
            name, epoch = f"s{rng.integers(6)}", int(rng.integers(1, 4)) + sequence // 60
            at_ms = now_ms - int(rng.integers(0, 9_000))
            payload = [
                {"started": {"creator_id": "c"}}, {"heartbeat": {"media_sequence": sequence}}, {"ended": {}},
                {"moderated": {"action": int(rng.integers(1, 3))}}, {"liked": {}},
            ][int(rng.choice(5, p=[0.3, 0.4, 0.1, 0.1, 0.1]))]  # fmt: skip
            events.append(event(name, sequence, at_ms, epoch, **payload))
        thorough._next_change_ms = 0
        if events:
            assert apply(quick, *events, at_ms=now_ms).ends == apply(thorough, *events, at_ms=now_ms).ends
        thorough._next_change_ms = 0
        one, other = quick.expire(now_ms), thorough.expire(now_ms)
        assert (one.suspects, one.ends) == (other.suspects, other.ends)
        for name, column in vars(quick.columns).items():
            np.testing.assert_array_equal(column, getattr(thorough.columns, name), name)


def test_nothing_is_due_before_the_first_lease_ends() -> None:
    table = new_table(small_settings())
    apply(table, started("s", 1))
    table.expire(T0)
    assert settled.next_change_ms(table.columns.liveness(), table.rows, grace_ms=1, tombstone_ms=1) == T0 + 10_000
    assert settled.next_change_ms(table.columns.liveness(), 0, grace_ms=1, tombstone_ms=1) == settled.NEVER_MS
    assert table.expire(T0 + 10_000).suspects == 1
