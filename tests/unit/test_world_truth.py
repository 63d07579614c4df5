"""What really happens on the simulated platform, and how well the events tell it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from loadtest.world import NEVER, Adversity, EventKind, Flaw, State, World, WorldEvents, WorldSettings

Column = Callable[[str], np.ndarray]


def play(world: World, steps: int) -> Column:
    """Steps the world; returns all its events, by column."""
    played: list[WorldEvents] = [world.step() for _ in range(steps)]

    def column(name: str) -> np.ndarray:
        if name == "now_ms":
            return np.concatenate([np.full(len(e), e.now_ms) for e in played])
        return np.concatenate([getattr(e, name) for e in played])

    return column


@pytest.fixture(scope="module")
def rough() -> tuple[World, Column]:
    """A quarter of an hour on a platform with short sessions and plenty of trouble."""
    world = World(
        WorldSettings(
            seed=11, target_live=120, n_creators=2_000, n_viewers=20_000, mean_session_ms=120_000,
            embedding_dim=8, record_viewers_ms=60_000,
            adversity=Adversity(flapping=0.2, flap_every_mean_ms=30_000, restart=0.2, low_quality=0.1),
        )
    )  # fmt: skip
    return world, play(world, 900)


def test_viewers_are_joins_minus_leaves(rough: tuple[World, Column]) -> None:
    s = rough[0].streams
    np.testing.assert_array_equal(s.viewers, s.initial_viewers + s.joins - s.leaves)
    assert (s.viewers >= 0).all()
    assert (s.viewers[s.state == State.OFF] == 0).all()


def test_on_a_perfect_network_the_events_tell_all_joins_and_leaves() -> None:
    world = World(
        WorldSettings(seed=5, target_live=40, n_creators=500, mean_session_ms=60_000, adversity=Adversity.none())
    )
    column = play(world, 300)
    told = np.zeros(len(world.streams))
    kind, stream, value = column("kind"), column("stream"), column("value")
    for what, sign in ((EventKind.JOINED, 1), (EventKind.LEFT, -1)):
        np.add.at(told, stream[kind == what], sign * value[kind == what])
    s = world.streams
    untold = s.unflushed_joins - s.unflushed_leaves
    np.testing.assert_array_equal(s.initial_viewers + told + untold, s.viewers)
    over = s.state == State.OFF
    assert over.sum() > 100
    assert (told + s.initial_viewers)[over].max() == 0


def test_nothing_is_live_after_its_true_end_nor_before_its_start(rough: tuple[World, Column]) -> None:
    world, _ = rough
    ended = np.flatnonzero(world.truth.ended_ms < NEVER)
    assert len(ended) > 300
    for row in ended[::7].tolist():
        end_ms = int(world.truth.ended_ms[row])
        if end_ms < world.now_ms:
            assert not world.truth.is_live([row], end_ms)[0]
            assert world.truth.is_live([row], end_ms - 1)[0]
            assert world.truth.dead_for_ms([row], world.now_ms)[0] == world.now_ms - end_ms + 1
        spans = world.truth.media_spans
        begin_ms = int(spans.from_ms[spans.stream == row].min())
        assert world.truth.is_live([world.streams.ids[row]], begin_ms)[0]
        if begin_ms > world.settings.start_ms:
            assert world.truth.dead_for_ms([row], begin_ms - 1)[0] == NEVER


def test_truth_now_agrees_with_the_state(rough: tuple[World, Column]) -> None:
    world, _ = rough
    rows = np.arange(len(world.streams))
    live = world.truth.is_live(rows, world.now_ms)
    np.testing.assert_array_equal(live, world.streams.state == State.LIVE)
    np.testing.assert_array_equal(np.flatnonzero(live), np.sort(world.live_rows))
    with pytest.raises(ValueError, match="not yet"):
        world.truth.is_live(rows, world.now_ms + 1)
    with pytest.raises(KeyError, match="no-such-stream"):
        world.truth.is_live(["no-such-stream"], world.now_ms)


def test_media_spans_of_a_stream_follow_each_other_and_its_epochs_grow(rough: tuple[World, Column]) -> None:
    spans = rough[0].truth.media_spans
    assert (spans.from_ms < spans.to_ms).all()
    for row in np.unique(spans.stream)[::5].tolist():
        own = spans.stream == row
        assert (spans.from_ms[own][1:] >= spans.to_ms[own][:-1]).all()
        assert (np.diff(spans.epoch[own]) >= 0).all()
        assert spans.epoch[own][0] == 1
    assert rough[0].truth.epoch.max() >= 3


def test_progress_is_told_only_while_media_flows(rough: tuple[World, Column]) -> None:
    world, column = rough
    beats = np.flatnonzero(column("kind") == EventKind.HEARTBEAT)
    for i in beats[:: max(1, len(beats) // 2_000)]:
        row, time_ms = int(column("stream")[i]), int(column("event_time_ms")[i])
        if not world.truth.is_live([row], time_ms)[0]:
            # Only a hung encoder beats on, and never gets further than where it stopped.
            sequence = column("value")[i]
            mine = beats[(column("stream")[beats] == row) & (column("epoch")[beats] == column("epoch")[i])]
            assert column("value")[mine].max() == sequence


def test_the_log_of_ends_is_what_was_delivered(rough: tuple[World, Column]) -> None:
    world, column = rough
    ends = world.truth.end_events
    is_end = column("kind") == EventKind.ENDED
    arrived: dict[tuple[int, int], int] = {}
    for row, epoch, now_ms in zip(
        column("stream")[is_end].tolist(), column("epoch")[is_end].tolist(), column("now_ms")[is_end].tolist()
    ):
        arrived.setdefault((row, epoch), now_ms)
    expected = {
        (row, epoch): at_ms
        for row, epoch, at_ms in zip(ends.stream.tolist(), ends.epoch.tolist(), ends.delivered_ms.tolist())
        if 0 <= at_ms <= world.now_ms
    }
    assert arrived == expected


def test_every_kind_of_bad_end_happens(rough: tuple[World, Column]) -> None:
    world, column = rough
    truth, ends = world.truth, world.truth.end_events
    over = np.flatnonzero(truth.ended_ms < NEVER)
    told = set(zip(ends.stream.tolist(), ends.epoch.tolist()))
    silent = [row for row in over.tolist() if (row, int(truth.epoch[row])) not in told]
    assert len(silent) > 10
    assert (ends.delivered_ms < 0).sum() > 5
    delay = ends.delivered_ms - ends.emitted_ms
    assert (delay > 30_000).sum() > 5
    # An end that arrives when the next epoch is already running.
    next_start = {
        (row, epoch): time_ms
        for row, epoch, time_ms, kind in zip(
            column("stream").tolist(),
            column("epoch").tolist(),
            column("now_ms").tolist(),
            column("kind").tolist(),
        )
        if kind == EventKind.STARTED
    }
    overtaken = sum(
        next_start.get((row, epoch + 1), NEVER) <= at_ms
        for row, epoch, at_ms in zip(ends.stream.tolist(), ends.epoch.tolist(), ends.delivered_ms.tolist())
    )
    assert overtaken > 5
    # Heartbeats without progress after the true end.
    beat = column("kind") == EventKind.HEARTBEAT
    assert (column("event_time_ms")[beat] > truth.ended_ms[column("stream")[beat]] + 5_000).any()


def test_encoders_drop_out_for_less_and_for_more_than_a_lease(rough: tuple[World, Column]) -> None:
    spans = rough[0].truth.media_spans
    gaps: dict[bool, list[int]] = {True: [], False: []}
    for row in np.unique(spans.stream).tolist():
        own = np.flatnonzero(spans.stream == row)
        for a, b in pairwise(own):
            gaps[bool(spans.epoch[a] == spans.epoch[b])].append(int(spans.from_ms[b] - spans.to_ms[a]))
    for same_epoch in (True, False):
        assert min(gaps[same_epoch]) < 10_000
        assert max(gaps[same_epoch]) > 15_000


def test_events_come_late_twice_and_overtaken(rough: tuple[World, Column]) -> None:
    world, column = rough
    age_ms = (column("now_ms") - column("event_time_ms"))[column("kind") == EventKind.CHATTED]
    assert (age_ms > 10_000).any()
    assert np.median(age_ms) < 1_000
    number = column("producer").astype(np.int64) << 40 | column("sequence").astype(np.int64)
    assert len(np.unique(number)) < len(number)
    for p in range(world.settings.media_producers):
        assert (np.diff(column("sequence")[column("producer") == p].astype(np.int64)) < 0).any()


def test_bots_are_counted_and_do_nothing_and_spammers_do_too_much() -> None:
    world = World(
        WorldSettings(
            seed=2, target_live=150, n_creators=1_000, mean_session_ms=1_200_000, top_audience=2_000.0,
            adversity=Adversity(view_bot=0.2, chat_spam=0.2, low_quality=0.2, moderated_per_minute=0.5),
        )
    )  # fmt: skip
    column = play(world, 300)
    kind, stream, value, viewer = (column(name) for name in ("kind", "stream", "value", "viewer"))
    flaw = world.streams.flaw[stream]

    def typical_chats_per_viewer(which: Flaw) -> float:
        counts = kind == EventKind.VIEWER_COUNT
        chats = kind == EventKind.CHATTED
        ratios = [
            value[chats & (stream == row)].sum() / (value[counts & (stream == row)].mean() + 1)
            for row in np.unique(stream[counts & (flaw == which)])
        ]
        return float(np.median(ratios))

    usual = typical_chats_per_viewer(Flaw.NONE)
    assert typical_chats_per_viewer(Flaw.VIEW_BOT) < 0.4 * usual
    assert typical_chats_per_viewer(Flaw.CHAT_SPAM) > 3 * usual
    assert (world.truth.reported_viewers > world.truth.viewers)[world.truth.view_bot & (world.truth.viewers > 0)].all()
    spam = (kind == EventKind.CHATTED) & (flaw == Flaw.CHAT_SPAM)
    row = np.flatnonzero(world.truth.chat_spam & (world.streams.state == State.LIVE))[0]
    assert len(np.unique(viewer[spam & (stream == row)])) <= 4
    assert (kind[flaw == Flaw.LOW_QUALITY] == EventKind.REPORTED).sum() > 0
    moderated = stream[kind == EventKind.MODERATED]
    assert len(np.unique(moderated)) > 10
    assert (world.streams.flaw[moderated] != Flaw.NONE).all()


def ranks(x: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(x)).astype(float)


def test_likes_and_joins_per_viewer_foretell_growth() -> None:
    world = World(
        WorldSettings(
            seed=4, target_live=400, n_creators=3_000, mean_session_ms=3_600_000, record_viewers_ms=60_000,
            embedding_dim=4,
        )
    )  # fmt: skip
    rate = np.zeros(10_000)
    correlations = []
    asked: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []
    for i in range(1_800):
        events = world.step()
        leading = (events.kind == EventKind.LIKED) | (events.kind == EventKind.JOINED)
        rate *= np.exp(-1 / 60)
        np.add.at(rate, events.stream[leading], events.value[leading])
        if i >= 300 and i % 300 == 0:
            rows = world.live_rows
            viewers = world.truth.viewers_at(rows, world.now_ms)
            asked.append((world.now_ms, rows, viewers, rate[rows] / (viewers + 10)))
    for t_ms, rows, before, feature in asked:
        if t_ms + 300_000 > world.now_ms:
            continue
        after = world.truth.viewers_at(rows, t_ms + 300_000)
        counted = (before > 20) & world.truth.is_live(rows, t_ms + 300_000)
        growth = np.log((after + 5) / (before + 5))
        correlations.append(np.corrcoef(ranks(feature[counted]), ranks(growth[counted]))[0, 1])
    assert len(correlations) >= 4
    assert np.mean(correlations) > 0.2


def test_viewers_are_recorded_only_if_asked_for(rough: tuple[World, Column]) -> None:
    world, _ = rough
    assert len(world.truth.recorded_ms) == 15
    assert world.truth.viewers_at(np.arange(len(world.streams)), world.now_ms).sum() > 0
    unrecorded = World(WorldSettings(target_live=10, n_creators=100))
    unrecorded.step()
    with pytest.raises(LookupError, match="record_viewers_ms"):
        unrecorded.truth.viewers_at([0], unrecorded.now_ms)


def test_the_number_of_live_streams_stays_near_the_target() -> None:
    world = World(
        WorldSettings(target_live=200, n_creators=1_000, mean_session_ms=60_000, daily_curve=False, embedding_dim=4)
    )
    live = []
    for _ in range(600):
        world.step()
        live.append(len(world.live_rows))
    assert 160 < np.mean(live[:60]) < 240
    assert 160 < np.mean(live[-300:]) < 240


def test_nights_are_quieter_than_evenings() -> None:
    def live_at(hour: int) -> int:
        start_ms = 1_767_225_600_000 + hour * 3_600_000
        world = World(WorldSettings(target_live=300, n_creators=2_000, start_ms=start_ms, embedding_dim=4))
        world.step()
        return len(world.live_rows)

    assert live_at(20) > 2 * live_at(7)
