"""Runs the real server in a process that can be told to misbehave, a line on stdin at a time. Never for service.

    clock -3600      the machine's wall clock, as this process sees it, is stepped by so many seconds
                     (0: right again)

Each command is answered on stdout (hence in the server's log file) with ``obeyed: …``.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

Command = Callable[[str], None]

_true_time_ns = time.time_ns
_offset_ns = 0


def step_clock(seconds: str) -> None:
    """The server's clock sees the step at once. time.time() stays: gRPC compares it with the clock of its C part,
    which a real step moves too and this cannot."""
    global _offset_ns
    _offset_ns = int(float(seconds) * 1e9)
    time.time_ns = lambda: _true_time_ns() + _offset_ns


COMMANDS: dict[str, Command] = {"clock": step_clock}


def obey(commands: dict[str, Command]) -> None:
    """Carries out stdin's commands until it closes."""
    for line in sys.stdin:
        name, _, argument = line.strip().partition(" ")
        commands[name](argument)
        print(f"obeyed: {line.strip()}", flush=True)


def main(commands: dict[str, Command] = COMMANDS) -> int:
    """`liverank` with this process's arguments, and a thread that obeys."""
    from server.__main__ import main as liverank

    threading.Thread(target=obey, args=(commands,), name="obey", daemon=True).start()
    return liverank()


if __name__ == "__main__":
    sys.exit(main())
