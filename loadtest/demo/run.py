"""Runs the demo: Triton, server, platform and viewers, as a user would; then takes all of it down."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from liverank.v1 import admin_pb2, admin_pb2_grpc
from rich.console import Console

from loadtest.demo.audience import Audience
from loadtest.demo.platform import Platform
from loadtest.demo.screen import Screen
from loadtest.processes import ROOT, NotStartedError, running_server, running_triton, set_up_triton, wait_for
from loadtest.world import World, WorldSettings

LEASE_MS, GRACE_MS = 6_000, 20_000
TABLE_EVERY_S = 6.0
WIDTH = 120  # of the output when it goes to a file


def run_demo(seconds: float, streams: int, seed: int) -> int:
    """Prints the feed as it changes and, last, one line of JSON.

    Returns 0 only if no stream was shown after its end was acknowledged and the model really scored:
    in Triton, or, where Triton cannot run, in process (which is said).
    """
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="liverank-demo-")))
        try:
            why_not = set_up_triton()
            scoring: dict[str, Any] = {"mode": "local"}
            if why_not:
                console.print(f"{why_not} Scoring in process with the same model instead.", markup=False)
            else:
                console.print("starting Triton Inference Server …")
                triton = stack.enter_context(
                    running_triton(ROOT / "model_repository", folder / "triton.log", "trendiness")
                )
                scoring = {"mode": "triton", "triton_address": triton.address}
            console.print("starting liverank …")
            table = {"capacity": 8 * streams + 1_000, "lease_ms": LEASE_MS, "grace_ms": GRACE_MS}
            server = stack.enter_context(running_server(folder / "server", {"scoring": scoring, "table": table}))
        except NotStartedError as error:
            console.print(f"not started: {error}", markup=False)
            return 1
        channel = stack.enter_context(grpc.insecure_channel(server.address))
        summary, sound = _watch(console, channel, seconds, streams, seed, expect_triton=not why_not)
    print(json.dumps(summary))
    return 0 if sound else 1


def _watch(
    console: Console, channel: grpc.Channel, seconds: float, streams: int, seed: int, expect_triton: bool
) -> tuple[dict[str, Any], bool]:
    """Lets platform and viewers run; returns the summary and whether all was as it should be."""
    world = World(
        WorldSettings(
            seed=seed,
            start_ms=int(time.time() * 1000),
            target_live=streams,
            mean_session_ms=240_000,
            viewer_count_ms=4_000,
            interaction_ms=4_000,
            n_creators=max(2_000, 4 * streams),
            daily_curve=False,
        )
    )
    console.print(f"simulating a platform with {streams} live streams for {seconds:.0f} s …")
    platform = Platform(world, channel)
    screen = Screen(platform, channel, console)
    audience = Audience(platform, channel, threads=4, seed=seed)
    platform.start()
    started_s = time.monotonic()
    admin = admin_pb2_grpc.AdminStub(channel)
    wait_for(lambda: admin.Status(admin_pb2.StatusRequest(), timeout=5.0).live > 0, 20.0, "the first stream live")
    audience.start()
    try:
        while (left_s := seconds - (time.monotonic() - started_s)) > 0 and platform.failure is None:
            screen.show(time.monotonic() - started_s)
            time.sleep(min(TABLE_EVERY_S, left_s))
    finally:
        audience.stop()
        platform.stop()
        screen.close()
    status = admin.Status(admin_pb2.StatusRequest(), timeout=5.0)
    models = sorted(m for m in audience.models if m not in ("formula", "popular"))
    scored = bool(models) and (not expect_triton or status.scoring_backend == "triton")
    summary = {
        "events_applied": status.events_applied,
        "rank_calls": len(audience.latencies_ms),
        "rank_p50_ms": _percentile(audience.latencies_ms, 50),
        "rank_p99_ms": _percentile(audience.latencies_ms, 99),
        "end_to_gone_p99_ms": _percentile(platform.end_to_gone_ms, 99),
        "shown_after_end": len(audience.shown_after_end),
        "triton_model_version": ",".join(models) if scored and expect_triton else None,
        "degraded_replies": audience.degraded,
    }
    _say_what_happened(console, platform, audience, status)
    failures = [str(platform.failure)] if platform.failure else []
    for failure in failures + audience.failures[:3]:
        console.print(f"failed: {failure}", markup=False)
    sound = scored and not audience.shown_after_end and not failures and not audience.failures
    return summary, sound and bool(audience.latencies_ms)


def _say_what_happened(
    console: Console, platform: Platform, audience: Audience, status: admin_pb2.StatusResponse
) -> None:
    console.print(
        f"\n{status.live} live, {status.suspect} silent (hidden), {status.ended} ended and remembered. "
        f"{len(platform.end_to_gone_ms)} ends acknowledged; shown after that: {len(audience.shown_after_end)}."
    )
    longest = max(audience.shown_silent_ms, default=0) / 1000
    console.print(
        f"Encoders that died silently were shown for at most {longest:.1f} s more (their lease: "
        f"{LEASE_MS / 1000:.0f} s of grace from the last proof of media; the simulator steps once a second)."
    )
    if platform.rejected:
        refused = ", ".join(f"{count} {code}" for code, count in platform.rejected.most_common())
        console.print(f"Events refused, as they should be (late, duplicate, after the end …): {refused}")


def _percentile(values: list[float], q: float) -> float | None:
    return round(float(np.percentile(values, q)), 2) if values else None
