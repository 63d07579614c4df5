"""`liverank`: serve · doctor · demo · replay · rank · explain · load · report · bench."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path

from loadtest import arguments as loadtest_arguments  # argparse only
from server.clock import SystemClock
from server.config import load_settings
from server.errors import LiverankError


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit status: 0 done, 1 failed, 2 wrong usage or settings."""
    parser = argparse.ArgumentParser(prog="liverank", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    serve = commands.add_parser("serve", help="run the server until SIGTERM")
    serve.add_argument("--config", type=Path, help="settings file (TOML)")
    serve.add_argument("--ready-file", type=Path, help="written with the bound ports, as JSON, once serving")

    doctor = commands.add_parser("doctor", help="check this machine and these settings; exit status 0: can serve")
    doctor.add_argument("--config", type=Path, help="settings file (TOML)")
    doctor.add_argument("--json", action="store_true", help="print one line of JSON last")

    demo = commands.add_parser("demo", help="Triton, server and a simulated platform for a minute")
    demo.add_argument("--seconds", type=float, default=60.0)
    demo.add_argument("--streams", type=int, default=250, help="streams live at once")
    demo.add_argument("--seed", type=int, default=7)

    replay = commands.add_parser("replay", help="feed real livestream history through the API")
    replay.add_argument("file", type=Path, help="CSV or Parquet; see README for its columns")
    replay.add_argument("--speed", type=float, default=0.0, help="times real time; 0: as fast as it goes")
    replay.add_argument("--surface", default="chart", help="surface of the rules file to rank for")
    replay.add_argument("--config", type=Path, help="settings file (TOML)")

    for name, help_text in (
        ("rank", "ask a running server for a slate"),
        ("explain", "ask why a stream is (not) shown"),
    ):
        client = commands.add_parser(name, help=help_text)
        client.add_argument("--server", default="127.0.0.1:7710")
        client.add_argument("--viewer", default="")
        client.add_argument("--limit", type=int, default=0)
        client.add_argument("--surface", default="")
        client.add_argument("--languages", nargs="*", default=[])
        client.add_argument("--categories", nargs="*", default=[])
        client.add_argument("--region", default="")
        if name == "explain":
            client.add_argument("stream_id")

    loadtest_arguments.add_load(commands)

    bench = commands.add_parser("bench", help="measure; prints a table and, last, one line of JSON")
    bench.add_argument("name", choices=["first", "kernels", "serve", *loadtest_arguments.BENCHES])
    loadtest_arguments.add_bench(bench)
    bench.add_argument("--streams", type=int, nargs="+", help="first, serve: sizes of the table")
    bench.add_argument("--concurrency", type=int, nargs="+", help="serve: callers at once")
    bench.add_argument("--seconds", type=float, help="serve: length of one turn of one server")
    bench.add_argument("--quick", action="store_true", help="kernels, serve: few runs, small table")

    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        return _run(options)
    except LiverankError as error:
        print(f"liverank: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    """Imports only what the command needs."""
    if options.command == "serve":
        return _serve(options.config, options.ready_file)
    if options.command == "doctor":
        from server.doctor import run_doctor

        return run_doctor(options.config, options.json)
    if options.command == "demo":
        from loadtest.demo import run_demo

        return run_demo(options.seconds, options.streams, options.seed)
    if options.command == "replay":
        from loadtest.replay import run_replay

        return run_replay(options.file, options.speed, options.surface, options.config)
    if options.command == "load":
        return loadtest_arguments.run_load(options)
    if options.command == "report":
        return loadtest_arguments.run_report(options)
    if options.command == "bench" and options.name in loadtest_arguments.BENCHES:
        return loadtest_arguments.run_bench(options)
    if options.command == "bench" and options.name == "kernels":
        from loadtest.bench.kernels import run_kernels

        return run_kernels(options.quick)
    if options.command == "bench" and options.name == "serve":
        from loadtest.bench.serve import plan_from, run_serve

        return run_serve(plan_from(options.streams, options.concurrency, options.seconds, options.quick))
    if options.command == "bench":
        from loadtest.bench.first import run_first

        return run_first(options.streams or [1_000, 10_000, 100_000])
    from server.client import run_client

    return run_client(options)


def _serve(config: Path | None, ready_file: Path | None) -> int:
    # Blocked before any library starts a thread, then waited for: a handler runs only when the main thread
    # happens to wake up, and a signal that the kernel hands to another thread does not wake it.
    stops = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    from server.app import App

    faults = threading.Event()

    def give_up() -> None:
        faults.set()
        os.kill(os.getpid(), signal.SIGTERM)

    app = App(load_settings(config), SystemClock(), give_up)
    app.start()
    if ready_file is not None:
        beside = ready_file.with_suffix(".tmp")
        beside.write_text(json.dumps({"port": app.port, "metrics_port": app.metrics_port}))
        beside.rename(ready_file)  # a reader sees all of it or nothing
    signal.sigwait(stops)
    clean = app.drain()
    return 0 if clean and not faults.is_set() else 1


if __name__ == "__main__":
    sys.exit(main())
