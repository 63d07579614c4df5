"""The judge of histories finds what is wrong in hand-made ones, and nothing in right ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from liverank.v1 import ingest_pb2 as pb

from loadtest.liveness.check import LEASE_BOUND_MS, check, find_violations
from loadtest.liveness.history import (
    ENDED,
    HEARTBEAT,
    STARTED,
    VIEWERS,
    BatchSent,
    EventSent,
    FinalState,
    Heard,
    History,
    Moment,
    Reply,
)

LEASE_MS = 1_000


def at(ms: float) -> Moment:
    return Moment(ms / 1000, int(ms))


class Story:
    """Builds a history; times in ms."""

    def __init__(self) -> None:
        self.history = History(began=at(0))
        self._sequence = 0

    def sent(
        self, kind: str, at_ms: float, acked_ms: float | None, epoch: int = 1, value: int = 0, code: int = 0,
        event_ms: float | None = None, stream: str = "s",
    ) -> Story:  # fmt: skip
        self._sequence += 1
        event = EventSent(self._sequence, stream, epoch, kind, int(at_ms if event_ms is None else event_ms), value)
        acked = None if acked_ms is None else at(acked_ms)
        offset = 0 if acked is None else self._sequence
        self.history.batches.append(BatchSent("p", (event,), at(at_ms), acked, offset, {0: code} if code else {}))
        self.history.applied_offset = self._sequence
        return self

    def replied(self, sent_ms: float, received_ms: float, epoch: int = 1, stream: str = "s") -> Story:
        self.history.replies.append(Reply(at(sent_ms), at(received_ms), int(received_ms), ((stream, epoch),)))
        return self

    def finally_(self, state: str, epoch: int, as_of_ms: int = 10_000, viewers: float | None = None) -> Story:
        self.history.final["s"] = FinalState(state, epoch, as_of_ms, viewers)
        return self

    def watched(self, watcher: str, *heard: tuple[int, str, int]) -> Story:
        self.history.watching[watcher] = at(0)
        self.history.heard += [Heard(watcher, offset, stream, epoch, "x") for offset, stream, epoch in heard]
        return self

    def violations(self) -> list[str]:
        return find_violations(self.history, LEASE_MS)

    def missing(self) -> list[str]:
        return check(self.history, LEASE_MS).missing_events

    def missed(self) -> list[str]:
        return check(self.history, LEASE_MS).missed_watch_ends


def begun() -> Story:
    return Story().sent(STARTED, 100, 110)


# --- ends -----------------------------------------------------------------------------------------


def test_a_reply_to_a_request_sent_after_an_acknowledged_end_is_a_violation() -> None:
    story = begun().sent(ENDED, 200, 210).replied(211, 215)
    assert story.violations() == ["s/1 was shown; its end was acknowledged 1.0 ms before"]


@pytest.mark.parametrize(("sent_ms", "received_ms"), [(190, 195), (205, 230), (210, 215)])
def test_a_request_sent_before_the_acknowledgement_may_still_see_the_stream(sent_ms: float, received_ms: float) -> None:
    assert not begun().sent(ENDED, 200, 210).replied(sent_ms, received_ms).violations()


def test_the_end_of_a_higher_epoch_and_the_start_of_one_end_every_lower_one() -> None:
    assert begun().sent(ENDED, 200, 210, epoch=3).replied(220, 225).violations()
    assert begun().sent(STARTED, 200, 210, epoch=2).replied(220, 225, epoch=1).violations()
    assert not begun().sent(STARTED, 200, 210, epoch=2).replied(220, 225, epoch=2).violations()
    assert not begun().sent(STARTED, 200, 210, 2).sent(ENDED, 220, 230, 1).replied(240, 250, 2).violations()


@pytest.mark.parametrize("code", [pb.DUPLICATE_SEQUENCE, pb.STREAM_ENDED, pb.EPOCH_BACKWARDS])
def test_an_end_refused_because_it_already_is_one_is_as_good_as_acknowledged(code: int) -> None:
    assert begun().sent(ENDED, 200, None).sent(ENDED, 300, 310, code=code).replied(320, 325).violations()


@pytest.mark.parametrize("code", [pb.UNKNOWN_STREAM, pb.TOO_FAR_IN_FUTURE])
def test_an_end_that_was_refused_otherwise_ends_nothing(code: int) -> None:
    assert not begun().sent(ENDED, 200, 210, code=code).replied(220, 225).violations()


def test_an_end_nobody_acknowledged_proves_nothing() -> None:
    assert not begun().sent(ENDED, 200, None).replied(300, 305).violations()


# --- leases ---------------------------------------------------------------------------------------


def test_a_lease_that_ran_out_before_the_request_was_sent_is_a_violation_beyond_the_bound() -> None:
    over_ms = 100 + LEASE_MS
    assert not begun().replied(over_ms + LEASE_BOUND_MS, over_ms + 60).violations()
    found = begun().replied(over_ms + LEASE_BOUND_MS + 1, over_ms + 60).violations()
    assert found == ["s/1 was shown 51 ms past its lease"]


def test_a_heartbeat_with_progress_renews_and_one_without_does_not() -> None:
    renewed = begun().sent(HEARTBEAT, 600, 610, value=1)
    assert not renewed.replied(1_500, 1_505).violations()
    stalled = renewed.sent(HEARTBEAT, 1_200, 1_210, value=1)
    assert stalled.replied(1_900, 1_905).violations()


def test_a_heartbeat_on_its_way_counts_for_the_server_until_a_reply_could_not_have_seen_it() -> None:
    story = begun().sent(HEARTBEAT, 1_400, None, value=1)
    assert not story.replied(1_500, 1_505).violations()
    assert begun().sent(HEARTBEAT, 1_400, None, value=1).replied(1_300, 1_390).violations()


def test_a_clock_ahead_lengthens_no_lease_and_one_behind_shortens_it() -> None:
    ahead = Story().sent(STARTED, 100, 110, event_ms=3_000)
    assert ahead.replied(1_110 + LEASE_BOUND_MS + 1, 1_200).violations()
    behind = Story().sent(STARTED, 1_000, 1_010, event_ms=700)
    assert behind.replied(1_700 + LEASE_BOUND_MS + 1, 1_800).violations()


def test_heartbeats_of_another_epoch_and_repeated_starts_prove_nothing() -> None:
    story = begun().sent(STARTED, 200, 210, epoch=2).sent(HEARTBEAT, 900, 910, epoch=1, value=9)
    assert story.sent(STARTED, 1_000, 1_010, epoch=2).replied(1_500, 1_505, epoch=2).violations()


def test_a_session_nobody_started_is_a_violation_and_strangers_are_not_judged() -> None:
    assert begun().replied(200, 210, epoch=7).violations() == ["s/7 was shown, and nobody ever started it"]
    assert not begun().replied(200, 210, stream="of somebody else").violations()


# --- events ---------------------------------------------------------------------------------------


def test_what_was_acknowledged_must_be_there_at_the_end() -> None:
    both = begun().sent(ENDED, 200, 210)
    assert not both.finally_("ENDED", 1).missing()
    assert both.finally_("LIVE", 1).missing() == ["s/1 is LIVE; its end was acknowledged"]
    assert both.finally_("UNKNOWN", 0).missing() == ["s is at epoch 0; 1 was acknowledged and 1 is the highest sent"]
    assert begun().sent(STARTED, 200, None, epoch=2).finally_("LIVE", 2).missing() == [], "it may have been applied"


def test_an_acknowledged_renewal_must_hold() -> None:
    story = begun().sent(HEARTBEAT, 600, 610, value=1)
    assert story.finally_("SUSPECT", 1, as_of_ms=1_000).missing()
    assert not story.finally_("SUSPECT", 1, as_of_ms=1_600).missing()


def test_the_newest_acknowledged_viewer_count_must_be_the_one_in_the_table() -> None:
    story = begun().sent(VIEWERS, 200, 210, value=7).sent(VIEWERS, 300, None, value=8)
    assert not story.finally_("LIVE", 1, viewers=7.0).missing() and not story.finally_("LIVE", 1, viewers=8.0).missing()
    assert story.finally_("LIVE", 1, viewers=0.0).missing() == ["s/1 has 0 viewers; acknowledged last: [7, 8]"]


def test_offsets_are_applied_and_given_once_and_sequences_are_remembered() -> None:
    story = begun().sent(VIEWERS, 200, 210)
    story.history.applied_offset = 1
    assert story.missing() == ["offset 2 was acknowledged; 1 is the last applied"]
    story.history.batches[1].offset = 1
    assert story.missing() == ["offset 1 was acknowledged twice"]
    event = story.history.batches[0].events[0]
    story = begun()
    story.history.resent = [(event, pb.DUPLICATE_SEQUENCE), (event, 0)]
    assert story.missing() == ["started of s (1) is forgotten: a resend got 0"]


# --- notices --------------------------------------------------------------------------------------


def test_every_watcher_hears_every_acknowledged_end_without_gaps() -> None:
    story = begun().sent(ENDED, 200, 210)
    assert not story.watched("a", (4, "s", 1), (5, "t", 1)).missed()
    assert story.watched("b", (4, "t", 1), (6, "u", 1)).missed() == [
        "b never heard end number 5", "b never heard of the end of s/1",
    ]  # fmt: skip


STEPS = st.tuples(st.sampled_from((STARTED, HEARTBEAT, ENDED)), st.integers(1, 3), st.integers(1, 40))


@given(st.lists(STEPS, max_size=12))
def test_a_server_that_shows_only_what_it_may_is_never_accused(script: list[tuple[str, int, int]]) -> None:
    """A model of the server in two dozen lines, asked after every event."""
    story, epoch, ended, until_ms, media, now_ms = Story(), 0, False, 0, -1, 0
    for kind, of_epoch, gap in script:
        now_ms += gap * 20
        code = 0
        if of_epoch < epoch:
            code = pb.EPOCH_BACKWARDS
        elif kind == STARTED and of_epoch > epoch:
            epoch, ended, until_ms, media = of_epoch, False, now_ms + LEASE_MS, -1
        elif epoch == 0:
            code = pb.UNKNOWN_STREAM
        elif ended and of_epoch == epoch:
            code = pb.STREAM_ENDED
        elif kind == ENDED:
            epoch, ended = of_epoch, True
        elif of_epoch > epoch:
            code = pb.EPOCH_UNKNOWN
        elif kind == HEARTBEAT:
            media, until_ms = media + 1, now_ms + LEASE_MS
        story.sent(kind, now_ms, now_ms, of_epoch, max(media, 0), code)
        if not ended and now_ms < until_ms:
            story.replied(now_ms + 1, now_ms + 2, epoch)
    assert not story.violations()
