"""Command lines of `liverank load`, `liverank report` and `liverank bench`. Imports only what a command needs."""

from __future__ import annotations

import argparse
from pathlib import Path


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
