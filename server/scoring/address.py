"""Where a Triton is."""

from __future__ import annotations

import socket


def is_this_machine(address: str) -> bool:
    """Whether "host:port" is a loopback address, or the address a Unix socket ("unix:path")."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return any(info[4][0] in ("::1",) or str(info[4][0]).startswith("127.") for info in socket.getaddrinfo(host, 0))
    except OSError:
        return False
