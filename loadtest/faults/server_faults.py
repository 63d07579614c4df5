"""The server itself dies, or its machine's clock is stepped."""

from __future__ import annotations

import time

from liverank.v1 import admin_pb2, admin_pb2_grpc

from loadtest.faults.base import Seen, scenario
from loadtest.faults.events import check_live, publish, started
from loadtest.faults.stage import WITHIN_S, Stage
from loadtest.processes import wait_for

HOUR_S = 3_600
LOOK_EVERY_S = 0.02
LATE_S = 0.1
"""Two clocks are compared."""


@scenario("server killed")
def server_killed(stage: Stage) -> Seen:
    """kill -9 while events are being written, then a start from its log."""
    with stage.probe() as probe:
        killed_s = time.monotonic()
        stage.kill_server()
        first = probe.wait_unusual(killed_s, WITHIN_S)
        started_s = time.monotonic()
        stage.start_server()
        again = probe.wait_usual(max(started_s, first.at_s), WITHIN_S)
        disclosed = first.failed and probe.discloses(killed_s)
        return Seen(first.at_s - killed_s, again.at_s - started_s, disclosed, f"calls fail: {first.level}")


def _clock_stepped(stage: Stage, seconds: int) -> Seen:
    """What lives goes on living on its heartbeats, what falls silent is gone when its lease is, and not later."""
    lease_s = stage.settings["table"]["lease_ms"] / 1000
    silent = f"silent-{time.monotonic_ns()}"
    with stage.probe() as probe, stage.channel() as channel:
        begun_s = asked_s = time.monotonic()
        publish(channel, started(silent))
        published_s = time.monotonic()
        stage.command(f"clock {seconds}")
        while check_live(channel, [silent]):  # by the server's clock when it was asked, or later
            if asked_s - published_s > lease_s + LATE_S:
                raise TimeoutError(f"the lease of {silent} ran out, and {asked_s - published_s:.2f} s on it lives")
            time.sleep(LOOK_EVERY_S)
            asked_s = time.monotonic()
        lasted_s = time.monotonic() - begun_s
        told_s = stage.metric("liverank_clock_stepped_seconds")
        # Everything that beats has been renewed by now, or it would be gone like the silent one.
        live = admin_pb2_grpc.AdminStub(channel).Status(admin_pb2.StatusRequest(), timeout=WITHIN_S).live
        # A model call that timed out on a busy machine is none of the clock's doing; that every one does would be.
        probe.wait_usual(time.monotonic(), WITHIN_S)
        stage.command("clock 0")
        wait_for(lambda: stage.metric("liverank_clock_stepped_seconds") == 0, WITHIN_S, "the clock agrees again")
        unusual = [a for a in probe.since(begun_s) if a.level != "NONE"]
        usual = all(not a.failed and any(r.startswith("timeout") for r in a.reasons) for a in unusual)
        short = lasted_s < lease_s - 0.1
        return Seen(
            None, None, abs(told_s - seconds) < 10 and usual,
            f"a lease of {lease_s} s lasted {lasted_s:.2f} s; {live} streams lived on",
            lost=int(short) + int(live == 0),
        )  # fmt: skip


@scenario("clock one hour ahead")
def clock_one_hour_ahead(stage: Stage) -> Seen:
    return _clock_stepped(stage, HOUR_S)


@scenario("clock one hour back")
def clock_one_hour_back(stage: Stage) -> Seen:
    return _clock_stepped(stage, -HOUR_S)
