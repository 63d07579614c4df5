"""Command lines of `liverank load`, `liverank report` and `liverank bench`. Imports only what a command needs."""

from __future__ import annotations

import argparse
from pathlib import Path

BENCHES = ("freshness", "ingest", "scale", "slo", "soak", "swap")
"""Benches that `add_bench` and `run_bench` know."""


def add_load(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`liverank load` and `liverank report`."""
    load = commands.add_parser("load", help="play a traffic scenario against a server; last, one line of JSON")
    load.add_argument("scenario", help="steady, ramp, spike, raid, evening, mass_end, hot_reload, or a TOML file")
    where = load.add_mutually_exclusive_group(required=True)
    where.add_argument("--target", metavar="HOST:PORT", help="a running server")
    where.add_argument("--self", dest="own", action="store_true", help="start a server for this run, then stop it")
    load.add_argument("--allow-remote", action="store_true", help="the target may be another machine")
    load.add_argument("--metrics", metavar="HOST:PORT", default="", help="the target's metrics, for the stages")
    load.add_argument("--model-folder", type=Path, help="REPOSITORY/MODEL of the target, for swap_model")
    load.add_argument("--report", type=Path, metavar="OUT.html", help="write a page with plots")
    load.add_argument("--out", type=Path, metavar="RUN.json", help="write the record; `liverank report` compares two")
    load.add_argument("--time-scale", type=float, default=1.0, help="0.1: the same scenario in a tenth of the time")
    load.add_argument("--rate-scale", type=float, default=1.0, help="2: twice the calls and events per second")

    report = commands.add_parser("report", help="one page of plots from the record of a load, or of two")
    report.add_argument("run", type=Path, metavar="RUN.json")
    report.add_argument("other", type=Path, nargs="?", metavar="OTHER.json", help="drawn beside it")
    report.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.html")


def add_bench(bench: argparse.ArgumentParser) -> None:
    """Options of BENCHES beside those that all benches share (--streams, --seconds, --quick)."""
    bench.add_argument("--p99-ms", type=float, default=20.0, help="slo: the promise to hold")
    bench.add_argument("--budget-seconds", type=float, default=160.0, help="slo: for all trials together")
    bench.add_argument("--minutes", type=float, default=10.0, help="soak: its length")
    bench.add_argument("--rate", type=float, help="soak, swap: Rank calls per second; soak: 70 %% of what is found")
    bench.add_argument("--batch", type=int, nargs="+", help="ingest: events per message or pipeline")
    bench.add_argument("--triton", action="store_true", help="swap: the model on a real Triton, else in process")
    bench.add_argument("--full", action="store_true", help="scale: up to a million streams")


def run_bench(options: argparse.Namespace) -> int:
    """One of BENCHES. --streams gives the size, or for scale all sizes; --seconds the length of one measurement."""
    quick, sizes = options.quick, options.streams or []
    streams = sizes[0] if sizes else 1_000 if quick else 10_000
    if options.name == "slo":
        from loadtest.bench.slo import run_slo

        window_s = options.seconds or (0.5 if quick else 5.0)
        return run_slo(options.p99_ms, streams, window_s, min(options.budget_seconds, 10.0 if quick else 3_600.0))
    if options.name == "ingest":
        from dataclasses import replace

        from loadtest.bench.ingest import QUICK, Plan, run_ingest

        plan = QUICK if quick else Plan()
        return run_ingest(replace(plan, streams=streams, batches=tuple(options.batch or plan.batches)))
    if options.name == "freshness":
        from loadtest.bench.freshness import run_freshness

        seconds = options.seconds or (2.0 if quick else 30.0)
        return run_freshness(streams, seconds, min(4.0, seconds / 4))
    if options.name == "soak":
        from loadtest.bench.soak import run_soak

        minutes = 0.05 if quick else options.minutes
        return run_soak(minutes, options.rate, streams, find_s=0.5 if quick else 5.0)
    if options.name == "swap":
        from dataclasses import replace

        from loadtest.bench.swap import QUICK as QUICK_SWAP
        from loadtest.bench.swap import Plan as SwapPlan
        from loadtest.bench.swap import run_swap

        base = QUICK_SWAP if quick else SwapPlan()
        swap = replace(base, in_triton=options.triton, streams=sizes[0] if sizes else base.streams)
        swap = replace(swap, rate_rps=options.rate or swap.rate_rps, seconds=options.seconds or swap.seconds)
        return run_swap(swap)
    from loadtest.bench.scale import FULL_SIZES, SIZES, run_scale

    if quick:
        return run_scale(tuple(sizes) or (500, 2_000), 0.4, 2_000, (10, 1_000))
    return run_scale(tuple(sizes) or (FULL_SIZES if options.full else SIZES), options.seconds or 4.0)


def run_load(options: argparse.Namespace) -> int:
    """`liverank load`. Raises ConfigError."""
    from loadtest.load.run import Target, check_target
    from loadtest.load.run import run_load as run
    from loadtest.load.scenario import load_scenario

    scenario = load_scenario(options.scenario)
    if (options.time_scale, options.rate_scale) != (1.0, 1.0):
        scenario = scenario.scaled(options.time_scale, options.rate_scale)
    target = None
    if not options.own:
        check_target(options.target, options.allow_remote)
        if options.metrics:
            check_target(options.metrics, options.allow_remote)
        target = Target(options.target, options.metrics, model_folder=options.model_folder)
    return run(scenario, target, options.report, options.out)


def run_report(options: argparse.Namespace) -> int:
    """`liverank report`. Raises ConfigError."""
    from loadtest.report import page, read_record

    records = [read_record(path) for path in (options.run, options.other) if path is not None]
    options.output.write_text(page(records))
    print(options.output)
    return 0
