"""Options of commands that talk to a running server. argparse only: the command line is read before gRPC is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path

SECURITY = ("tls", "ca_file", "cert_file", "key_file", "token_file", "server_name")
"""Names in `channel.client_settings`."""


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """--server, and how to be let in."""
    parser.add_argument("--server", default="127.0.0.1:7710")
    parser.add_argument("--tls", action="store_true", default=None, help="for these, see LIVERANK_CLIENT__TLS …")
    parser.add_argument("--ca-file", type=Path, help="PEM; who may have signed the server's certificate")
    parser.add_argument("--cert-file", type=Path, help="PEM; the client's certificate")
    parser.add_argument("--key-file", type=Path, help="PEM; its key")
    parser.add_argument("--token-file", type=Path, help="its first line is the token")
    parser.add_argument("--server-name", help="name in the server's certificate, if not that of the address")
