"""A server of ours for one bench: started, filled with the benches' catalogue, scored; stopped in the end."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from loadtest.bench.catalogue import make_catalogue
from loadtest.bench.contestants import CALL_TIMEOUT_S, OLDEST_MS, our_settings
from loadtest.bench.fill import fill, wait_until_scored
from loadtest.bench.load import Ask
from loadtest.processes import Server, cpu_seconds, running_server
from loadtest.revision import commit


@dataclass(frozen=True)
class Filled:
    """A server with ``streams`` live streams. ``rank`` takes and returns serialised messages."""

    server: Server
    channel: grpc.Channel
    rank: Ask
    streams: int

    @property
    def cpu_s(self) -> float:
        """User and system time of the server's process so far, seconds."""
        return cpu_seconds(self.server.process.pid)


@contextmanager
def filled_server(streams: int, **table: Any) -> Iterator[Filled]:
    """Defaults of `bench serve`, with ``table`` settings on top. Raises NotStartedError."""
    settings: dict[str, dict[str, Any]] = our_settings(streams)
    settings["table"] |= table
    with (
        tempfile.TemporaryDirectory(prefix="liverank-bench-") as folder,
        running_server(Path(folder), settings) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        fill(channel, make_catalogue(streams, OLDEST_MS))
        wait_until_scored(channel)
        rank = channel.unary_unary("/liverank.v1.Ranking/Rank")
        yield Filled(server, channel, lambda request: rank(request, timeout=CALL_TIMEOUT_S), streams)


def where() -> dict[str, Any]:
    """What a reader needs to judge a figure: code, machine, and how busy it was before."""
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "commit": commit(),
        "machine": f"{model or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "client": "shares the cores with the server",
        "load_average_before": round(os.getloadavg()[0], 2),
    }
