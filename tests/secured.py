"""Access files, tokens and channels for tests of a server that asks who calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc

from server.channel import client_settings, open_channel
from server.security.tokens import hash_token, new_token

TOKENS = {name: new_token(name) for name in ("reader", "producer", "admin", "other", "moderator")}
HASHES = {name: hash_token(token) for name, token in TOKENS.items()}
ROLES = {"other": ["producer"], "moderator": ["producer", "admin"]}


def write_access(path: Path, *names: str, certificates: dict[str, list[str]] | None = None, **more: Any) -> Path:
    """An access file with the tokens of `TOKENS`, each with the role of its name; ``more`` goes into each entry."""
    lines = []
    for name in names:
        lines += [f"[token.{name}]", f"hashes = {json.dumps([HASHES[name]])}"]
        lines += [f"roles = {json.dumps(ROLES.get(name, [name]))}"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in more.items()]
    for name, roles in (certificates or {}).items():
        lines += [f"[certificate.{json.dumps(name)}]", f"roles = {json.dumps(roles)}"]
    beside = path.with_suffix(".new")
    beside.write_text("\n".join(lines) + "\n")
    beside.replace(path)
    return path


def channel(port: int, token: str | None = None, **given: Any) -> grpc.Channel:
    """A channel to a server on this machine."""
    return open_channel(f"127.0.0.1:{port}", client_settings(token=token, **given))
