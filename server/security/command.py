"""`liverank token`: makes tokens and the entries of the access file."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from server.errors import ConfigError
from server.security.roles import Role
from server.security.tokens import hash_token, name_of, new_token


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    kinds = parser.add_subparsers(dest="action", required=True)
    new = kinds.add_parser("new", help="make a token; prints its entry for the access file")
    new.add_argument("name", help="who will use it: letters, digits, - and _")
    new.add_argument("--roles", nargs="+", choices=[str(role) for role in Role], required=True)
    new.add_argument("--producer-ids", nargs="*", default=[], help="default: the name; '*': any")
    new.add_argument("--out", type=Path, help="write the token to this new file (mode 600) instead of the terminal")
    kinds.add_parser("hash", help="read a token from standard input; print its hash")


def run_token(options: argparse.Namespace) -> int:
    """Prints the entry (or hash) on standard output, and a token that was not written to a file on standard error.

    Raises:
        ConfigError: name, token or file cannot be used.
    """
    if options.action == "hash":
        token = sys.stdin.readline().strip()
        hashed = hash_token(token)
        print(f"the token of {name_of(token)!r}", file=sys.stderr)
        print(hashed)
        return 0
    token = new_token(options.name)
    if options.out is None:
        print(f"token, shown only now: {token}", file=sys.stderr)
    else:
        _write_new(options.out, token)
    print(f"[token.{options.name}]")
    print(f"hashes = {json.dumps([hash_token(token)])}")
    print(f"roles = {json.dumps(options.roles)}")
    if options.producer_ids:
        print(f"producer_ids = {json.dumps(options.producer_ids)}")
    return 0


def _write_new(path: Path, token: str) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ConfigError(f"--out: {path}: {error.strerror}") from error
    with os.fdopen(fd, "w") as file:
        file.write(f"{token}\n")
