"""What is remembered of viewers: which events say what, what the ranker gets of it, and what is not shown again."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kernels import visits
from kernels.idmap import hash_ids, pack_ids
from server.config import ViewerSettings
from server.live.table import LiveTable
from server.scoring.ranker_schema import CODE_BUCKETS, SEQUENCE, Outcome, bucket_of
from server.viewers.table import ViewerTable, codes_of
from tests.events import T0, apply, event, new_table, small_settings, started

LONG_AGO = T0 - 90_000


def hashes(*names: str) -> NDArray[np.uint64]:
    return hash_ids(*pack_ids([name.encode() for name in names]))


class Platform:
    """A table with its viewers, and one producer."""

    def __init__(self, **settings: Any) -> None:
        self.table = new_table(small_settings(), ViewerSettings(**{"capacity": 100, "sessions": 100, **settings}))
        assert isinstance(self.table.follower, ViewerTable)
        self.viewers = self.table.follower
        self.sequence = 0

    def start(self, *names: str, epoch: int = 1, **fields: Any) -> None:
        for name in names:
            self.sequence += 1
            apply(self.table, started(name, self.sequence, epoch=epoch, **fields), at_ms=T0)

    def do(
        self, viewer: str, stream: str, at_s: int = 0, epoch: int = 0, at_ms: int | None = None, **payload: Any
    ) -> None:
        self.sequence += 1
        when = T0 + at_s * 1000
        apply(
            self.table, event(stream, self.sequence, when, epoch, viewer=viewer, **payload),
            at_ms=max(when, T0) if at_ms is None else at_ms,
        )  # fmt: skip

    def outcome(self, viewer: str, newest: int = 0) -> Outcome:
        rows, places, _ = visits.read_visits(
            self.viewers.viewers, self.viewers.visits, self.viewers.sessions, hashes(viewer)
        )
        return Outcome(int(self.viewers.visits.outcome[rows[0], places[0, newest]]))

    def seen(self, *viewers: str, at_s: int = 0) -> list[list[str]]:
        slots, offsets = self.viewers.seen(self.table, hashes(*viewers), T0 + at_s * 1000)
        return [sorted(self.table.stream_id(int(s)) for s in slots[i:j]) for i, j in pairwise(offsets)]


def test_the_kernel_and_the_contract_mean_the_same_bits() -> None:
    assert {bit.name: int(bit) for bit in Outcome} == {bit.name: getattr(visits, str(bit.name)) for bit in Outcome}


@pytest.mark.parametrize(
    ("payload", "outcome"),
    [
        ({"joined": {}}, Outcome.CLICKED),
        ({"watched": {"seconds": 29.9}}, Outcome.CLICKED),
        ({"watched": {"seconds": 30.0}}, Outcome.CLICKED | Outcome.WATCHED),
        ({"liked": {}}, Outcome.CLICKED | Outcome.ENGAGED),
        ({"bid": {"amount_minor": 5, "currency": "USD"}}, Outcome.CLICKED | Outcome.ENGAGED),
        ({"purchased": {"amount_minor": 5, "currency": "USD"}}, Outcome.CLICKED | Outcome.ENGAGED | Outcome.PURCHASED),
        ({"reported": {}}, Outcome.REPORTED),
    ],
)
def test_each_kind_of_event_leaves_its_outcome(payload: dict[str, Any], outcome: Outcome) -> None:
    platform = Platform()
    platform.start("s")
    platform.do("v", "s", **payload)
    assert platform.outcome("v") == outcome


def test_whoever_leaves_at_once_did_not_like_it_unless_the_time_watched_says_otherwise() -> None:
    platform = Platform()
    platform.start("s", "t")
    platform.do("v", "s", joined={})
    platform.do("v", "s", 3, left={})
    assert platform.outcome("v") == Outcome.CLICKED | Outcome.NEGATIVE
    platform.do("v", "s", 4, watched={"seconds": 12.0})  # told late: the visit was not so short
    assert platform.outcome("v") == Outcome.CLICKED
    platform.do("v", "t", joined={})
    platform.do("v", "t", 2, chatted={})
    platform.do("v", "t", 3, left={})
    assert platform.outcome("v", 1) == Outcome.CLICKED | Outcome.ENGAGED
    platform.do("nobody", "t", 3, left={})
    assert len(platform.viewers) == 1, "leaving alone makes nobody known"


def test_events_that_do_not_count_for_the_stream_do_not_count_for_the_viewer() -> None:
    platform = Platform()
    platform.start("s")
    platform.start("s", epoch=2)
    platform.do("v", "s", epoch=1, liked={})  # of the session before
    platform.do("", "s", liked={})
    platform.do("v", "unknown", liked={})
    platform.do("v", "s", viewer_count={"count": 3})
    assert len(platform.viewers) == 0


def test_the_history_is_newest_first_with_what_came_of_each() -> None:
    platform = Platform()
    platform.start("a", embedding=[1.0, 0.0, 0.0, 0.0])
    platform.start("b", embedding=[0.0, 3.0, 0.0, 0.0])
    platform.start("c")
    platform.do("v", "b", -60, watched={"seconds": 40.0})
    platform.do("v", "a", 0, joined={})
    platform.do("v", "c", -300, reported={})
    found = platform.viewers.histories(hashes("v", "stranger", ""), T0 + 60_000)
    assert found.embedding.shape == (3, SEQUENCE, 4) and found.meta.shape == (3, SEQUENCE, 4)
    np.testing.assert_array_equal(found.embedding[0, :3], [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    wanted = [
        [np.log1p(1), 0.0, 0.1, 1.0],
        [np.log1p(2), np.log1p(40.0), 0.1 + 0.4, 1.0],
        [np.log1p(6), 0.0, -2.0, 1.0],
    ]
    np.testing.assert_allclose(found.meta[0, :3], wanted, rtol=1e-6)
    assert not found.meta[0, 3:].any() and not found.embedding[0, 3:].any(), "padding"
    assert not found.meta[1:].any() and not found.embedding[1:].any(), "nobody knows these"


def test_reading_changes_nothing_not_even_who_is_forgotten_next() -> None:
    platform = Platform(capacity=2)
    platform.start("s")
    for viewer in ("first", "second"):
        platform.do(viewer, "s", joined={})
    platform.viewers.histories(hashes("first"), T0)
    platform.seen("first")
    platform.do("third", "s", joined={})
    assert platform.viewers.histories(hashes("first", "second", "third"), T0).meta[:, 0, 3].tolist() == [0, 1, 1]
    assert platform.viewers.forgotten == 1 and len(platform.viewers) == 2


def test_a_history_outlives_its_streams_and_rows_that_went_to_others() -> None:
    platform = Platform()
    platform.start("s", embedding=[0.0, 0.0, 1.0, 0.0])
    platform.do("v", "s", joined={})
    platform.do("", "s", epoch=1, ended={})
    later_ms = T0 + 2 * platform.table.settings.tombstone_ms
    platform.table.expire(later_ms)
    apply(platform.table, started("other", 900, later_ms, embedding=[1.0, 0.0, 0.0, 0.0]), at_ms=later_ms)
    assert platform.table.stream_id(0) == "other", "it got the row"
    np.testing.assert_array_equal(platform.viewers.histories(hashes("v"), later_ms).embedding[0, 0], [0, 0, 1, 0])


def test_a_session_nobody_visits_gives_way_and_its_visits_stay_without_embedding() -> None:
    platform = Platform(sessions=2)
    for i, name in enumerate("abc"):
        platform.start(name, embedding=np.eye(4)[i].tolist())
        platform.do("v", name, i, joined={})
    found = platform.viewers.histories(hashes("v"), T0)
    assert found.meta[0, :3, 3].all()
    np.testing.assert_array_equal(found.embedding[0, :3], [[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])


def test_the_twentyfirst_stream_takes_the_place_of_the_one_seen_longest_ago() -> None:
    platform = Platform(exclude_watched_ms=1)
    names = [f"s{i}" for i in range(SEQUENCE + 1)]
    platform.start(*names)
    for i, name in enumerate(names):
        platform.do("v", name, -i, watched={"seconds": 1.0})  # the later ones were seen earlier
    assert platform.seen("v") == [sorted(names[:-1])], "what is older than all twenty is not taken"
    platform.do("v", names[-1], 5, watched={"seconds": 1.0})
    assert platform.seen("v") == [sorted([*names[:-2], names[-1]])]


def test_language_is_the_one_watched_longest() -> None:
    platform = Platform()
    platform.start("a", "b", language="en")
    platform.start("c", language="id")
    platform.do("v", "a", watched={"seconds": 20.0})
    platform.do("v", "b", watched={"seconds": 20.0})
    platform.do("v", "c", watched={"seconds": 30.0})
    english = int(bucket_of(["en"], CODE_BUCKETS[0])[0])
    assert platform.viewers.languages(hashes("v", "w")).tolist() == [english, 0]


def test_codes_are_buckets_of_names_and_not_numbers_of_the_table() -> None:
    one, other = Platform(), Platform()
    other.start("x", language="fr", category="g9")  # so that the numbers differ
    for platform in (one, other):
        platform.start("s", language="en", category="g1")
    wanted = [[int(bucket_of([n], b)[0]) for n, b in zip(("en", "g1", "creator-s"), CODE_BUCKETS, strict=True)]]
    assert codes_of(one.table, np.array([0], np.int32)).tolist() == wanted
    assert codes_of(other.table, np.array([1], np.int32)).tolist() == wanted
    one.start("bare")
    assert codes_of(one.table, np.array([1], np.int32))[0, :2].tolist() == [0, 0]


class TestSeen:
    """What a viewer is not shown again."""

    def test_reported_streams_in_any_session_and_for_that_viewer_only(self) -> None:
        platform = Platform()
        platform.start("s", "t")
        platform.do("v", "s", reported={})
        platform.do("v", "t", watched={"seconds": 600.0})
        assert platform.seen("v", "w", "") == [["s"], [], []]
        platform.start("s", epoch=2)
        assert platform.seen("v") == [["s"]]

    def test_watched_sessions_for_a_while_but_not_the_next_session(self) -> None:
        platform = Platform(exclude_watched_ms=60_000, exclude_within_ms=3_600_000)
        platform.start("s", "t")
        platform.do("v", "s", watched={"seconds": 59.0})
        platform.do("v", "t", watched={"seconds": 30.0})
        assert platform.seen("v") == [[]]
        platform.do("v", "s", 1, watched={"seconds": 1.0})
        platform.do("v", "t", 1, watched={"seconds": 40.0})
        assert platform.seen("v") == [["s", "t"]]
        assert platform.seen("v", at_s=3_602) == [[]]
        platform.start("s", epoch=2)
        assert platform.seen("v") == [["t"]]

    def test_streams_that_are_gone_are_no_slot(self) -> None:
        platform = Platform()
        platform.start("s")
        platform.do("v", "s", reported={})
        platform.do("", "s", epoch=1, ended={})
        platform.table.expire(T0 + 2 * platform.table.settings.tombstone_ms)
        assert platform.seen("v") == [[]]

    def test_nothing_when_both_settings_are_off(self) -> None:
        platform = Platform(exclude_reported=False)
        platform.start("s")
        platform.do("v", "s", reported={})
        assert platform.seen("v") == [[]]


def test_what_does_not_fit_is_refused_and_leaves_an_empty_table() -> None:
    platform = Platform()
    platform.start("s")
    platform.do("v", "s", joined={})
    good = {name: {c: held.copy() for c, held in part.items()} for name, part in platform.viewers.columns().items()}

    def changed(table: str, column: str, value: Any) -> dict[str, dict[str, NDArray[Any]]]:
        return {**good, table: {**good[table], column: value}}

    for wrong, told in (
        (changed("viewers", "seen_s", np.zeros((1, SEQUENCE), np.int64)), r"viewers.seen_s: uint32\[1 x 20\] wanted"),
        (changed("viewers", "stream", np.zeros((1, 5), np.uint64)), r"viewers.stream: uint64\[1 x 20\] wanted"),
        (changed("sessions", "embedding", np.full((1, 4), np.nan, np.float16)), "finite"),
        (changed("sessions", "older", np.zeros(1, np.int32)), "no list"),
        (changed("viewers", "newer", np.zeros(1, np.int32)), "no list"),
        ({"viewers": good["viewers"]}, "sessions: columns"),
    ):
        viewers = ViewerTable(platform.viewers.settings, 4)
        with pytest.raises(ValueError, match=told):
            viewers.restore(wrong)
        assert len(viewers) == 0
        viewers.restore(good)
        assert len(viewers) == 1
    too_small = ViewerTable(ViewerSettings(capacity=1, sessions=1), 4)
    two = Platform()
    two.start("s", "t")
    two.do("v", "s", joined={})
    two.do("w", "t", joined={})
    with pytest.raises(ValueError, match="at most 1 rows wanted, got 2"):
        too_small.restore(two.viewers.columns())


def test_a_table_without_viewers_keeps_nothing(tmp_path: Any) -> None:
    table: LiveTable = new_table(small_settings())
    apply(table, started("s", 1), event("s", 2, viewer="v", liked={}))
    assert table.follower is None
