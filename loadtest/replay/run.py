"""`liverank replay`: a server of its own, the file's clock, and what came of it."""

from __future__ import annotations

import contextlib
import math
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
from numpy.typing import NDArray

from loadtest.replay.connection import Connection
from loadtest.replay.formulas import Formulas
from loadtest.replay.growth import TOP, Overlap, Reports, highest, truth_at
from loadtest.replay.player import BASE_MS, FEED_LIMIT, Player, Rig
from loadtest.replay.reader import History, read_history
from loadtest.replay.report import Outcome, print_outcome
from loadtest.replay.sessions import split_sessions
from server.app import App
from server.clock import ManualClock
from server.config import SecuritySettings, Settings, load_settings
from server.errors import ConfigError

LEASE_MS = GRACE_MS = 600_000
"""Reports come by the minute and several may be missing; after 20 silent minutes a session is over."""

YEAR_MS = 365 * 24 * 3_600_000
HOUR_S = 3600


def run_replay(file: Path, speed: float, surface: str, config: Path | None) -> int:
    """Plays ``file`` through a server of its own and prints a table and, last, one line of JSON.

    Args:
        speed: times real time; 0: as fast as it goes.
        surface: whose feed is compared with the truth; it must be in the rules file.

    Returns:
        0 if no stream was shown after its end was acknowledged, every event was accepted or rejected for a stated
        reason, and the server stayed sound; else 1.

    Raises:
        ConfigError: the file, the settings or an argument is wrong.
    """
    if not (math.isfinite(speed) and speed >= 0):
        raise ConfigError(f"--speed: a number from 0 on wanted, got {speed}")
    settings = load_settings(config)
    history = read_history(file)
    pace = Pacer(int(history.t_s[0]), int(history.t_s[-1]), speed)
    try:
        with tempfile.TemporaryDirectory(prefix="liverank-replay-") as folder:
            outcome = replay(history, replay_settings(settings, Path(folder)), surface, pace)
    except grpc.RpcError as error:
        print(f"liverank: the server failed: {error}", file=sys.stderr)
        return 1
    print_outcome(outcome)
    return 0 if outcome.sound else 1


def replay_settings(settings: Settings, folder: Path) -> Settings:
    """The settings with what a replay must own: loopback, free ports, a log that goes away, no refresh but its own.

    Leases become those of minute-level reports unless they were set. Ticks and refreshes by the wall clock would mix
    scores of two moments and make the result depend on the machine's speed.
    """
    table, rank = settings.table, settings.rank
    lease_ms = table.lease_ms if "lease_ms" in table.model_fields_set else LEASE_MS
    grace_ms = table.grace_ms if "grace_ms" in table.model_fields_set else GRACE_MS
    return settings.model_copy(
        update={
            "serve": settings.serve.model_copy(update={"host": "127.0.0.1", "port": 0, "metrics_port": 0}),
            "table": table.model_copy(update={"lease_ms": lease_ms, "grace_ms": grace_ms}),
            "security": SecuritySettings(),  # nobody else can reach it
            "log": settings.log.model_copy(update={"path": folder / "events.sqlite3"}),
            "scoring": settings.scoring.model_copy(update={"refresh_ms": YEAR_MS}),
            "rank": rank.model_copy(update={"tick_ms": YEAR_MS, "max_limit": max(FEED_LIMIT, rank.max_limit)}),
        }
    )


def replay(history: History, settings: Settings, surface: str, pace: Callable[[int], None]) -> Outcome:
    """Plays a history against a fresh server; ``pace`` is told each moment (s of the file) before it is played.

    Raises:
        ConfigError: the settings or the surface are wrong. grpc.RpcError: the server did not answer.
    """
    silence_s = (settings.table.lease_ms + settings.table.grace_ms) // 1000
    sessions = split_sessions(history, silence_s)
    reports = Reports(history, sessions)
    formulas = Formulas(reports, history.has_likes)
    feed = Overlap()
    rivals: dict[str, Overlap] = {}
    short = 0

    def compare(t_s: int, shown: NDArray[np.int32]) -> None:
        """The feed's first ten candidates against those of each formula: all choose from the same streams."""
        nonlocal short
        scores = formulas.scores(t_s)  # in every bin: one of them remembers
        truth = truth_at(reports, t_s, int(history.t_s[-1]))
        if truth is None:
            return
        first = shown[np.isin(shown, truth.streams)][:TOP]
        short += len(first) < TOP
        feed.add(truth, first)
        for name, score in scores.items():
            top = truth.streams[highest(score[truth.candidates])]
            rivals.setdefault(name, Overlap()).add(truth, top)

    clock = ManualClock(BASE_MS + int(history.t_s[0]) * 1000)
    faults: list[str] = []
    with running(App(settings, clock, lambda: faults.append("the engine gave up")), faults) as (app, connection):
        if surface not in app.engine.streams.book.surfaces:
            names = ", ".join(sorted(app.engine.streams.book.surfaces))
            raise ConfigError(f"--surface: one of {names} wanted, got {surface!r}")
        rig = Rig(connection, clock, lambda: app.engine.call(app.engine.refresh_now).result(), pace)
        player = Player(history, sessions, rig, surface, settings.table.max_events_per_batch, compare)
        began_s = time.monotonic()
        tally = player.play()
        seconds = time.monotonic() - began_s
    return Outcome(
        rows=len(history),
        streams=len(history.ids),
        sessions=len(sessions.stream),
        seconds=seconds,
        tally=tally,
        feed=feed,
        formulas=rivals,
        short_feeds=short,
        faults=tuple(faults),
    )


@contextlib.contextmanager
def running(app: App, faults: list[str]) -> Iterator[tuple[App, Connection]]:
    """The app, serving, and a client; adds to ``faults`` what goes wrong while it is taken down."""
    try:
        app.start()
        connection = Connection(f"127.0.0.1:{app.port}", "replay")
        try:
            yield app, connection
        finally:
            connection.close()
    finally:
        if not app.drain():
            faults.append("calls were cut off while the server drained")


class Pacer:
    """Waits until each moment of the file is due, and tells every hour of the file on stderr.

    Args:
        first_s, last_s: the file's first and last moment. speed: times real time; 0: no waiting.
        wait: takes seconds; an Event's by default, which Ctrl-C interrupts. now_s: a monotonic clock.
    """

    def __init__(
        self,
        first_s: int,
        last_s: int,
        speed: float,
        wait: Callable[[float], object] | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._first_s, self._last_s, self._speed = first_s, last_s, speed
        self._wait, self._now_s = wait or threading.Event().wait, now_s
        self._began_s: float | None = None
        self._told_hour = -1

    def __call__(self, moment_s: int) -> None:
        if self._began_s is None:
            self._began_s = self._now_s()
        if (hour := moment_s // HOUR_S) > self._told_hour:
            self._told_hour = hour
            print(f"replay: hour {hour} of {self._last_s // HOUR_S}", file=sys.stderr, flush=True)
        if self._speed > 0:
            left_s = self._began_s + (moment_s - self._first_s) / self._speed - self._now_s()
            if left_s > 0:
                self._wait(left_s)
