"""The table of viewers against a plain model of it: dictionaries in the order of use."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import fence
from kernels.idmap import hash_ids, pack_ids
from kernels.lru import allocate_lru, find, restore_lru, take
from kernels.visits import IS_VISIT, Visits, apply_visits, fold_epoch, read_visits

S = 3
KINDS = np.flatnonzero(IS_VISIT).tolist()
EVENT = st.tuples(
    st.integers(0, 6),
    st.integers(1, 5),
    st.integers(1, 2),
    st.sampled_from([*KINDS, fence.VIEWER_COUNT]),
    st.integers(0, 60),
    st.integers(0, 40),
    st.sampled_from([True, True, True, False]),
)
IDS, ID_LENGTHS = pack_ids([b"stream-%d" % number * number for number in range(6)])
HASHES = hash_ids(IDS, ID_LENGTHS).tolist()


@dataclass
class Visit:
    stream: int
    epoch: int
    seen_s: int = 0
    watch_ms: int = 0
    outcome: int = 0


@dataclass
class Model:
    """What the columns should say."""

    capacity: int
    sessions_kept: int
    viewers: OrderedDict[int, list[Visit | None]] = field(default_factory=OrderedDict)
    sessions: OrderedDict[tuple[int, int], None] = field(default_factory=OrderedDict)
    forgotten: int = 0

    def apply(self, viewer: int, stream: int, epoch: int, kind: int, second: int, value: int, counted: bool) -> None:
        if viewer == 0 or kind not in KINDS or not counted:
            return
        stream = HASHES[stream]
        if kind == fence.LEFT and viewer not in self.viewers:
            return
        if viewer not in self.viewers:
            if len(self.viewers) == self.capacity:
                self.viewers.popitem(last=False)
                self.forgotten += 1
            self.viewers[viewer] = []
        self.viewers.move_to_end(viewer)
        visits = self.viewers[viewer]
        visit = next((v for v in visits if (v.stream, v.epoch) == (stream, epoch)), None)
        if visit is None:
            if kind == fence.LEFT:
                return
            visit = Visit(stream, epoch)
            if len(visits) < S:
                visits.append(visit)
            else:
                oldest = min(range(S), key=lambda i: visits[i].seen_s)
                if visits[oldest].seen_s > second:
                    return
                visits[oldest] = visit
        self.sessions[(stream, epoch)] = None
        self.sessions.move_to_end((stream, epoch))
        if len(self.sessions) > self.sessions_kept:
            self.sessions.popitem(last=False)
        self._tell(visit, kind, second, value)

    def _tell(self, visit: Visit, kind: int, second: int, value: int) -> None:
        if kind == fence.REPORTED:
            visit.outcome |= 16
        elif kind != fence.LEFT:
            visit.outcome |= 1
        if kind in (fence.CHATTED, fence.LIKED, fence.FOLLOWED, fence.SHARED, fence.BID, fence.PURCHASED):
            visit.outcome |= 4
        if kind == fence.PURCHASED:
            visit.outcome |= 8
        if kind == fence.WATCHED:
            visit.watch_ms += value * 1000
        if visit.watch_ms >= 30_000:
            visit.outcome |= 2
        if kind == fence.LEFT and visit.outcome == 1 and second - visit.seen_s < 10:
            visit.outcome |= 32
        if visit.watch_ms >= 10_000:
            visit.outcome &= ~32
        visit.seen_s = max(visit.seen_s, second)


def empty(capacity: int) -> Visits:
    columns = (np.uint64, np.uint32, np.uint32, np.uint32, np.uint8)
    return Visits(*(np.zeros((capacity, S), dtype) for dtype in columns))  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None)
@given(st.lists(EVENT, max_size=60), st.integers(1, 4), st.integers(1, 4), st.integers(1, 7))
def test_visits_are_those_of_the_plain_model(
    events: list[tuple[int, ...]], capacity: int, sessions_kept: int, batch: int
) -> None:
    viewers, sessions, visits = allocate_lru(capacity), allocate_lru(sessions_kept), empty(capacity)
    model = Model(capacity, sessions_kept)
    forgotten = 0
    for start in range(0, len(events), batch):
        part = np.array(events[start : start + batch], np.int64)
        for row in part.tolist():
            model.apply(*row)
        done = apply_visits(
            viewers, visits, sessions,
            counted=part[:, 6].astype(np.bool_), viewer_hash=part[:, 0].astype(np.uint64),
            ids=IDS[part[:, 1]], id_lengths=ID_LENGTHS[part[:, 1]], kind=part[:, 3].astype(np.uint8),
            time_ms=part[:, 4] * 1000, value=part[:, 5].astype(np.float64),
            slots=np.arange(len(part), dtype=np.int32), row_epochs=part[:, 2].copy(),
            watched_ms=30_000, bounce_ms=10_000,
        )  # fmt: skip
        forgotten += done.forgotten
    assert forgotten == model.forgotten
    known = np.arange(1, 7, dtype=np.uint64)
    rows, places, at = read_visits(viewers, visits, sessions, known)
    for b, viewer in enumerate(known.tolist()):
        wanted = model.viewers.get(viewer)
        assert (rows[b] >= 0) == (wanted is not None)
        found = [p for p in places[b].tolist() if p >= 0]
        assert len(found) == len(wanted or [])
        told = [
            Visit(*(int(column[rows[b], p]) for column in visits))  # its fields are in the order of the columns
            for p in found
        ]
        assert told == sorted(wanted or [], key=lambda v: -v.seen_s), "newest first, ties in the order they came"
        for s, visit in enumerate(told):
            assert (at[b, s] >= 0) == ((visit.stream, visit.epoch) in model.sessions)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 12), max_size=80), st.integers(1, 6), st.integers(0, 80))
def test_keys_give_way_in_the_order_of_use_also_after_a_restore(keys: list[int], capacity: int, cut: int) -> None:
    table, model = allocate_lru(capacity), OrderedDict[int, int]()
    for i, key in enumerate(keys):
        if i == cut:
            n = int(table.ends[2])
            again = allocate_lru(capacity)
            restore_lru(again, table.key[:n], table.newer[:n], table.older[:n])
            table = again
        row, is_new = take(table, np.uint64(key))
        assert is_new == (key not in model)
        if is_new:
            gone = model.popitem(last=False)[1] if len(model) == capacity else len(model)
            assert row == gone, "a row in ascending order, then the one used longest ago"
        model[key] = row
        model.move_to_end(key)
    for key in range(1, 13):
        assert find(table, np.uint64(key)) == model.get(key, -1)


def test_many_keys_in_a_full_table_are_found_and_no_others() -> None:
    rng = np.random.default_rng(4)
    keys = rng.integers(1, 1 << 62, 5_000).astype(np.uint64)
    table = allocate_lru(1_000)
    for key in keys:
        take(table, key)
    assert all(find(table, key) >= 0 for key in keys[-1_000:]) and all(find(table, key) < 0 for key in keys[:-1_000])


def test_rows_that_are_no_list_are_refused() -> None:
    table = allocate_lru(4)
    for key in (5, 6, 7):
        take(table, np.uint64(key))
    key, newer, older = (column[:3].copy() for column in (table.key, table.newer, table.older))
    for wrong in (
        (np.array([5, 5, 7], np.uint64), newer, older), (np.array([5, 0, 7], np.uint64), newer, older),
        (key, np.array([1, 1, -1], np.int32), older), (key, newer, np.array([2, 0, 1], np.int32)),
        (key, newer[:2], older), (key, np.array([1, 99, -1], np.int32), older),
        (key, newer, np.array([-1, 99, 1], np.int32)),
    ):  # fmt: skip
        again = allocate_lru(4)
        with pytest.raises(ValueError, match=r"key:|newer, older"):
            restore_lru(again, *wrong)
        assert again.ends.tolist() == [-1, -1, 0]
    restore_lru(again, key, newer, older)


def test_a_column_of_another_type_is_refused_by_name() -> None:
    viewers, sessions, visits = allocate_lru(2), allocate_lru(2), empty(2)
    good = {
        "counted": np.ones(1, np.bool_), "viewer_hash": np.ones(1, np.uint64), "ids": IDS[:1],
        "id_lengths": ID_LENGTHS[:1], "row_epochs": np.ones(1, np.int64),
        "kind": np.full(1, fence.JOINED, np.uint8), "time_ms": np.ones(1, np.int64), "value": np.ones(1),
        "slots": np.zeros(1, np.int32),
    }  # fmt: skip
    for name, column in good.items():
        with pytest.raises(ValueError, match=name):
            apply_visits(
                viewers, visits, sessions, **{**good, name: column.astype(np.int16)}, watched_ms=1, bounce_ms=1
            )


def test_folded_epochs_keep_small_ones_apart() -> None:
    epochs = np.array([1, 2, 1 << 32, (1 << 32) + 2, 1_700_000_000_000, 1_700_000_000_001], np.int64)
    assert len(set(fold_epoch(epochs).tolist())) == 5, "1 and 2^32 fold to the same: one chance in 2^32"


def test_more_events_than_are_touched_at_once_are_applied_as_one_by_one() -> None:
    rng = np.random.default_rng(8)
    n = 1_000
    stream = rng.integers(1, 6, n)
    columns = {
        "counted": rng.random(n) < 0.9, "viewer_hash": rng.integers(0, 300, n).astype(np.uint64),
        "ids": IDS[stream], "id_lengths": ID_LENGTHS[stream],
        "kind": rng.choice([*KINDS, fence.HEARTBEAT], n).astype(np.uint8),
        "time_ms": rng.integers(0, 90, n) * 1_000, "value": rng.random(n),
        "slots": rng.integers(0, 9, n).astype(np.int32),
    }  # fmt: skip
    fixed = {"row_epochs": np.arange(9), "watched_ms": 30_000, "bounce_ms": 10_000}
    whole, single = ((allocate_lru(200), empty(200), allocate_lru(4)) for _ in range(2))
    at_once = apply_visits(*whole, **columns, **fixed)
    one_by_one = [apply_visits(*single, **{k: v[i : i + 1] for k, v in columns.items()}, **fixed) for i in range(n)]
    assert at_once.forgotten == sum(done.forgotten for done in one_by_one) > 0
    assert at_once.rows.tolist() == [row for done in one_by_one for row in done.rows.tolist()]
    for one, other in zip(whole, single, strict=True):
        for column, as_well in zip(one, other, strict=True):
            np.testing.assert_array_equal(column, as_well)
