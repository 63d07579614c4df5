"""The two ports: free, or held by a liverank that already serves."""

from __future__ import annotations

import errno
import http.client
import socket
from collections.abc import Iterator

from server.doctor.base import Context, Finding, fail, ok, warn

TIMEOUT_S = 2.0


def ports(context: Context) -> Iterator[Finding]:
    """serve.port and serve.metrics_port; nothing stays bound."""
    serve = context.settings.serve
    if serve.port and serve.port == serve.metrics_port:
        yield fail(
            "ports.distinct",
            f"serve.port and serve.metrics_port are both {serve.port}",
            "Give them different numbers; 0 takes a free one.",
        )
        return
    taken = why_not(serve.host, serve.port)
    if taken == errno.EADDRINUSE and context.neighbour is not None:
        yield from _beside_a_liverank(context, context.neighbour)
        return
    yield _one("ports.grpc", "serve.port", serve.host, serve.port, taken)
    metrics_host = context.settings.metrics_host
    metrics = why_not(metrics_host, serve.metrics_port)
    yield _one("ports.metrics", "serve.metrics_port", metrics_host, serve.metrics_port, metrics)


def _beside_a_liverank(context: Context, health: str) -> Iterator[Finding]:
    serve = context.settings.serve
    told = f"{serve.host}:{serve.port} is taken by a liverank that answers {health}"
    if health == "SERVING":
        yield ok("ports.grpc", f"{told}; a second one would need other ports")
    else:
        yield warn("ports.grpc", told, "It is starting, draining or stuck: ask again in a while, then see its log.")
    metrics_host = context.settings.metrics_host
    if has_metrics(metrics_host, serve.metrics_port):
        yield ok("ports.metrics", f"{metrics_host}:{serve.metrics_port} answers liverank's metrics")
    else:
        yield warn(
            "ports.metrics",
            f"{metrics_host}:{serve.metrics_port} does not answer liverank's metrics",
            "The running server uses another serve.metrics_port: examine it with its own --config.",
        )


def _one(check: str, key: str, host: str, port: int, problem: int) -> Finding:
    variable = f"LIVERANK_{key.upper().replace('.', '__')}"
    told = f"{host}:{port}"
    if port == 0 and not problem:
        return ok(check, f"{host}: a free port, chosen at start")
    if not problem:
        return ok(check, f"{told} is free")
    if problem == errno.EADDRINUSE:
        who = "another liverank's metrics" if has_metrics(host, port) else "another program"
        return fail(
            check,
            f"{told} is taken by {who}",
            f"Stop it (`ss -ltnp 'sport = :{port}'` names it), or set {key} ({variable}) to another port.",
        )
    if problem == errno.EACCES:
        return fail(check, f"{told} may not be bound by this user", f"Set {key} ({variable}) to a port from 1024 on.")
    return fail(
        check,
        f"{told} cannot be bound: {errno.errorcode.get(problem, problem)}",
        "Set serve.host (LIVERANK_SERVE__HOST) to an address of this machine, such as 127.0.0.1 or 0.0.0.0.",
    )


def why_not(host: str, port: int) -> int:
    """The errno with which binding would fail, 0 when it would not."""
    try:
        infos = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        return errno.EADDRNOTAVAIL
    for family, kind, protocol, _, address in infos[:1]:
        with socket.socket(family, kind, protocol) as probe:
            # As gRPC does; otherwise connections that have just been closed would count as a taken port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                return error.errno or errno.EADDRNOTAVAIL
    return 0


def has_metrics(host: str, port: int) -> bool:
    """Whether a liverank's Prometheus metrics are answered there."""
    from server.doctor.health import reachable

    connection = http.client.HTTPConnection(reachable(host), port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/metrics")
        return b"liverank_capacity_rows" in connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
