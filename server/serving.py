"""`liverank serve`: one process, or a supervisor with an engine and edges; each until SIGTERM or SIGINT."""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from server.clock import SystemClock
from server.config import Settings, load_settings
from server.edges.supervisor import Supervisor, end_with_parent, write_whole
from server.errors import Draining, LiverankError

_STOPS = {signal.SIGTERM, signal.SIGINT}


class _Serving(Protocol):
    """An app or an edge."""

    port: int
    metrics_port: int

    def start(self) -> None: ...

    def stop_starting(self) -> None: ...

    def drain(self) -> bool: ...


def serve(config: Path | None, ready_file: Path | None, log_level: str) -> int:
    """The whole server; returns the exit status."""
    settings = load_settings(config)
    if settings.serve.edges:
        return _supervise(settings, config, ready_file, log_level)

    def make(give_up: Callable[[], None]) -> _Serving:
        from server.app import App

        return App(settings, SystemClock(), give_up)

    return _until_told(make, ready_file)


def serve_engine(config: Path | None, ready_file: Path, folder: Path) -> int:
    """The engine behind edges."""
    settings = load_settings(config)

    def make(give_up: Callable[[], None]) -> _Serving:
        from server.app import App

        end_with_parent(_tell_myself)
        return App(settings, SystemClock(), give_up, folder)

    return _until_told(make, ready_file)


def serve_edge(config: Path | None, ready_file: Path, folder: Path, number: int, port: int) -> int:
    """One edge; ``port`` is the one that the supervisor holds."""
    settings = load_settings(config)
    settings = settings.model_copy(update={"serve": settings.serve.model_copy(update={"port": port})})

    def make(give_up: Callable[[], None]) -> _Serving:
        from server.edge import Edge

        end_with_parent(_tell_myself)
        return Edge(settings, SystemClock(), folder, number)

    return _until_told(make, ready_file)


def _supervise(settings: Settings, config: Path | None, ready_file: Path | None, log_level: str) -> int:
    arguments = ["--log-level", log_level, *(["--config", str(config)] if config is not None else [])]
    with _stops_blocked():
        supervisor = Supervisor(settings, arguments, ready_file)
        running = threading.Thread(target=_run_and_tell, args=(supervisor,), name="supervisor")
        running.start()
        signal.sigwait(_STOPS)
        supervisor.stop()
        running.join()
        return supervisor.status


def _run_and_tell(supervisor: Supervisor) -> None:
    try:
        supervisor.run()
    finally:
        _tell_myself()


def _tell_myself() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _stops_blocked() -> Iterator[None]:
    """Blocked before any library starts a thread, then waited for: a handler runs only when the main thread happens to
    wake up, and a signal that the kernel hands to another thread does not wake it.

    After serving they stay blocked until the process is gone: a second request must not kill what ends in order.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    except BaseException:  # it did not come to serving
        while signal.sigtimedwait(_STOPS, 0) is not None:
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        raise


def _raise_file_limit() -> None:
    """Every connection is an open file, and the usual soft limit of 1,024 would be the end of answering."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _until_told(make: Callable[[Callable[[], None]], _Serving], ready_file: Path | None) -> int:
    _raise_file_limit()
    with _stops_blocked():
        return _serve_until(make, ready_file)


def _serve_until(make: Callable[[Callable[[], None]], _Serving], ready_file: Path | None) -> int:
    faults = threading.Event()
    failed: list[LiverankError] = []

    def give_up() -> None:
        faults.set()
        _tell_myself()

    def start() -> None:
        try:
            serving.start()
        except LiverankError as error:
            failed.append(error)
            _tell_myself()
            return
        except BaseException:
            give_up()
            raise
        # What was made until now stays. Looking through all of it for garbage, again and again, would hold every thread
        # for a tenth of a second each time.
        gc.collect()
        gc.freeze()
        if ready_file is not None:
            write_whole(ready_file, json.dumps({"port": serving.port, "metrics_port": serving.metrics_port}))

    serving = make(give_up)
    starting = threading.Thread(target=start, name="start")  # a recovery may be long, and can be stopped
    starting.start()
    signal.sigwait(_STOPS)
    if not failed:
        serving.stop_starting()
        starting.join()
        if failed and isinstance(failed[0], Draining):
            return 1 if faults.is_set() else 0  # a part failed, or it was told to stop, before it served
    if failed:
        starting.join()
        raise failed[0]
    clean = serving.drain()
    return 0 if clean and not faults.is_set() else 1
