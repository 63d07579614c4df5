"""What the player sends, when, and what it holds against the server's answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from liverank.v1 import ingest_pb2, ranking_pb2

from loadtest.replay.player import BASE_MS, Player, Rig, Tally, cut, events_of
from loadtest.replay.reader import read_history
from loadtest.replay.run import YEAR_MS, Pacer, replay_settings
from loadtest.replay.sessions import split_sessions
from server.clock import ManualClock
from server.config import parse_settings
from tests.histories import Row, row, write_csv

Acknowledge = Callable[[Sequence[ingest_pb2.Event]], ingest_pb2.PublishAck]


class ScriptedConnection:
    """Accepts everything, unless told otherwise; every feed is ``shown``: (stream, epoch) pairs."""

    def __init__(self, clock: ManualClock, shown: Sequence[tuple[str, int]] = ()) -> None:
        self.clock, self.shown = clock, shown
        self.batches: list[tuple[int, list[ingest_pb2.Event]]] = []
        self.acknowledge: Acknowledge = lambda events: ingest_pb2.PublishAck(accepted=len(events))

    def publish(self, events: Sequence[ingest_pb2.Event]) -> ingest_pb2.PublishAck:
        self.batches.append(((self.clock.now_ms() - BASE_MS) // 1000, list(events)))
        return self.acknowledge(events)

    def rank(self, request_id: str, surface: str, limit: int) -> ranking_pb2.RankResponse:
        streams = [ranking_pb2.RankedStream(stream_id=name, epoch=epoch) for name, epoch in self.shown]
        return ranking_pb2.RankResponse(streams=streams, model_version="scripted/1")

    def live(self) -> int:
        return len(self.batches)


class Stage:
    """A player on a scripted connection."""

    def __init__(self, tmp_path: Path, rows: list[Row], shown: Sequence[tuple[str, int]] = ()) -> None:
        self.history = read_history(write_csv(tmp_path / "h.csv", rows))
        self.sessions = split_sessions(self.history, 1_200)
        clock = ManualClock(BASE_MS)
        self.connection = ScriptedConnection(clock, shown)
        self.moments: list[tuple[str, int]] = []
        self.feeds: dict[int, list[int]] = {}
        self.rig = Rig(
            self.connection,  # type: ignore[arg-type]
            clock,
            lambda: self.moments.append(("refresh", (clock.now_ms() - BASE_MS) // 1000)),
            lambda moment_s: self.moments.append(("pace", moment_s)),
        )

    def play(self, max_batch: int = 10_000) -> Tally:
        def on_feed(t_s: int, shown: np.ndarray) -> None:
            self.feeds[t_s] = shown.tolist()

        return Player(self.history, self.sessions, self.rig, "chart", max_batch, on_feed).play()


def test_a_row_becomes_the_events_that_say_the_same(tmp_path: Path) -> None:
    rows = [
        row(0, "start", "a", likes_delta=9, channel="c", org="o"),
        row(60, "snapshot", "a", 70, likes_delta=2, comments=5),
        row(120, "end", "a"),
    ]
    stage = Stage(tmp_path, rows)
    start, snapshot, end = (events_of(stage.history, stage.sessions, i) for i in range(3))
    assert [e.WhichOneof("payload") for e in start] == ["started", "liked"]
    assert (start[0].started.creator_id, start[0].started.category) == ("c", "o")
    assert [e.WhichOneof("payload") for e in snapshot] == ["heartbeat", "viewer_count", "liked", "chatted"]
    assert snapshot[0].heartbeat.media_sequence == 1
    assert [snapshot[1].viewer_count.count, snapshot[2].liked.count, snapshot[3].chatted.count] == [70, 2, 5]
    assert [e.WhichOneof("payload") for e in end] == ["ended"]
    assert {e.epoch for e in (*start, *snapshot, *end)} == {1}
    assert {e.event_time_ms for e in snapshot} == {BASE_MS + 60_000}


def test_rows_are_delivered_at_the_first_full_minute_with_growing_sequences(tmp_path: Path) -> None:
    rows = [row(0, "start", "a"), row(1, "snapshot", "a"), row(60, "snapshot", "a"), row(61, "snapshot", "a")]
    stage = Stage(tmp_path, rows)
    stage.play()
    assert [at_s for at_s, _ in stage.connection.batches] == [0, 60, 120]
    sequences = [event.sequence for _, batch in stage.connection.batches for event in batch]
    assert sequences == list(range(1, 8))


def test_a_minute_with_more_events_than_fit_is_sent_in_several_batches(tmp_path: Path) -> None:
    stage = Stage(tmp_path, [row(0, "snapshot", f"s{i}") for i in range(5)])
    tally = stage.play(max_batch=4)
    assert [len(batch) for _, batch in stage.connection.batches] == [4, 4, 4, 3]
    assert (tally.events, tally.accepted, tally.lost) == (15, 15, 0)


def test_a_feed_is_asked_for_every_five_minutes_after_a_refresh_also_when_nothing_happens(tmp_path: Path) -> None:
    stage = Stage(tmp_path, [row(0, "start", "a"), row(840, "snapshot", "a")], shown=[("a", 1)])
    tally = stage.play()
    assert list(stage.feeds) == [0, 300, 600] and set(map(tuple, stage.feeds.values())) == {(0,)}
    assert [at_s for what, at_s in stage.moments if what == "refresh"] == [0, 300, 600]
    assert [at_s for what, at_s in stage.moments if what == "pace"] == [0, 300, 600, 840]
    assert tally.answered_by == {"scripted/1": 3} and tally.shown_after_end == 0


def test_an_ended_stream_in_a_feed_is_held_against_the_server_until_it_returns(tmp_path: Path) -> None:
    rows = [row(0, "start", "a"), row(240, "end", "a"), row(540, "start", "a"), row(900, "snapshot", "a")]
    stage = Stage(tmp_path, rows, shown=[("a", 2)])
    assert stage.play().shown_after_end == 1  # at 300, not at 0, 600 and 900


def test_a_session_that_was_followed_by_another_counts_as_ended(tmp_path: Path) -> None:
    rows = [row(0, "start", "a"), row(240, "start", "a"), row(300, "snapshot", "a")]
    assert Stage(tmp_path, rows, shown=[("a", 1)]).play().shown_after_end == 1


def test_rejections_are_counted_by_their_reason_and_silence_is_a_loss(tmp_path: Path) -> None:
    stage = Stage(tmp_path, [row(0, "snapshot", "a")])
    late = ingest_pb2.RejectedEvent(sequence=2, code=ingest_pb2.TOO_LATE)
    stage.connection.acknowledge = lambda events: ingest_pb2.PublishAck(accepted=1, rejected=[late])
    tally = stage.play()
    assert tally.rejected == {"TOO_LATE": 1}
    assert (tally.events, tally.accepted, tally.lost) == (3, 1, 1)


def test_long_names_are_cut_between_characters() -> None:
    assert cut("short", 64) == "short"
    assert cut("あ" * 30, 64) == "あ" * 21


def test_a_paced_replay_waits_for_each_moment_and_an_unpaced_one_never(capsys: pytest.CaptureFixture[str]) -> None:
    now_s = [100.0]
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        now_s[0] += seconds

    pace = Pacer(600, 7_200, 60.0, wait, lambda: now_s[0])
    pace(600)
    pace(660)
    now_s[0] += 5.0  # the machine was slow: the time lost is caught up, not added
    pace(720)
    pace(1_020)
    assert waits == pytest.approx([1.0, 1.0])
    unpaced = Pacer(600, 7_200, 0.0, wait, lambda: now_s[0])
    for moment_s in (600, 3_600, 7_200):
        unpaced(moment_s)
    assert len(waits) == 2
    assert capsys.readouterr().err.splitlines() == [f"replay: hour {h} of 2" for h in (0, 0, 1, 2)]


def test_a_replay_owns_its_ports_log_and_refreshes_and_keeps_leases_that_were_set(tmp_path: Path) -> None:
    given = parse_settings({"serve": {"port": 7_000}, "table": {"lease_ms": 5_000}, "scoring": {"mode": "triton"}})
    settings = replay_settings(given, tmp_path)
    assert (settings.serve.port, settings.serve.metrics_port, settings.serve.host) == (0, 0, "127.0.0.1")
    assert settings.log.path.parent == tmp_path
    assert (settings.table.lease_ms, settings.table.grace_ms) == (5_000, 600_000)
    assert (settings.scoring.refresh_ms, settings.rank.tick_ms) == (YEAR_MS, YEAR_MS)
    assert settings.scoring.mode == "triton"
