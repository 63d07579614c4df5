"""`liverank`: serve · doctor · token · log · table export · model · demo · replay · rank · explain · load · report ·
bench."""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import signal
import sys
import threading
from importlib import import_module
from pathlib import Path

from loadtest import arguments as loadtest_arguments  # argparse only
from server.clock import SystemClock
from server.config import load_settings
from server.errors import ConfigError, Draining, LiverankError

BENCHES = ("faults", "first", "gpu", "kernels", "liveness", "overload", "recovery", "serve")
MODEL_COMMANDS = "models.evaluate_command"  # by name: serving does not need that package


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit status: 0 done, 1 failed, 2 wrong usage or settings."""
    parser = argparse.ArgumentParser(prog="liverank", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    serve = commands.add_parser("serve", help="run the server until SIGTERM")
    serve.add_argument("--config", type=Path, help="settings file (TOML)")
    serve.add_argument("--ready-file", type=Path, help="written with the bound ports, as JSON, once serving")

    serve.add_argument("--log-level", choices=["debug", "info", "warning"], default="info")

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
        client.add_argument("--tls", action="store_true", default=None, help="for these, see LIVERANK_CLIENT__TLS …")
        client.add_argument("--ca-file", type=Path, help="PEM; who may have signed the server's certificate")
        client.add_argument("--cert-file", type=Path, help="PEM; the client's certificate")
        client.add_argument("--key-file", type=Path, help="PEM; its key")
        client.add_argument("--token-file", type=Path, help="its first line is the token")
        client.add_argument("--server-name", help="name in the server's certificate, if not that of the address")
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

    _add_model(commands, sys.argv[1:] if arguments is None else arguments)

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


def _add_model(commands: argparse._SubParsersAction[argparse.ArgumentParser], arguments: list[str]) -> None:
    """The options of the action that ``arguments`` name only: the others are not imported."""
    model = commands.add_parser("model", help="train a model on history, and compare it with the formulas")
    actions = model.add_subparsers(dest="action", required=True)
    for name, help_text in (
        ("evaluate", "a model against every formula on the last 30 %% of a history's time"),
        ("train-growth", "train the growth recipe on a history and write it as ONNX"),
    ):
        parser = actions.add_parser(name, help=help_text)
        if arguments[:2] == ["model", name]:
            import_module(MODEL_COMMANDS).add_arguments(parser, name)


def _run(options: argparse.Namespace) -> int:
    """Imports only what the command needs."""
    if options.command == "serve":
        return _serve(options.config, options.ready_file)
    if options.command == "token":
        from server.security.command import run_token

        return run_token(options)
    if options.command == "doctor":
        from server.doctor import run_doctor

        return run_doctor(options.config, options.json)
    if options.command == "table":
        from server.export import run_export

        return run_export(options.out, options.config)
    if options.command == "log":
        from server.log.repair import run

        return run(load_settings(options.config), options.action, options.first, options.yes)
    if options.command == "model":
        status: int = import_module(MODEL_COMMANDS).run(options)
        return status
    if options.command == "demo":
        from loadtest.demo import run_demo

        return run_demo(options.seconds, options.streams, options.seed)
    if options.command == "replay":
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


def _raise_file_limit() -> None:
    """Every connection is an open file, and the usual soft limit of 1,024 would be the end of answering."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _serve(config: Path | None, ready_file: Path | None) -> int:
    _raise_file_limit()
    # Blocked before any library starts a thread, then waited for: a handler runs only when the main thread
    # happens to wake up, and a signal that the kernel hands to another thread does not wake it.
    stops = {signal.SIGTERM, signal.SIGINT}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    try:
        return _serve_until(stops, config, ready_file)
    finally:
        while signal.sigtimedwait(stops, 0) is not None:
            pass  # a second request to stop, which must not kill what has ended in order
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve_until(stops: set[signal.Signals], config: Path | None, ready_file: Path | None) -> int:
    from server.app import App

    faults = threading.Event()
    failed: list[LiverankError] = []

    def give_up() -> None:
        faults.set()
        os.kill(os.getpid(), signal.SIGTERM)

    def start() -> None:
        try:
            app.start()
        except LiverankError as error:
            failed.append(error)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        except BaseException:
            give_up()
            raise
        if ready_file is not None:
            beside = ready_file.with_suffix(".tmp")
            beside.write_text(json.dumps({"port": app.port, "metrics_port": app.metrics_port}))
            beside.rename(ready_file)  # a reader sees all of it or nothing

    app = App(load_settings(config), SystemClock(), give_up)
    starting = threading.Thread(target=start, name="start")  # a recovery may be long, and can be stopped
    starting.start()
    signal.sigwait(stops)
    if not failed:
        app.stop_starting()
        starting.join()
        if failed and isinstance(failed[0], Draining):
            return 1 if faults.is_set() else 0  # a part failed, or it was told to stop, before it served
    if failed:
        starting.join()
        raise failed[0]
    clean = app.drain()
    return 0 if clean and not faults.is_set() else 1


if __name__ == "__main__":
    sys.exit(main())
