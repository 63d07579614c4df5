"""`liverank`: serve · doctor · token · log · table export · model · demo · replay · rank · explain · load · report ·
bench."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from importlib import import_module
from pathlib import Path

from loadtest import arguments as loadtest_arguments  # argparse only
from server.client_options import add_server_options
from server.config import load_settings
from server.errors import ConfigError, LiverankError
from server.model_commands import add_model, run_model

BENCHES = ("faults", "first", "gpu", "kernels", "liveness", "overload", "recovery", "serve")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit status: 0 done, 1 failed, 2 wrong usage or settings."""
    parser = argparse.ArgumentParser(prog="liverank", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    serve = commands.add_parser("serve", help="run the server until SIGTERM")
    serve.add_argument("--config", type=Path, help="settings file (TOML)")
    serve.add_argument("--ready-file", type=Path, help="written with the bound ports, as JSON, once serving")

    serve.add_argument("--log-level", choices=["debug", "info", "warning"], default="info")

    for name in ("engine", "edge"):  # what `serve` with edges starts; not for people, so not listed
        part = commands.add_parser(name)
        part.add_argument("--config", type=Path)
        part.add_argument("--ready-file", type=Path)
        part.add_argument("--log-level", default="info")
        part.add_argument("--folder", type=Path)
        if name == "edge":
            part.add_argument("--number", type=int)
            part.add_argument("--port", type=int)

    from server.security.command import add_arguments

    add_arguments(commands.add_parser("token", help="make or hash a token for security.access_file"))

    doctor = commands.add_parser("doctor", help="check this machine and these settings; exit status 0: can serve")
    doctor.add_argument("--config", type=Path, help="settings file (TOML)")
    doctor.add_argument("--json", action="store_true", help="print one line of JSON last")

    log = commands.add_parser("log", help="check the event log and its snapshots, or give up damaged records")
    log.add_argument("action", choices=["verify", "truncate"])
    log.add_argument("--config", type=Path, help="settings file (TOML)")
    log.add_argument("--from", type=int, dest="first", help="truncate: this record and all after it are removed")
    log.add_argument("--yes", action="store_true", help="truncate: really do it")

    demo = commands.add_parser("demo", help="Triton, server and a simulated platform for a minute")
    demo.add_argument("--seconds", type=float, default=60.0)
    demo.add_argument("--streams", type=int, default=250, help="streams live at once")
    demo.add_argument("--seed", type=int, default=7)

    replay = commands.add_parser("replay", help="feed real livestream history through the API")
    replay.add_argument("file", type=Path, nargs="?", help="CSV or Parquet; see README for its columns")
    replay.add_argument("--speed", type=float, default=0.0, help="times real time; 0: as fast as it goes")
    replay.add_argument("--surface", default="chart", help="surface of the rules file to rank for")
    replay.add_argument("--config", type=Path, help="settings file (TOML)")
    dataset = replay.add_argument_group("training rows instead of a comparison; see docs/datasets.md")
    dataset.add_argument("--out", type=Path, metavar="ROWS.parquet", help="write a dataset file")
    dataset.add_argument(
        "--log", type=Path, metavar="DIR", help="a server's SQLite log, or its folder, instead of FILE"
    )
    dataset.add_argument("--rows", choices=["impressions", "streams"], default="impressions")
    dataset.add_argument("--every-minutes", type=int, default=1, help="streams: between moments")
    dataset.add_argument("--audit", type=int, default=0, metavar="N", help="then read N rows from the log once more")
    dataset.add_argument("--ray", metavar="ADDRESS", help="shard the job over a Ray cluster; local: start one here")
    dataset.add_argument("--shards", type=int, default=2, help="ray: shards of streams")

    for name, help_text in (
        ("rank", "ask a running server for a slate"),
        ("explain", "ask why a stream is (not) shown"),
    ):
        client = commands.add_parser(name, help=help_text)
        add_server_options(client)
        client.add_argument("--viewer", default="")
        client.add_argument("--limit", type=int, default=0)
        client.add_argument("--surface", default="")
        client.add_argument("--languages", nargs="*", default=[])
        client.add_argument("--categories", nargs="*", default=[])
        client.add_argument("--region", default="")
        if name == "explain":
            client.add_argument("stream_id")

    table = commands.add_parser("table", help="look at the live table with other tools")
    table_actions = table.add_subparsers(dest="action", required=True)
    export = table_actions.add_parser("export", help="write the table as the log has it to a Parquet file")
    export.add_argument("out", type=Path, metavar="OUT.parquet")
    export.add_argument("--config", type=Path, help="settings file (TOML)")

    add_model(commands, sys.argv[1:] if arguments is None else arguments)
    loadtest_arguments.add_load(commands)

    bench = commands.add_parser("bench", help="measure; prints a table and, last, one line of JSON")
    bench.add_argument("name", choices=sorted({*BENCHES, *loadtest_arguments.BENCHES}))
    loadtest_arguments.add_bench(bench)
    bench.add_argument("--streams", type=int, nargs="+", help="first, serve, overload, recovery: sizes of the table")
    bench.add_argument("--events", type=int, help="recovery: events in the log")
    bench.add_argument("--concurrency", type=int, nargs="+", help="serve: callers at once")
    bench.add_argument(
        "--seconds", type=float, help="serve: of one turn; overload: of the flood; liveness, faults: of the run or soak"
    )
    bench.add_argument("--quick", action="store_true", help="few runs, small table; faults: short soak")
    bench.add_argument("--only", nargs="+", help="faults: play only these")

    options = parser.parse_args(arguments)
    level = getattr(options, "log_level", "info").upper()
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("numba").setLevel(logging.INFO)  # at DEBUG it prints every instruction that it compiles
    try:
        return _run(options)
    except LiverankError as error:
        print(f"liverank: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    """Imports only what the command needs."""
    if options.command in ("serve", "engine", "edge"):
        from server import serving

        if options.command == "serve":
            return serving.serve(options.config, options.ready_file, options.log_level)
        if options.command == "engine":
            return serving.serve_engine(options.config, options.ready_file, options.folder)
        return serving.serve_edge(options.config, options.ready_file, options.folder, options.number, options.port)
    if options.command == "token":
        from server.security.command import run_token

        return run_token(options)
    if options.command == "doctor":
        from server.doctor import run_doctor

        return run_doctor(options.config, options.json)
    if options.command == "table":
        from server.export import run_export

        return run_export(options.out, options.config)
    if options.command == "model":
        return run_model(options)
    if options.command == "log":
        from server.log.repair import run

        return run(load_settings(options.config), options.action, options.first, options.yes)
    if options.command == "demo":
        from loadtest.demo import run_demo

        return run_demo(options.seconds, options.streams, options.seed)
    if options.command == "replay" and options.out is not None:
        status: int = import_module("models.rows.command").run_rows(options)  # by name: serving needs no models
        return status
    if options.command == "replay":
        if options.file is None or options.log is not None:
            raise ConfigError("replay: FILE wanted; --log goes with --out")
        from loadtest.replay import run_replay

        return run_replay(options.file, options.speed, options.surface, options.config)
    if options.command == "bench" and options.name == "gpu":
        from kernels.backend import visible_gpu

        if options.quick and visible_gpu() is None:
            os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is defined
        try:
            from loadtest.bench.gpu import run_gpu
        except ImportError as error:
            raise ConfigError(f"bench gpu needs torch and triton: pip install 'liverank[gpu]' ({error})") from error

        return run_gpu(options.quick)
    if options.command == "load":
        return loadtest_arguments.run_load(options)
    if options.command == "report":
        return loadtest_arguments.run_report(options)
    if options.command == "bench" and options.name in loadtest_arguments.BENCHES:
        return loadtest_arguments.run_bench(options)
    if options.command == "bench" and options.name == "kernels":
        from loadtest.bench.kernels import run_kernels

        return run_kernels(options.quick)
    if options.command == "bench" and options.name == "recovery":
        from loadtest.bench.recovery import run_recovery

        return run_recovery((options.streams or [100_000])[0], options.events or 10_000_000)
    if options.command == "bench" and options.name == "serve":
        from loadtest.bench.serve import plan_from, run_serve

        return run_serve(plan_from(options.streams, options.concurrency, options.seconds, options.quick))
    if options.command == "bench" and options.name == "liveness":
        from loadtest.liveness.run import run_liveness

        return run_liveness(options.seconds or 30.0)
    if options.command == "bench" and options.name == "faults":
        from loadtest.bench.faults import run_faults

        return run_faults(options.only, options.seconds, options.quick)
    if options.command == "bench" and options.name == "overload":
        from loadtest.bench.overload import plan_from as overload_plan
        from loadtest.bench.overload import run_overload

        streams = options.streams[0] if options.streams else None
        return run_overload(overload_plan(streams, options.seconds, options.quick))
    if options.command == "bench":
        from loadtest.bench.first import run_first

        return run_first(options.streams or [1_000, 10_000, 100_000])
    from server.client import run_client

    return run_client(options)


if __name__ == "__main__":
    sys.exit(main())
