"""Asks the gRPC health service on a port whether it is a liverank, and how it is.

``python -m server.doctor.health 127.0.0.1:7710`` prints the answer; exit status 0: SERVING, 1: not, 2: wrong usage.
"""

from __future__ import annotations

import ipaddress
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from server.channel import open_channel

SERVICE = "liverank.v1.Ranking"
TIMEOUT_S = 2.0


def ask_health(host: str, port: int) -> str | None:
    """The status that liverank's own service has there, such as "SERVING"; None when no liverank answers."""
    with open_channel(f"{reachable(host)}:{port}") as channel:  # with TLS if LIVERANK_CLIENT__* says so
        try:
            # Only a liverank knows this service; another health server answers NOT_FOUND.
            reply = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=SERVICE), timeout=TIMEOUT_S
            )
        except grpc.RpcError:
            return None
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))


def reachable(host: str) -> str:
    """Where a server that listens on ``host`` can be called from this machine."""
    try:
        address = ipaddress.ip_address(host.strip("[]") or "::")
    except ValueError:
        return host
    if not address.is_unspecified:
        return host
    return "[::1]" if host and address.version == 6 else "127.0.0.1"


def main(arguments: list[str]) -> int:
    """The health check of a container."""
    host, _, port = arguments[0].rpartition(":") if len(arguments) == 1 else ("", "", "")
    if not host or not port.isdecimal():
        print("usage: python -m server.doctor.health HOST:PORT", file=sys.stderr)
        return 2
    status = ask_health(host, int(port))
    print(status or "no liverank answers")
    return 0 if status == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
